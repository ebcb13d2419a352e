"""Plan full fine-tuning: a backbone's forward and backward, joined to its head's.

The backbone runs on fake tensors: they have shapes, dtypes and a device (so that autocast acts), and no memory. It is
joined to a head that was run for itself, which is what one backward does: it goes through all of the head first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from permafrost.launcher.errors import RecipeError
from permafrost.launcher.plan.backbone import NO_SOURCE, clear_tables
from permafrost.launcher.plan.head import HeadPlan
from permafrost.launcher.plan.trace import FusedAttention, Trace
from permafrost.model.build import empty_network
from permafrost.model.config import BackboneConfig
from permafrost.model.spec import TIMM_PREFIX
from permafrost.model.trainable import TrainableBackbone


@dataclass(frozen=True)
class TrainedPlan:
    """A backbone that is trained, over one micro-batch.

    Attributes:
        numels: elements of each parameter, in the order in which the backward gives their gradients.
        saved_bytes: what the forward leaves for the backward, feature maps among it.
        forward_peak: most that the forward holds, parameters aside.
        backward_peaks: as of HeadPlan, while the feature maps' gradients are there.
        forward_flops: of a forward.
        flops: of a forward and a backward.
        map_dtype: of the feature maps.
    """

    numels: tuple[int, ...]
    saved_bytes: int
    forward_peak: int
    backward_peaks: tuple[int, ...]
    forward_flops: int
    flops: int
    map_dtype: torch.dtype


def build_trained(config: BackboneConfig) -> TrainableBackbone:
    """Build the backbone without memory for its weights.

    Args:
        config: which network, as settle_windows returned it.

    Raises:
        RecipeError: it is a timm model.
    """
    if config.name.startswith(TIMM_PREFIX):
        raise RecipeError(
            f"backbone.frozen is False and backbone.name {config.name!r}: plan can predict the training of a Swin only"
        )
    return TrainableBackbone(empty_network(config), config, **NO_SOURCE)


def plan_trained(
    config: BackboneConfig,
    *,
    batch: int,
    size: tuple[int, int],
    precision: str,
    device_type: str,
) -> TrainedPlan:
    """Run a network's forward and backward on fake tensors.

    Args:
        config: which network, as settle_windows returned it.
        batch: images; of clips the maps that come of them.
        size: their height and width.
        precision: "float32" or "bfloat16", of the autocast.
        device_type: "cuda" or "cpu", where it will run.

    Raises:
        RecipeError: it is a timm model.
    """
    network = build_trained(config).network.train()
    clear_tables()
    numels: list[int] = []
    peaks: list[int] = []
    trace = Trace("cpu")

    def on_gradient(parameter: nn.Parameter) -> None:
        peaks.append(trace.take_peak())
        numels.append(parameter.numel())
        # What engines do with it is theirs; here it leaves at once.
        parameter.grad = None

    try:
        with FakeTensorMode():
            for module in network.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    fake = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu"))
                    fake.register_post_accumulate_grad_hook(on_gradient)
                    setattr(module, name, fake)
            images = torch.empty(batch, 3 * config.patch_frames, *size, device="cpu")
            trace.watch([*network.parameters(), images])
            # A CPU has no kernel that also gives the position bias its gradient.
            with _as_on_cuda(trace, device_type == "cuda"), trace:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
                    maps = network(images, generator=[torch.Generator()] * batch)
                saved, forward_peak, forward_flops = trace.live, trace.take_peak(), trace.flops
                dtype = maps[0].dtype
                gradients = [torch.empty_like(one) for one in maps]
                trace.take_peak()
                torch.autograd.backward(maps, gradients)
                peaks.append(trace.take_peak())
    finally:
        # They hold fake tensors now.
        clear_tables()
    return TrainedPlan(
        numels=tuple(numels),
        saved_bytes=saved,
        forward_peak=forward_peak,
        backward_peaks=tuple(peaks),
        forward_flops=forward_flops,
        flops=trace.flops,
        map_dtype=dtype,
    )


def join_plans(backbone: TrainedPlan, head: HeadPlan) -> HeadPlan:
    """Return the plan of both as one module.

    Args:
        backbone: what runs first in a forward and last in a backward.
        head: on maps that get a gradient.
    """
    saved = backbone.saved_bytes
    *own, last = head.backward_peaks
    first, *others = backbone.backward_peaks
    return replace(
        head,
        numels=(*head.numels, *backbone.numels),
        saved_bytes=saved + head.saved_bytes,
        forward_peak=max(backbone.forward_peak, saved + head.forward_peak),
        backward_peaks=(*(saved + peak for peak in own), max(saved + last, first), *others),
        forward_flops=backbone.forward_flops + head.forward_flops,
        flops=backbone.flops + head.flops,
    )


@contextmanager
def _as_on_cuda(trace: Trace, is_cuda: bool) -> Iterator[None]:
    """Compute as on CUDA, which has a fused attention, and whose autocast computes norms in float32, unlike a CPU's.

    Functions are replaced, as a mode would be off in a backward, where blocks may be computed again.
    """
    if not is_cuda:
        yield
        return
    attention, norm = F.scaled_dot_product_attention, F.layer_norm

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        return FusedAttention(trace).with_gradients(query, key, value, attn_mask)

    def precise(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return norm(x.float(), *args, **kwargs)

    F.scaled_dot_product_attention, F.layer_norm = fused, precise  # type: ignore[assignment]  # as the networks call them
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.layer_norm = attention, norm
