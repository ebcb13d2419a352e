"""Heartbeats: what a rank writes, what survives a full disk, and whom the reader takes for stuck."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from permafrost import _files
from permafrost.launcher.machine import process
from permafrost.launcher.ranks.heartbeat import (
    Beat,
    Culprit,
    Heartbeat,
    Watch,
    beat_path,
    find_culprits,
    kill_culprits,
    read_beats,
)

NOW = 1_000_000.0


def beat(rank: int, step: int = 5, phase: str = "heads", *, age: float = 0.5, since: float = 3.0, **fields) -> Beat:
    """A rank of another machine, of which only the file is known."""
    defaults = {"world_size": 3, "host": "elsewhere", "pid": 100 + rank, "started": "1", "count": 7}
    return Beat(rank=rank, step=step, phase=phase, time=NOW - age, since=NOW - since, **{**defaults, **fields})


def culprits(*beats: Beat, **fields) -> list[str]:
    return [str(culprit) for culprit in find_culprits(beats, 3, now=NOW, **fields)]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_a_rank_beats_without_being_called(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "heartbeats", rank=3, world_size=4, interval=0.05)
    heartbeat.enter("data", 7)
    heartbeat.enter("backbone")
    path = tmp_path / "heartbeats/rank_00003.json"
    limit = time.monotonic() + 10
    while json.loads(path.read_text())["count"] < 4 and time.monotonic() < limit:
        time.sleep(0.01)
    content = json.loads(path.read_text())
    assert content["count"] >= 4
    assert content["time"] == pytest.approx(time.time(), abs=2)
    expected = {"rank": 3, "world_size": 4, "step": 7, "phase": "backbone", "pid": os.getpid(), "host": platform.node()}
    assert {name: content[name] for name in expected} == expected
    assert content["started"] == process(os.getpid()).started != ""
    heartbeat.close("lost", "rank 1 is gone")
    heartbeat.close()
    (last,) = read_beats(tmp_path / "heartbeats")
    assert (last.phase, last.error, last.step) == ("lost", "rank 1 is gone", 7)
    time.sleep(0.15)
    assert read_beats(tmp_path / "heartbeats") == [last]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_entering_a_phase_costs_next_to_nothing(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, rank=0, world_size=1)
    start = time.perf_counter()
    for step in range(1000):
        heartbeat.enter("data", step)
    assert (time.perf_counter() - start) / 1000 < 1e-3
    heartbeat.close()


@pytest.mark.parametrize("place", ["file/heartbeats", "gone"])
def test_where_nothing_can_be_written_nothing_happens(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    heartbeat = Heartbeat(tmp_path / place, rank=0, world_size=1, interval=0.01)
    if place == "gone":
        beat_path(tmp_path / place, 0).unlink()
        (tmp_path / place).rmdir()
    heartbeat.enter("data", 1)
    time.sleep(0.05)
    assert heartbeat._thread.is_alive()
    heartbeat.close()
    assert read_beats(tmp_path / place) == []


def test_a_full_disk_does_not_look_like_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = Heartbeat(tmp_path, rank=0, world_size=1, interval=0.02)
    watch = Watch(tmp_path)
    watch.poll()

    def full(*arguments: object, **fields: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_files, "new_beside", full)
    time.sleep(0.1)
    before = beat_path(tmp_path, 0).read_bytes()
    watch.poll()
    time.sleep(1.0)
    assert beat_path(tmp_path, 0).read_bytes() == before
    assert watch.poll()[0][1] == 0.0
    (found,) = read_beats(tmp_path)
    assert not found.is_silent(time.time())
    heartbeat.close()


def test_a_phase_that_lasts_is_noticed_once(tmp_path: Path) -> None:
    calls = []
    heartbeat = Heartbeat(tmp_path, rank=0, world_size=1, interval=0.01)
    heartbeat.notice(0.05, lambda: calls.append(heartbeat.beat.phase))
    heartbeat.enter("data", 1)
    time.sleep(0.2)
    assert calls == ["data"]
    heartbeat.enter("heads")
    time.sleep(0.2)
    assert calls == ["data", "heads"]
    heartbeat.close()


def test_damaged_and_outdated_files_are_passed_over(tmp_path: Path) -> None:
    def write(beat: Beat) -> None:
        beat_path(tmp_path, beat.rank).write_text(json.dumps(dataclasses.asdict(beat)))
        os.utime(beat_path(tmp_path, beat.rank), (beat.time, beat.time))

    write(beat(0, world_size=2))
    write(beat(1, world_size=2))
    write(beat(2, world_size=4, age=900))  # of an earlier start, on more ranks
    assert [found.rank for found in read_beats(tmp_path)] == [0, 1]
    for text in ("", "{", "[]", '{"rank": 1}', json.dumps({**dataclasses.asdict(beat(1)), "phase": "sleeping"})):
        beat_path(tmp_path, 1).write_text(text)
        assert [found.rank for found in read_beats(tmp_path)] == [0]
    assert read_beats(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        pytest.param(
            [beat(0), beat(1, phase="data", since=31.0), beat(2)],
            ["rank 1 (pid 101 on elsewhere) is furthest behind, in phase data of step 5 for 31 s"],
            id="behind by a phase",
        ),
        pytest.param(
            [beat(0, step=6, phase="data"), beat(1, step=6, phase="data"), beat(2, phase="step")],
            ["rank 2 (pid 102 on elsewhere) is furthest behind, in phase step of step 5 for 3 s"],
            id="behind by a step",
        ),
        pytest.param(
            [beat(0), beat(1), beat(2, since=9.0)],
            ["rank 2 (pid 102 on elsewhere) is furthest behind, in phase heads of step 5 for 9 s"],
            id="longest in the phase",
        ),
        pytest.param(
            [beat(0, phase="data"), beat(1, age=16.0), beat(2)],
            ["rank 1 (pid 101 on elsewhere) has given no sign of life for 16 s; last heard in phase heads of step 5"],
            id="silent, though another is behind",
        ),
        pytest.param(
            [beat(0), beat(1, age=16.0), beat(2, phase="failed", error="KeyError: 'x'")],
            ["rank 2 (pid 102 on elsewhere) failed: KeyError: 'x'"],
            id="failed",
        ),
        pytest.param([beat(0), beat(2)], ["rank 1 has given no sign of life at all"], id="never there"),
        pytest.param(
            [beat(0), beat(1, phase="lost", error="no answer"), beat(2, phase="done")],
            ["rank 1 (pid 101 on elsewhere) gave up: no answer"],
            id="only echoes",
        ),
        pytest.param(
            [beat(0), beat(1, phase="lost", error="no answer"), beat(2, phase="data")],
            ["rank 2 (pid 102 on elsewhere) is furthest behind, in phase data of step 5 for 3 s"],
            id="not the echo",
        ),
    ],
)
def test_the_stuck_rank_is_found(beats: list[Beat], expected: list[str]) -> None:
    assert culprits(*beats, exclude=0) == expected


def test_the_kernel_knows_what_became_of_a_process(sleeper: subprocess.Popen) -> None:
    here = {"host": platform.node(), "pid": sleeper.pid, "started": process(sleeper.pid).started}
    running = beat(1, **here)
    assert culprits(beat(0, phase="data"), running, beat(2)) == culprits(beat(0, phase="data"), beat(2), running)
    sleeper.send_signal(signal.SIGSTOP)
    limit = time.monotonic() + 10
    while "is stopped" not in str(culprits(beat(0), running, beat(2))) and time.monotonic() < limit:
        time.sleep(0.01)
    (text,) = culprits(beat(0), running, beat(2))
    assert "is stopped (by SIGSTOP or a debugger); last heard in phase heads of step 5" in text
    (text,) = culprits(beat(0), dataclasses.replace(running, started="1"), beat(2))
    assert "is gone" in text  # its number belongs to a later process now
    sleeper.kill()
    sleeper.wait()
    (text,) = culprits(beat(0), running, beat(2))
    assert "is gone" in text


def test_only_siblings_on_this_machine_are_killed(sleeper: subprocess.Popen) -> None:
    code = (
        "import subprocess, sys; "
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=subprocess.DEVNULL).pid)"
    )
    orphan = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60).stdout)
    own = {"host": platform.node(), "pid": sleeper.pid, "started": process(sleeper.pid).started}
    foreign = {**own, "pid": orphan, "started": process(orphan).started}
    spared = [
        beat(1, **{**own, "host": "elsewhere"}),
        beat(1, **{**own, "started": "1"}),
        beat(1, **foreign),  # another parent's
        beat(1, **own),  # a child of this process, not a sibling
        beat(1, host=platform.node(), pid=os.getpid(), started=process(os.getpid()).started),
    ]
    try:
        assert kill_culprits([Culprit(1, one, "is stuck") for one in spared] + [Culprit(2, None, "is missing")]) == []
        assert sleeper.poll() is None
        # In a child, the sleeper is a sibling.
        script = (
            "import json, sys; from permafrost.launcher.ranks.heartbeat import *; "
            "b = Beat(**json.loads(sys.argv[1])); print(len(kill_culprits([Culprit(1, b, 'is stuck')])))"
        )
        command = [sys.executable, "-c", script, json.dumps(dataclasses.asdict(beat(1, **own)))]
        assert subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60).stdout == "1\n"
        assert sleeper.wait(10) == -signal.SIGKILL
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_watch_goes_by_its_own_clock(tmp_path: Path) -> None:
    def write(count: int) -> None:
        # The writer's clock is an hour wrong.
        beat_path(tmp_path, 0).write_text(json.dumps(dataclasses.asdict(beat(0, world_size=1, age=3600, count=count))))

    watch = Watch(tmp_path)
    assert watch.poll(0.0) == {}
    write(1)
    assert watch.poll(10.0)[0][1] == 0.0
    assert watch.poll(25.0)[0][1] == 15.0
    write(2)
    assert watch.poll(30.0)[0][1] == 0.0
    assert watch.poll(31.0)[0][0].count == 2


def test_another_clock_makes_nobody_look_silent(tmp_path: Path) -> None:
    """A machine whose clock is a minute behind: its ranks beat, and of them only the one that really is silent is named."""
    watch, begun = Watch(tmp_path), time.time() - 60

    def write(rank: int, count: int) -> None:
        content = dataclasses.asdict(beat(rank, count=count, interval=0.05))
        beat_path(tmp_path, rank).write_text(json.dumps({**content, "time": begun, "since": begun - 3}))
        os.utime(beat_path(tmp_path, rank), (begun, begun))

    for rank in range(3):
        write(rank, 1)
    assert [culprit.rank for culprit in find_culprits(read_beats(tmp_path), 3)] == [0, 1, 2]
    (found,) = find_culprits(watch.beats(), 3)
    assert found.is_guess
    assert str(found) == "rank 0 (pid 100 on elsewhere) is furthest behind, in phase heads of step 5 for 3 s"
    time.sleep(0.3)
    for rank in (0, 1):
        write(rank, 2)
    (found,) = find_culprits(watch.beats(), 3)
    assert found.rank == 2
    assert "has given no sign of life for" in found.reason


def test_it_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, permafrost.launcher.ranks.heartbeat; assert not {'torch', 'numpy'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
