"""What is measured between two log lines: losses, where the time went, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class Window:
    """Means of named values over the steps since the last log line.

    Its state goes into checkpoints, so that a resumed run's first line covers the same steps as an uninterrupted one's.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._sums: dict[str, list[float]] = {tag: list(entry) for tag, entry in (state or {}).items()}

    def add(self, values: Mapping[str, float]) -> None:
        """Take one step's values in; a tag need not come every step."""
        for tag, value in values.items():
            entry = self._sums.setdefault(tag, [0.0, 0.0])
            entry[0] += value
            entry[1] += 1.0

    def state(self) -> dict[str, list[float]]:
        """For JSON, which keeps every bit of a float."""
        return {tag: list(entry) for tag, entry in self._sums.items()}

    def means(self) -> dict[str, float]:
        """The means so far."""
        return {tag: total / count for tag, (total, count) in self._sums.items()}

    def take(self) -> dict[str, float]:
        """The means, leaving an empty window."""
        means, self._sums = self.means(), {}
        return means


class Stopwatch:
    """Seconds spent in named parts of a step.

    On CUDA a part is timed by events on its stream, without waiting for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._started = time.perf_counter()
        self._num_steps = 0

    @contextmanager
    def host(self, part: str) -> Iterator[None]:
        """Time that this process spends, such as waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    @contextmanager
    def device(self, part: str) -> Iterator[None]:
        """Time that the device spends on what is launched inside."""
        if not self._on_cuda:
            with self.host(part):
                yield
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        try:
            yield
        finally:
            end.record()
            self._events.append((part, start, end))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (an evaluation, a checkpoint) is no part of a step's time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - start

    def count_step(self) -> None:
        """One more step lies in the interval."""
        self._num_steps += 1

    def take(self, global_batch: int) -> dict[str, float]:
        """Images per second, seconds per step, whole and by part, since the last call; the interval begins anew."""
        self._collect()
        now = time.perf_counter()
        elapsed, num_steps, seconds = now - self._started, self._num_steps, self._seconds
        self._started, self._num_steps, self._seconds = now, 0, {}
        if not num_steps:
            return {}
        return {
            "speed/images_per_second": num_steps * global_batch / elapsed,
            "time/step": elapsed / num_steps,
            **{f"time/{part}": spent / num_steps for part, spent in seconds.items()},
        }

    def _collect(self) -> None:
        if self._events:
            self._events[-1][2].synchronize()
        for part, start, end in self._events:
            self._seconds[part] = self._seconds.get(part, 0.0) + start.elapsed_time(end) / 1000
        self._events = []


def memory_peaks(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far in GiB: resident in the host, and allocated on a CUDA device."""
    peaks = {"memory/host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        peaks["memory/device_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return peaks
