"""Display a run at work: metrics.jsonl and TensorBoard in its folder, and a live or plain progress line.

Only the main rank's monitor writes or prints; the others' methods return at once. A full disk never ends a training:
one warning says what is no longer recorded.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.launcher.files import read_json_lines, write_atomically

if TYPE_CHECKING:
    import numpy as np
    from rich.progress import Progress

    from permafrost.launcher.run.folder import RunFolder

# Steps whose durations the remaining time is estimated from.
ETA_WINDOW = 50
# The live line is drawn at most this often, seconds.
REFRESH = 0.2


class Monitor:
    """Records and shows one run.

    Use it as a context manager, or call `close`, so that a live line is finished whatever happens.
    """

    def __init__(
        self, run_folder: RunFolder, *, num_steps: int, is_main: bool, start_step: int = 0, log_every: int = 1
    ) -> None:
        """Open what the run is recorded in.

        Args:
            run_folder: where metrics.jsonl and tensorboard/ are.
            num_steps: of the whole run.
            is_main: whether this process is the one that records and speaks.
            start_step: steps done before this start; what is recorded of later ones is dropped, since they come again.
            log_every: without a terminal, `progress` prints the first step, the last, and the multiples of this.
        """
        self.num_steps = num_steps
        self.is_main = is_main
        self.log_every = log_every
        self._start_step = start_step
        self._eta = Eta(num_steps)
        self._live: Progress | None = None
        self._live_refreshed = 0.0
        self._printed_progress = False
        self._metrics = JsonLines(run_folder.metrics)
        self._tensorboard = run_folder.tensorboard
        self._events: EventFile | None = None
        self._lost: set[str] = set()
        if is_main:
            self._keep("metrics.jsonl", lambda: self._metrics.drop_after(start_step))

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers after `step` steps, in its line of metrics.jsonl (null if not finite) and TensorBoard."""
        if not self.is_main or not values:
            return
        numbers = {tag: float(value) for tag, value in values.items()}
        line = {tag: value if math.isfinite(value) else None for tag, value in numbers.items()}
        self._keep("metrics.jsonl", lambda: self._metrics.record(step, line))
        self._keep("TensorBoard", lambda: self._open_events().scalars(step, numbers))

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """Record a picture in TensorBoard; `image` is (H, W, 3) uint8."""
        if self.is_main:
            self._keep("TensorBoard", lambda: self._open_events().image(step, tag, image))

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Record a text in TensorBoard, which shows it as Markdown."""
        if self.is_main:
            self._keep("TensorBoard", lambda: self._open_events().text(step, tag, text))

    def progress(self, step: int, values: Mapping[str, float], *, note: str = "") -> None:
        """Show where the run stands after `step` steps.

        Args:
            step: steps done.
            values: losses and the like, shown with four digits.
            note: a few words behind them.
        """
        if not self.is_main:
            return
        remaining = self._eta.update(step)
        shown = "  ".join([*(f"{name} {value:.4g}" for name, value in values.items()), *([note] if note else [])])
        if _is_terminal():
            self._show_live(step, shown, remaining)
        elif not self._printed_progress or step % self.log_every == 0 or step >= self.num_steps:
            self._printed_progress = True
            left = "" if remaining is None or step >= self.num_steps else f"  {format_duration(remaining)} left"
            print(f"step {step}/{self.num_steps}  {shown}{left}", flush=True)

    def say(self, text: str) -> None:
        """Print a line, above the live one where there is one."""
        if not self.is_main:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print `warning: ...`, on stderr where there is no live line."""
        if not self.is_main:
            return
        if self._live is not None:
            self.say(f"warning: {text}")
        else:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Finish the live line and close the files. A closed monitor may still `say`."""
        if self._live is not None:
            self._live.refresh()
            self._live.stop()
            self._live = None
        if self._events is not None:
            events, self._events = self._events, None
            self._keep("TensorBoard", events.close)

    def _keep(self, what: str, write: Any) -> None:
        """Run a write; the first failure of each kind is a warning, later ones are silent. TensorBoard ends there."""
        if what == "TensorBoard" and what in self._lost:
            return
        try:
            write()
        except OSError as error:
            if what not in self._lost:
                self._lost.add(what)
                later = (
                    "each later line is tried again"
                    if what == "metrics.jsonl"
                    else "it stays as it is until the run is resumed"
                )
                self.warn(f"{what} could not be written ({error.strerror or error}): training goes on, {later}")
            if what == "TensorBoard" and self._events is not None:
                events, self._events = self._events, None
                with contextlib.suppress(OSError):
                    events.close()

    def _open_events(self) -> EventFile:
        if self._events is None:
            self._events = EventFile(self._tensorboard, first_step=self._start_step + 1)
        return self._events

    def _show_live(self, step: int, shown: str, remaining: float | None) -> None:
        if self._live is None:
            self._live = _live_line(self.num_steps)
            self._live.start()
        left = "" if remaining is None else format_duration(remaining) + " left"
        (task,) = self._live.task_ids
        self._live.update(task, completed=step, shown=shown, left=left)
        now = time.monotonic()
        if now - self._live_refreshed >= REFRESH or step >= self.num_steps:
            self._live.refresh()
            self._live_refreshed = now


class Eta:
    """Remaining seconds, by the median duration of recent steps: an evaluation in between is no slowness."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self._durations: deque[float] = deque(maxlen=ETA_WINDOW)
        self._last: tuple[int, float] | None = None

    def update(self, step: int, now: float | None = None) -> float | None:
        """Return the seconds left when `step` steps are done `now` (any steady clock); None until two calls have shown a pace."""
        now = time.monotonic() if now is None else now
        if self._last is not None and step > self._last[0]:
            self._durations.append((now - self._last[1]) / (step - self._last[0]))
        if self._last is None or step != self._last[0]:
            self._last = (step, now)
        if not self._durations:
            return None
        return statistics.median(self._durations) * max(0, self.num_steps - step)


class JsonLines:
    """A file of JSON objects, one line per step, handed to the system when `record` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Where the last line begins, and what it says.
        self._last: tuple[int, dict[str, Any]] | None = None

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a step's line, or add values to it while it is the last one.

        Raises:
            OSError: the disk is full or the like. The next line starts where this one should have.
        """
        mode = "r+b" if self.path.exists() else "w+b"
        with self.path.open(mode, buffering=0) as file:
            if self._last is None:
                self._last = (file.seek(0, os.SEEK_END), {})
            start, content = self._last
            if content.get("step") == step:
                content = {**content, **values}
            else:
                start += len(_encode(content)) if content else 0
                content = {"step": step, **values}
            line = _encode(content)
            # Until it is written whole, the line does not count: whatever a full disk leaves of it is written over.
            self._last = (start, {})
            file.seek(start)
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.truncate()
            self._last = (start, content)

    def drop_after(self, step: int) -> None:
        """Remove the lines of later steps, and what is no JSON (the end of a killed run); call it before the first `record`."""
        if self.path.is_file():
            kept = [line for line in read_json_lines(self.path) if line.get("step", 0) <= step]
            write_atomically(self.path, b"".join(map(_encode, kept)).decode())
            if kept:
                self._last = (self.path.stat().st_size - len(_encode(kept[-1])), kept[-1])


class EventFile:
    """A TensorBoard event file written in the calling thread.

    torch's SummaryWriter hands events to a thread of its own, whose death on a full disk prints a traceback and whose
    error reaches the training loop at some later call; here an error belongs to the call that met it, and a killed run
    loses no event.
    """

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        """Open the file.

        Args:
            folder: made if it is missing.
            first_step: TensorBoard hides what earlier files of the folder say of this step and later ones.

        Raises:
            OSError: the file cannot be written.
        """
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._new_event = event_pb2.Event
        folder.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a record is with the system when it has been written.
        self._file = self.new_path(folder).open("wb", buffering=0)
        self._records = RecordWriter(self._file)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        try:
            self._write(event_pb2.Event(step=first_step, file_version="brain.Event:2"))
            self._write(event_pb2.Event(step=first_step, session_log=start))
        except OSError:
            self._file.close()
            raise

    @staticmethod
    def new_path(folder: Path) -> Path:
        """Return a name that TensorBoard takes for an event file, later in its order than those of earlier starts."""
        return folder / f"events.out.tfevents.{time.time():017.6f}.{platform.node()}.{os.getpid()}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers."""
        from torch.utils.tensorboard import summary

        for tag, value in values.items():
            self._write_summary(step, summary.scalar(tag, value))

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """Write a picture, (H, W, 3) uint8."""
        from torch.utils.tensorboard import summary

        self._write_summary(step, summary.image(tag, image, dataformats="HWC"))

    def text(self, step: int, tag: str, text: str) -> None:
        """Write a Markdown text."""
        from torch.utils.tensorboard import summary

        self._write_summary(step, summary.text(tag, text))

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _write_summary(self, step: int, content: Any) -> None:
        self._write(self._new_event(step=step, summary=content))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def format_duration(seconds: float) -> str:
    """Return a few words for a number of seconds: "40 s", "12 min", "3 h 05 min", "2 d 4 h"."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def _encode(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()


def _is_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _live_line(num_steps: int) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    line = Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=16),
        # One line whatever the terminal's width: what does not fit is in metrics.jsonl.
        TextColumn(
            "{task.fields[shown]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
        ),
        TextColumn("{task.fields[left]}", style="cyan", table_column=Column(no_wrap=True, justify="right")),
        expand=True,
        # No thread of its own: data workers are forked, and a lock that the thread holds at that moment would never
        # open in them.
        auto_refresh=False,
    )
    line.add_task("", total=num_steps, shown="", left="")
    return line
