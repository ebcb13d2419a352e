"""Plan a head's training step by running it on made-up images.

A head's shapes depend on its data (how many proposals are left, how many are positive), so it is built and run for real
on the CPU, forward and backward, under a trace that does not compute what is expensive. Where that would still take too
much memory or time, smaller runs are extrapolated: all quantities are close to bilinear in images and pixels. Clips are small, and
attention over all of one grows with the square of its size: of those only fewer are run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from permafrost.heads.base import Head
from permafrost.launcher.experiment import OffloadMode
from permafrost.launcher.plan.batches import PlannedData
from permafrost.launcher.plan.trace import Trace
from permafrost.launcher.run.offload import ActivationOffload, HostBuffers
from permafrost.model.spec import FeatureSpec

MAX_PIXELS = 1 << 20
"""Images times pixels up to which a head is run at its true size."""
SMALL_SIDES = (512, 768)
SMALL_BATCHES = (1, 2)


@dataclass(frozen=True)
class HeadPlan:
    """One head over one micro-batch.

    Attributes:
        numels: elements of each parameter, in the order in which the backward gives their gradients.
        saved_bytes: what the forward leaves for the backward; the feature maps not among it.
        forward_peak: most that the forward holds, feature maps and parameters aside.
        backward_peaks: the same of the backward, up to each parameter's gradient, that one included and the ones before
            it not; and after the last one.
        host_bytes: of buffers in host memory.
        forward_flops: of a forward.
        flops: of a forward and a backward.
        is_extrapolated: whether this was estimated from smaller runs.
    """

    numels: tuple[int, ...]
    saved_bytes: int
    forward_peak: int
    backward_peaks: tuple[int, ...]
    host_bytes: int
    forward_flops: int
    flops: int
    is_extrapolated: bool = False


@dataclass(frozen=True)
class HeadRun:
    """Run of a head, but for the number of images and their size.

    Attributes:
        head: in training mode, on the CPU; its values do not matter.
        spec: of the backbone that feeds it.
        map_dtype: of the feature maps.
        precision: "float32" or "bfloat16", of the autocast.
        data: what it learns from.
        offload: what leaves for host memory.
        device_type: "cuda" or "cpu", where it will run.
        trains_features: whether the feature maps get a gradient too.
    """

    head: Head
    spec: FeatureSpec
    map_dtype: torch.dtype
    precision: str
    data: PlannedData
    offload: OffloadMode
    device_type: str = "cuda"
    trains_features: bool = False


def plan_head(run: HeadRun, *, batch: int, side: int) -> HeadPlan:
    """Plan a head for a micro-batch of squares of this many pixels a side: images, or the frames of clips."""
    clips = run.data.maps is not None
    sides = (side, side) if clips else SMALL_SIDES
    if batch * (run.data.maps or 1) * side * side <= MAX_PIXELS or (clips and batch <= SMALL_BATCHES[-1]):
        return _run_head(run, batch, side)
    found = {(samples, small): _run_head(run, samples, small) for samples in SMALL_BATCHES for small in set(sides)}
    ordered = [found[samples, small] for samples in SMALL_BATCHES for small in sides]
    low, high = SMALL_BATCHES
    share = (batch - low) / (high - low)
    near, far = (small * small for small in sides)
    # Not below the smaller runs: what does not grow with the image keeps its value.
    reach = 0.0 if clips else max(0.0, (side * side - near) / (far - near))

    def blend(values: Sequence[int]) -> int:
        a, b, c, d = values
        return max(0, round((1 - share) * ((1 - reach) * a + reach * b) + share * ((1 - reach) * c + reach * d)))

    first = ordered[0]
    numbers = {
        name: blend([getattr(corner, name) for corner in ordered])
        for name in ("saved_bytes", "forward_peak", "host_bytes", "forward_flops", "flops")
    }
    peaks = zip(*(corner.backward_peaks for corner in ordered), strict=True)
    return HeadPlan(
        numels=first.numels, backward_peaks=tuple(blend(values) for values in peaks), is_extrapolated=True, **numbers
    )


class _PlannedBuffers(HostBuffers):
    """Host memory that is only counted: buffers on the meta device, to and from which nothing is copied."""

    def _allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="meta")

    def _make_room(self, size: int) -> None:
        pass  # of one step nothing is idle


def _run_head(run: HeadRun, batch_size: int, side: int) -> HeadPlan:
    """Run one forward and backward, as train.py's head_losses does them."""
    head = run.head
    batch, lead = run.data.batch(batch_size, side), run.data.lead(batch_size)
    maps = [
        torch.zeros(math.prod(lead), channels, -(-side // stride), -(-side // stride), dtype=run.map_dtype)
        .contiguous(memory_format=torch.channels_last)
        .unflatten(0, lead)
        .requires_grad_(run.trains_features)
        for channels, stride in zip(run.spec.channels, run.spec.strides)
    ]
    trace = Trace("cpu", dry=True)
    tensors = [value for target in batch.targets for value in vars(target).values() if isinstance(value, Tensor)]
    trace.watch([*head.parameters(), *head.buffers(), *maps, *tensors, batch.images])

    numels: list[int] = []
    peaks: list[int] = []

    def on_gradient(parameter: torch.nn.Parameter) -> None:
        peaks.append(trace.take_peak())
        numels.append(parameter.numel())
        # What engines do with it is theirs; here it leaves at once.
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(on_gradient) for parameter in head.parameters()]
    offload = ActivationOffload(run.offload, torch.device("cpu"))
    offload.buffers = _PlannedBuffers(pinned=run.device_type == "cuda")
    try:
        with trace:
            backbone: Any = _MapsOf(maps)
            kept = offload.forward(backbone, batch.images)
            del backbone
            trace.take_peak()
            taken = kept.take()
            autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=run.precision == "bfloat16")
            with head.kernels_of(run.device_type):
                with offload.saving(head, kept, taken), autocast:
                    losses = head(taken, batch, _own_counts)
                del taken
                saved, forward_peak, forward_flops = trace.live, trace.take_peak(), trace.flops
                torch.stack(list(losses.values())).sum().backward()
            peaks.append(trace.take_peak())
    finally:
        for handle in handles:
            handle.remove()
    return HeadPlan(
        numels=tuple(numels),
        saved_bytes=saved,
        forward_peak=forward_peak,
        backward_peaks=tuple(peaks),
        host_bytes=offload.buffers.held_bytes,
        forward_flops=forward_flops,
        flops=trace.flops,
    )


def _own_counts(name: str, count: Tensor) -> Tensor:
    """Count, as LossCounts, in this process alone: a plan may be made while other ranks do something else."""
    return count.float().clamp(min=1.0)


class _MapsOf(SimpleNamespace):
    """In a backbone's place: gives maps that are there."""

    stages = ()

    def __init__(self, maps: Sequence[Tensor]) -> None:
        super().__init__(maps=tuple(maps))

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.maps
