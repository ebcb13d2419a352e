"""Write signs of life of every rank, and find out who is stuck when the others wait.

Each rank writes RUN/heartbeats/rank_00003.json every few seconds from a thread of its own, so a rank that merely waits
goes on beating while one that was stopped or killed does not. The file says:

- rank, world_size, host, pid, started (of the process: with the pid it names one process for good)
- step (the one it is working on, from 1) and phase (one of PHASES), since (Unix seconds at which it entered the phase)
- time (Unix seconds of this beat), count (beats so far), interval (seconds between two beats)
- error (why it ended; else null)

Clocks differ between machines: who watches from elsewhere asks `Watch`, which sees `count` change by its own clock. Nothing
here imports torch, and no disk that is full or gone ever disturbs the training.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from permafrost.launcher.files import write_atomically
from permafrost.launcher.machine import process

PHASES = ("start", "data", "backbone", "heads", "step", "checkpoint", "evaluate", "done", "lost", "failed")
"""In the order of a step. The last three are ends: done, to the last step or saved on a signal; lost, by the fault of
another rank; failed, by an error of its own."""

ENDS = ("done", "lost", "failed")

INTERVAL = 2.0
"""Seconds between two beats of a rank."""

MISSED = 3
"""Beats in a row that a rank must have missed to count as silent."""


@dataclass(frozen=True)
class Beat:
    """The last words of one rank, in the fields that this file begins with."""

    rank: int
    world_size: int
    host: str
    pid: int
    started: str
    step: int
    phase: str
    since: float
    time: float
    count: int = 0
    interval: float = INTERVAL
    error: str | None = None

    @property
    def progress(self) -> tuple[int, int]:
        """Return (step, number of the phase), which rises while a rank works."""
        return self.step, PHASES.index(self.phase)

    @property
    def has_ended(self) -> bool:
        """Return whether the rank said itself that it is over."""
        return self.phase in ENDS

    def silence(self, now: float) -> float:
        """Return the seconds since the last beat; of the writer's clock, which may differ from the reader's."""
        return max(0.0, now - self.time)

    def is_silent(self, now: float) -> bool:
        """Return whether it should have beaten several times since."""
        return self.silence(now) > MISSED * self.interval

    @property
    def is_running_here(self) -> bool:
        """Return whether its process is one of this machine that has not ended."""
        own = process(self.pid)
        return self.host == platform.node() and own.started == self.started and not own.has_ended

    def describe(self) -> str:
        """Return `rank 3 (pid 812 on node7)`."""
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


class Heartbeat:
    """Writes this rank's signs of life until it is closed."""

    def __init__(self, folder: Path, *, rank: int, world_size: int, interval: float = INTERVAL) -> None:
        """Begin to beat.

        Args:
            folder: heartbeats/ of the run folder; made where it is missing.
            rank: of this process.
            world_size: number of processes.
            interval: seconds between two beats.
        """
        self.folder = folder
        self._path = beat_path(folder, rank)
        self._count = 0
        pid, now = os.getpid(), time.time()
        self._beat = Beat(
            rank, world_size, platform.node(), pid, process(pid).started, 0, "start", now, now, interval=interval
        )
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        self._notice: tuple[float, Callable[[], object]] | None = None
        self._noticed: Beat | None = None
        self._at_each: list[Callable[[], object]] = []
        self._write()
        self._ended = threading.Event()
        # It holds no lock while it writes: data workers are forked at any moment.
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def beat(self) -> Beat:
        """Return what this rank says at present."""
        return self._beat

    def notice(self, after: float, call: Callable[[], object]) -> None:
        """Have `call()` run, in the thread of the heartbeat, once for each phase that lasts `after` seconds."""
        self._notice = (after, call)

    def at_each_beat(self, call: Callable[[], object]) -> None:
        """Have `call()` run, in the thread of the heartbeat, after each beat."""
        self._at_each.append(call)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Say what this rank does from now on. Nothing is written here: it may be called at every turn.

        Args:
            phase: one of PHASES.
            step: the step it works on, from 1; None leaves it.
        """
        step = self._beat.step if step is None else step
        self._beat = replace(self._beat, phase=phase, step=step, since=time.time())

    def close(self, phase: str = "done", error: str | None = None) -> None:
        """Say how this rank ended, and beat no more. Only the first call counts.

        Args:
            phase: one of ENDS.
            error: why, unless it is done.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._beat = replace(self._beat, phase=phase, since=time.time(), error=error)
        self._write()

    def _run(self) -> None:
        while not self._ended.wait(self._beat.interval):
            self._write()
            beat = self._beat
            if self._notice and beat is not self._noticed and time.time() - beat.since >= self._notice[0]:
                self._noticed = beat
                self._notice[1]()
            for call in self._at_each:
                call()

    def _write(self) -> None:
        self._count += 1
        content = asdict(replace(self._beat, time=time.time(), count=self._count))
        try:
            # After a power failure nobody is alive.
            write_atomically(self._path, json.dumps(content), durable=False)
        except OSError:
            # A full disk takes no file, but a file's time.
            with contextlib.suppress(OSError):
                os.utime(self._path)


def beat_path(folder: Path, rank: int) -> Path:
    """Return the file of one rank."""
    return folder / f"rank_{rank:05d}.json"


def read_beats(folder: Path) -> list[Beat]:
    """Return what every rank said last, in rank order. Files that are damaged or of ranks beyond the world are passed over."""
    beats = []
    for path in sorted(folder.glob("rank_*.json")):
        try:
            beat = Beat(**json.loads(path.read_bytes()))
            touched = path.stat().st_mtime
        except (OSError, ValueError, TypeError):
            continue
        if beat.phase in PHASES:
            beats.append(replace(beat, time=max(beat.time, touched)))
    # An earlier start of the run may have had more ranks: the size of the world is what the newest beat says.
    world_size = max(beats, key=lambda beat: beat.time).world_size if beats else 0
    return [beat for beat in beats if beat.rank < world_size]


@dataclass(frozen=True)
class Culprit:
    """A rank that keeps the others waiting, and why it is thought to.

    Attributes:
        beat: what it said last; None if it never said anything.
        rank: its number.
        reason: in words, to come after its name.
        is_guess: nothing is wrong with it, except that it is behind.
    """

    rank: int
    beat: Beat | None
    reason: str
    is_guess: bool = False

    def __str__(self) -> str:
        return f"{self.beat.describe() if self.beat else f'rank {self.rank}'} {self.reason}"


def find_culprits(
    beats: Sequence[Beat], world_size: int, *, exclude: int | None = None, now: float | None = None
) -> list[Culprit]:
    """Return the ranks that the others wait for, the likeliest kind of reason only.

    In this order: ranks that failed by an error of their own; whose process is gone or stopped; that are silent; that
    never beat at all; else the one furthest behind (of several, the one longest in its phase).

    Args:
        beats: of `read_beats`.
        world_size: number of ranks.
        exclude: the rank that asks, which knows that it waits.
        now: Unix seconds; None is now.
    """
    now = time.time() if now is None else now
    candidates = [beat for beat in beats if beat.rank != exclude]
    failed = [Culprit(b.rank, b, f"failed: {b.error}") for b in candidates if b.phase == "failed"]
    if failed:
        return failed
    alive = [beat for beat in candidates if not beat.has_ended]
    for fault_of in (_process_fault, lambda beat: _silence(beat, now)):
        faults = [
            Culprit(beat.rank, beat, f"{fault}; last heard in phase {beat.phase} of step {beat.step}")
            for beat in alive
            if (fault := fault_of(beat))
        ]
        if faults:
            return faults
    missing = sorted(set(range(world_size)) - {beat.rank for beat in beats} - {exclude})
    if missing:
        return [Culprit(rank, None, "has given no sign of life at all") for rank in missing]
    if not alive:
        return [Culprit(b.rank, b, f"gave up: {b.error}") for b in candidates if b.phase == "lost"]
    last = min(alive, key=lambda beat: (beat.progress, beat.since))
    reason = f"is furthest behind, in phase {last.phase} of step {last.step} for {max(0.0, now - last.since):.0f} s"
    return [Culprit(last.rank, last, reason, is_guess=True)]


def kill_culprits(culprits: Sequence[Culprit]) -> list[Culprit]:
    """Kill those that started on this machine as siblings of this process: a launcher's SIGTERM ends no rank that is stuck.

    Returns:
        the ones that were killed.
    """
    killed = []
    for culprit in culprits:
        beat = culprit.beat
        if beat is None or beat.pid == os.getpid() or beat.host != platform.node():
            continue
        # The start time tells the process from a later one with its number; the parent, from a foreign one.
        own = process(beat.pid)
        if own.started != beat.started or own.parent != os.getppid():
            continue
        with contextlib.suppress(OSError):
            os.kill(beat.pid, signal.SIGKILL)
            killed.append(culprit)
    return killed


class Watch:
    """Watches the silence of each rank, by this process's clock alone: from the first `poll` that saw its last beat."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[int, tuple[tuple[str, int, int, float], float]] = {}

    def poll(self, now: float | None = None) -> dict[int, tuple[Beat, float]]:
        """Read all files: {rank: (what it said last, seconds since that was first seen here)}.

        Args:
            now: of a steady clock; None is time.monotonic().
        """
        now = time.monotonic() if now is None else now
        found = {}
        for beat in read_beats(self.folder):
            mark = (beat.host, beat.pid, beat.count, beat.time)
            if self._seen.get(beat.rank, (None, 0.0))[0] != mark:
                self._seen[beat.rank] = (mark, now)
            found[beat.rank] = (beat, now - self._seen[beat.rank][1])
        return found

    def beats(self) -> list[Beat]:
        """Return what every rank said last, in rank order, with times by this machine's clock, for `find_culprits`.

        Where another machine's clock is behind by more than a few beats, all of its ranks would look silent else.
        """
        now = time.time()
        return [
            replace(beat, time=now - silence, since=now - silence - (beat.time - beat.since))
            for beat, silence in self.poll().values()
        ]


def _process_fault(beat: Beat) -> str:
    """Return what this machine's kernel says of a rank; "" when it runs, or is elsewhere."""
    if beat.host != platform.node():
        return ""
    own = process(beat.pid)
    if own.started != beat.started or own.has_ended:
        return "is gone (its process has ended without a word: killed, or out of memory)"
    if own.is_stopped:
        return "is stopped (by SIGSTOP or a debugger)"
    return ""


def _silence(beat: Beat, now: float) -> str:
    return f"has given no sign of life for {beat.silence(now):.0f} s" if beat.is_silent(now) else ""
