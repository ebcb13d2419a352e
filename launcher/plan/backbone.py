"""Plan a frozen base network, which runs on the meta device: no weights are needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permafrost.launcher.errors import RecipeError
from permafrost.launcher.plan.trace import FusedAttention, Trace
from permafrost.model.build import empty_network
from permafrost.model.config import BackboneConfig
from permafrost.model.errors import WeightsError
from permafrost.model.frozen import FrozenBackbone
from permafrost.model.network import Network
from permafrost.model.spec import SWIN_V1_SIZES, SWINV2_SIZES, TIMM_PREFIX, FeatureSpec
from permafrost.model.split.degree import possible_degrees
from permafrost.model.split.fairscale_groups import TensorGroup
from permafrost.model.split.tensor_parallel import SplitBackbone, SplitSwinV2
from permafrost.model.swin import parts as swin_parts, v2 as swin
from permafrost.model.swin.load import IMAGENET_MEAN, IMAGENET_STD, read_swin, resident_dtype
from permafrost.model.weights.known import find_public
from permafrost.model.weights.read import locate

META = torch.device("meta")
NO_SOURCE: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "fingerprint": "", "choices": {}}
"""Of a network without weights."""


class PlannedGroup(TensorGroup):
    """A tensor group of which only this member exists: it sends nothing and notes what it would have sent.

    The other members' parts have the shape of this one's, as equal images give.

    Attributes:
        sent: bytes that leave a member in a ring, by collective.
    """

    sent: defaultdict[str, int]

    def __init__(self, degree: int) -> None:
        super().__init__(group=None, control=None, rank=0, degree=degree)  # type: ignore[arg-type]  # nobody to talk to
        # The parent is frozen.
        object.__setattr__(self, "sent", defaultdict(int))

    def reduce(self, x: Tensor) -> Tensor:
        """Sum in place, as fairscale's."""
        x = x.contiguous()
        self.sent["all-reduce"] += 2 * (self.degree - 1) * x.nbytes // self.degree
        return x

    def gather_channels(self, x: Tensor) -> Tensor:
        """Take a buffer from each other member and then their join, as fairscale's."""
        x = x.contiguous()
        self.sent["all-gather"] += (self.degree - 1) * x.nbytes
        return torch.cat([x, *(torch.empty_like(x) for _ in range(self.degree - 1))], dim=-1)

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return every member's numbers, which are equal."""
        return [list(map(int, numbers))] * self.degree


@dataclass(frozen=True)
class BackbonePlan:
    """One process's part of a frozen network, for one micro-batch.

    Attributes:
        num_parameters: of the whole network.
        frozen_bytes: resident for good: this process's weights, and the constants that are kept of them.
        map_bytes: the feature maps of this process's images.
        peak_bytes: most that a forward holds besides the weights, its images' maps included.
        flops: of a forward.
        sent: bytes this process sends in a forward, by collective.
    """

    num_parameters: int
    frozen_bytes: int
    map_bytes: int
    peak_bytes: int
    flops: int
    sent: dict[str, int] = field(default_factory=dict)


def settle_windows(config: BackboneConfig) -> tuple[BackboneConfig, list[str]]:
    """Return the config of a plan, and notes: a Swin's windows and extra norms are those of the weights' file, if it is here.

    Raises:
        WeightsError: the file contradicts the recipe.
    """
    if config.name.startswith(TIMM_PREFIX) or config.random_seed is not None:
        return config, []
    public = None if Path(config.weights).expanduser().exists() else find_public(config.weights)
    if public is not None:
        # Known without the file, which a plan does not download.
        return replace(config, window_size=config.window_size or public.window), []
    try:
        path = locate(config.weights)
    except WeightsError:
        path = None
    if path is not None and path.suffix == ".safetensors":
        return read_swin(config, check_values=False)[1], []
    if config.window_size is not None:
        return config, []
    # A .pth would have to be read whole for a window that only moves the numbers a little.
    default = (SWINV2_SIZES | SWIN_V1_SIZES)[config.name].window_size
    return config, [
        f"backbone.window_size is not given and {config.weights} was not read: windows of {default} are assumed"
    ]


def spec_of(config: BackboneConfig) -> FeatureSpec:
    """Return the channels and strides of a network's maps.

    Raises:
        BackboneError: as empty_network.
    """
    sizes = SWINV2_SIZES | SWIN_V1_SIZES
    return sizes[config.name].spec if config.name in sizes else empty_network(config).spec


def degrees_of(config: BackboneConfig) -> list[int]:
    """Return the tensor degrees that a network can be split by."""
    return possible_degrees(SWINV2_SIZES[config.name]) if config.name in SWINV2_SIZES else [1]


def clear_tables() -> None:
    """Forget the tables that networks share in a process."""
    for cached in (swin_parts.relative_position_index, swin.log_spaced_coordinates, swin_parts.shift_penalties):
        cached.cache_clear()


def plan_backbone(
    config: BackboneConfig,
    *,
    dtype: torch.dtype,
    tensor: int,
    images: tuple[int, ...],
) -> BackbonePlan:
    """Run a network's forward on the meta device.

    Args:
        config: which network, as settle_windows returned it.
        dtype: what it computes in.
        tensor: processes it is split over.
        images: shape of this process's images, (B, 3, H, W), or of its clips, (B, T, 3, H, W).

    Raises:
        BackboneError: as empty_network.
        RecipeError: A timm model cannot be run without numbers.
    """
    # They are kept for good and belong to the plan, also when this process has met them before.
    clear_tables()
    network = empty_network(config)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    group = PlannedGroup(tensor)
    module: Network = network
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(resident_dtype(name, dtype))
    for name, table in list(network.named_buffers()):
        # As they are loaded: rotary frequencies stay float32.
        if table.is_floating_point() and "rope" not in name.split("."):
            owner, _, key = name.rpartition(".")
            setattr(network.get_submodule(owner), key, table.to(dtype))
    if tensor > 1:
        assert isinstance(network, swin.SwinV2)
        module = SplitSwinV2(network, group)
    kind = FrozenBackbone if tensor == 1 else SplitBackbone
    backbone = kind(module, config, **NO_SOURCE)
    pixels = torch.empty(images, dtype=torch.uint8, device=META)

    trace = Trace("meta")
    weights = trace.watch([*backbone.parameters(), *backbone.buffers()])
    trace.watch([pixels])
    with FusedAttention(trace), trace:
        # The first forward also makes the constants that are kept; the second is like all others.
        try:
            backbone(pixels)
        except Exception as error:  # Whatever a timm model does with numbers that are not there.
            if not config.name.startswith(TIMM_PREFIX):
                raise
            raise RecipeError(
                f"backbone.name is {config.name!r}: plan runs a network on the meta device, which this model does not allow "
                f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
            ) from error
        constants, flops = trace.live, trace.flops
        trace.take_peak()
        group.sent.clear()
        maps = backbone(pixels)
    return BackbonePlan(
        num_parameters=num_parameters,
        frozen_bytes=weights + constants,
        map_bytes=sum(one.nbytes for one in maps),
        peak_bytes=trace.peak - constants,
        flops=trace.flops - flops,
        sent=dict(group.sent),
    )
