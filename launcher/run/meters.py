"""Measure, between two log lines, losses, memory, and where the time went."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


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
        """Return the state for JSON, which keeps every bit of a float."""
        return {tag: list(entry) for tag, entry in self._sums.items()}

    def means(self) -> dict[str, float]:
        """Return the means so far."""
        return {tag: total / count for tag, (total, count) in self._sums.items()}

    def take(self) -> dict[str, float]:
        """Return the means, leaving an empty window."""
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
        """Leave what happens inside (an evaluation, a checkpoint) out of a step's time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - start

    def count_step(self) -> None:
        """Count one more step in the interval."""
        self._num_steps += 1

    def take(self, global_batch: int) -> dict[str, float]:
        """Return the images per second, seconds per step, whole and by part, since the last call; the interval begins anew."""
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


class CommunicationMeter:
    """Seconds of a step in which collectives run: gradients, ZeRO's parts, tensor groups, counts, whoever started them.

    Torch's profiler sees them all, also those that DDP starts from C++; it is on for one step now and then. Waiting for a slower
    rank is in it, and so is what overlaps with computing: the time is a part of the others, not beside them.
    """

    def __init__(self, world_size: int, device: torch.device, every: int) -> None:
        """Set up the meter.

        Args:
            world_size: one rank has nothing to measure.
            device: of the run.
            every: steps from one measured step to the next. The second step is the first one: the first sets up.
        """
        self._every = every
        self._is_on = world_size > 1
        self._on_cuda = device.type == "cuda"
        self._wait = 1
        self._seconds: float | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Enclose everything that ranks do together in a step, and measure it where it is due."""
        is_due, self._wait = self._is_on and self._wait == 0, (self._wait or self._every) - 1
        if not is_due:
            yield
            return
        # Else it prints lines of its own at each start and end, an "ERROR" among them where there is no GPU.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])]
        profiler = profile(activities=activities)
        try:
            profiler.start()
        except RuntimeError:
            # Somebody else profiles this process.
            self._is_on = False
            yield
            return
        try:
            yield
        finally:
            profiler.stop()
        assert profiler.profiler is not None
        assert profiler.profiler.kineto_results is not None
        events = profiler.profiler.kineto_results.events()
        self._seconds = _covered(
            [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if self._is_collective(e)]
        )

    def take(self) -> dict[str, float]:
        """Return what was measured since the last call, if anything."""
        seconds, self._seconds = self._seconds, None
        return {} if seconds is None else {"time/communication": seconds}

    def _is_collective(self, event: Any) -> bool:
        name = event.name()
        if name.startswith("gloo:"):
            return True
        # Of NCCL's the kernels, not their launches.
        return self._on_cuda and "nccl" in name.lower() and event.device_type() == torch.autograd.DeviceType.CUDA


def _covered(intervals: list[tuple[int, int]]) -> float:
    """Return the seconds that are in at least one of some intervals of nanoseconds."""
    total, end = 0, 0
    for start, stop in sorted(intervals):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e9


def memory_peaks(device: torch.device) -> dict[str, float]:
    """Return the peak memory of this process so far in GiB: resident in the host, and allocated on a CUDA device."""
    peaks = {"memory/host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        peaks["memory/device_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return peaks
