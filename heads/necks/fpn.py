"""Define the feature pyramid network (Lin et al. 2017, "Feature Pyramid Networks for Object Detection")."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost._modules import module_list
from permafrost.heads.errors import HeadError
from permafrost.heads.necks.level_norm import LevelNorm

if TYPE_CHECKING:
    from permafrost.model.spec import FeatureSpec


class FPN(nn.Module):
    """Lateral 1x1 convolutions, a top-down path of nearest-neighbour sums, and a 3x3 convolution per level.

    Args:
        spec: the backbone's maps, finest first; each stride doubles the one before.
        channels: width of every output level.
        num_extra_levels: levels subsampled from the coarsest one, each by 2.
        level_norm: whether a LevelNorm stands before each lateral convolution.

    Attributes:
        strides: pixels per cell of every output level: the backbone's, then the extra ones.
        num_backbone_levels: how many of the outputs have a backbone map; regions are pooled from these.

    Raises:
        HeadError: there is only one map, or the strides do not double.
    """

    def __init__(
        self, *, spec: FeatureSpec, channels: int = 256, num_extra_levels: int = 1, level_norm: bool = True
    ) -> None:
        super().__init__()
        strides = tuple(spec.strides)
        if len(strides) == 1:
            raise HeadError(
                f"neck: the backbone gives one map (stride {strides[0]}), and a feature pyramid network mixes several: use "
                "SimplePyramidConfig as neck, which makes its levels from one map, or choose more levels of the backbone"
            )
        if any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
            raise HeadError(
                f"neck: the backbone's strides are {strides}; a feature pyramid needs each to be twice the one before: "
                "choose consecutive levels of the backbone"
            )
        self.num_backbone_levels = len(strides)
        self.num_extra_levels = num_extra_levels
        self.strides = strides + tuple(strides[-1] * 2 ** (i + 1) for i in range(num_extra_levels))
        self.level_norms = nn.ModuleList(LevelNorm(c) for c in spec.channels) if level_norm else None
        self.lateral = module_list(nn.Conv2d(c, channels, 1) for c in spec.channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in spec.channels)
        for conv in (*self.lateral, *self.output):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the pyramid, finest level first.

        Args:
            features: one (B, C_i, H_i, W_i) map per backbone level, in any floating dtype.

        Returns:
            One (B, channels, H_i, W_i) map per level, in the compute dtype: autocast's, else the parameters'.
        """
        return self.outputs(self.top_down(self.laterals(features)))

    def laterals(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the backbone's maps, normalised and brought to one width."""
        if len(features) != self.num_backbone_levels:
            raise HeadError(
                f"neck: {len(features)} feature maps came in, the head was built for {self.num_backbone_levels}: "
                "build it from the FeatureSpec of the backbone that feeds it"
            )
        return [conv(x) for conv, x in zip(self.lateral, self._normalised(features))]

    def top_down(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return each level plus the enlarged sum of the coarser ones."""
        inner = list(levels)
        for i in range(len(inner) - 2, -1, -1):
            inner[i] = inner[i] + F.interpolate(inner[i + 1], size=inner[i].shape[-2:], mode="nearest")
        return inner

    def outputs(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Apply the last convolution of each level, and add the extra levels."""
        pyramid = [conv(x) for conv, x in zip(self.output, levels)]
        for _ in range(self.num_extra_levels):
            pyramid.append(F.max_pool2d(pyramid[-1], kernel_size=1, stride=2))
        return pyramid

    def _normalised(self, features: Sequence[Tensor]) -> list[Tensor]:
        if self.level_norms is not None:
            return [norm(x) for norm, x in zip(self.level_norms, features)]
        # Under autocast the convolution casts for itself, and a bf16 map needs no detour over float32.
        if torch.is_autocast_enabled(features[0].device.type):
            return list(features)
        return [x.to(self.lateral[0].weight.dtype) for x in features]
