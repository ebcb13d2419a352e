"""Define the bidirectional feature pyramid (Tan et al. 2020, "EfficientDet", section 3): layers of weighted sums, down and up again.

The paper gives the number of layers only (5 for L-22K, 9 for T-1K, 1 to 4 in Table 6). Width, norm and kind of convolution
are fields; the defaults are those of its authors' own detection code: 256 channels, full 3x3 convolutions, group norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost._modules import module_list
from permafrost.heads.errors import HeadError
from permafrost.heads.necks.level_norm import LevelNorm
from permafrost.heads.necks.norms import make_norm

if TYPE_CHECKING:
    from permafrost.model.spec import FeatureSpec

EPS = 1e-4
"""Added to the sum of a node's weights (EfficientDet, section 3.3: fast normalised fusion)."""


class FusionNode(nn.Module):
    """norm(conv(swish(sum of w_i x_i over sum of w_i + 1e-4))), with w the ReLU of one trained number per input.

    Args:
        num_inputs: maps that meet here.
        channels: width in and out.
        separable: a 3x3 convolution channel by channel and a 1x1 one, in place of a full 3x3 one.
        norm: a norm's name, as make_norm takes it.
    """

    def __init__(self, *, num_inputs: int, channels: int, separable: bool, norm: str) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_inputs))
        has_bias = norm == "none"
        if separable:
            depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
            convs = [depthwise, nn.Conv2d(channels, channels, 1, bias=has_bias)]
        else:
            convs = [nn.Conv2d(channels, channels, 3, padding=1, bias=has_bias)]
        self.conv = nn.Sequential(*convs)
        self.norm = make_norm(norm, channels)
        for conv in convs:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Fuse maps of one shape (B, channels, H, W) to one."""
        weights = F.relu(self.weights)
        weights = weights / (weights.sum() + EPS)
        fused = sum(weight * x for weight, x in zip(weights, inputs, strict=True))
        return self.norm(self.conv(F.silu(fused)))


class BiFPNLayer(nn.Module):
    """One pass from the coarsest level down to the finest and back up; the levels keep their shapes.

    A level between the ends meets two maps on the way down (its own and the coarser level's) and three on the way up (its
    own, its own of the way down, the finer level's); the finest level has no node on the way up, the coarsest none on the
    way down.

    Args:
        num_levels: at least 2.
        channels: width of every level.
        separable: whether the convolutions are separable, as in FusionNode.
        norm: a norm's name, as make_norm takes it.
    """

    def __init__(self, *, num_levels: int, channels: int, separable: bool, norm: str) -> None:
        super().__init__()
        node = partial(FusionNode, channels=channels, separable=separable, norm=norm)
        # down[i] makes level i; up[i] makes level i + 1.
        self.down = nn.ModuleList(node(num_inputs=2) for _ in range(num_levels - 1))
        self.up = nn.ModuleList(node(num_inputs=2 if level == num_levels - 1 else 3) for level in range(1, num_levels))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Fuse one (B, channels, H_i, W_i) map per level, finest first, to as many."""
        downward = list(levels)
        for i in range(len(levels) - 2, -1, -1):
            larger = F.interpolate(downward[i + 1], size=levels[i].shape[-2:], mode="nearest")
            downward[i] = self.down[i]([levels[i], larger])
        upward = [downward[0]]
        for i in range(1, len(levels)):
            smaller = halve(upward[-1])
            inputs = [levels[i], smaller] if i == len(levels) - 1 else [levels[i], downward[i], smaller]
            upward.append(self.up[i - 1](inputs))
        return upward


def halve(x: Tensor) -> Tensor:
    """Halve (B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2)): the largest of each 3x3 window, every second one."""
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class BiFPN(nn.Module):
    """Layers of bidirectional fusion over some of the backbone's maps and levels halved from the coarsest.

    P2 to P6 is `finest_stride` 4 with one extra level, P3 to P7 is 8 with two.

    Args:
        spec: the backbone's maps, finest first; each stride doubles the one before.
        channels: width of every level.
        num_extra_levels: levels halved from the coarsest one, which take part in every layer.
        level_norm: whether a LevelNorm stands before each lateral convolution.
        num_layers: how often the levels are mixed.
        finest_stride: finer maps of the backbone are left out.
        separable: whether the convolutions are separable, as in FusionNode.
        norm: a norm's name, as make_norm takes it.

    Attributes:
        strides: pixels per cell of every output level: the backbone's from `finest_stride` on, then the extra ones.
        num_backbone_levels: how many of the outputs have a backbone map; regions are pooled from these.

    Raises:
        HeadError: the strides do not double, or fewer than two levels are left.
    """

    def __init__(
        self,
        *,
        spec: FeatureSpec,
        channels: int = 256,
        num_extra_levels: int = 1,
        level_norm: bool = True,
        num_layers: int = 5,
        finest_stride: int = 4,
        separable: bool = False,
        norm: str = "group",
    ) -> None:
        super().__init__()
        if any(coarse != 2 * fine for fine, coarse in pairwise(spec.strides)):
            raise HeadError(
                f"neck: the backbone's strides are {tuple(spec.strides)}; a feature pyramid needs each to be twice the one "
                "before: choose consecutive levels of the backbone"
            )
        if finest_stride not in spec.strides:
            raise HeadError(
                f"neck.finest_stride is {finest_stride}: the backbone's maps have the strides {tuple(spec.strides)}; "
                "choose one of them"
            )
        self.first_map = spec.strides.index(finest_stride)
        self.num_maps = len(spec.strides)
        own = spec.strides[self.first_map :]
        self.num_backbone_levels = len(own)
        self.num_extra_levels = num_extra_levels
        self.strides = own + tuple(own[-1] * 2 ** (i + 1) for i in range(num_extra_levels))
        if len(self.strides) == 1:
            raise HeadError(
                f"neck: only the level of stride {own[0]} is left, and a bidirectional pyramid mixes several: lower "
                "neck.finest_stride or raise neck.num_extra_levels"
            )
        widths = spec.channels[self.first_map :]
        self.level_norms = nn.ModuleList(LevelNorm(width) for width in widths) if level_norm else None
        self.lateral = module_list(nn.Conv2d(width, channels, 1) for width in widths)
        self.layers = nn.ModuleList(
            BiFPNLayer(num_levels=len(self.strides), channels=channels, separable=separable, norm=norm)
            for _ in range(num_layers)
        )
        for conv in self.lateral:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the pyramid, finest level first.

        Args:
            features: one (B, C_i, H_i, W_i) map per backbone level, in any floating dtype.

        Returns:
            One (B, channels, H_i, W_i) map per level, in the compute dtype: autocast's, else the parameters'.
        """
        if len(features) != self.num_maps:
            raise HeadError(
                f"neck: {len(features)} feature maps came in, the head was built for {self.num_maps}: build it from the "
                "FeatureSpec of the backbone that feeds it"
            )
        levels = [conv(x) for conv, x in zip(self.lateral, self._normalised(features[self.first_map :]))]
        for _ in range(self.num_extra_levels):
            levels.append(halve(levels[-1]))
        for layer in self.layers:
            levels = layer(levels)
        return levels

    def _normalised(self, features: Sequence[Tensor]) -> list[Tensor]:
        if self.level_norms is not None:
            return [norm(x) for norm, x in zip(self.level_norms, features)]
        if torch.is_autocast_enabled(features[0].device.type):
            return list(features)
        return [x.to(self.lateral[0].weight.dtype) for x in features]
