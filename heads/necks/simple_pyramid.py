"""Define the simple feature pyramid of ViTDet (Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection",
ECCV 2022, section 3): every level is made from one and the same map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost._modules import module_list
from permafrost.heads.errors import HeadError
from permafrost.heads.necks.level_norm import LevelNorm

if TYPE_CHECKING:
    from permafrost.model.spec import FeatureSpec

LEVEL_STRIDES = (4, 8, 16, 32)
# The eps of the paper's norms.
EPS = 1e-6


class SimpleFeaturePyramid(nn.Module):
    """Levels of stride 4, 8, 16 and 32 from a single map, without lateral or top-down connections.

    From a map of stride 16, as in the paper: two deconvolutions of stride 2 with LayerNorm and GELU between them, one
    deconvolution, the map itself, a 2x2 max-pooling; each followed by a 1x1 and a 3x3 convolution with a LayerNorm each. All
    norms are over the channels.

    Any other stride s takes the same ladder of halvings and doublings, to the stride s * 2^k nearest to the level's in the
    logarithm, and is then resampled (bilinear) to exactly the level's: 14 gives 3.5, 7, 14 and 28, which become 4, 8, 16 and
    32. So whatever the backbone's patch, cell (i, j) of a level of stride t covers the pixels from (t i, t j) on, as anchors
    and region pooling take it to, and every cell of the map is used before anything is resampled. A level of a map of n rows,
    hence of an image padded to n s pixels, has ceil(n s / t) rows.

    Args:
        spec: the backbone's only map.
        channels: width of every output level.
        num_extra_levels: levels subsampled from the coarsest one, each by 2.
        level_norm: whether a LevelNorm stands before everything. The paper has none, since it trains the backbone; a frozen
            one's map is raw, and this is where its scale is learned.

    Attributes:
        strides: pixels per cell of every output level.
        num_backbone_levels: how many of the outputs regions are pooled from: all but the extra ones.

    Raises:
        HeadError: the backbone gives more than one map.
    """

    def __init__(
        self, *, spec: FeatureSpec, channels: int = 256, num_extra_levels: int = 1, level_norm: bool = True
    ) -> None:
        super().__init__()
        if len(spec.strides) != 1:
            raise HeadError(
                f"neck: the backbone gives {len(spec.strides)} maps (strides {tuple(spec.strides)}), and a simple feature "
                "pyramid makes its levels from one: use FPNConfig as neck, or tap one layer of the backbone (backbone.taps)"
            )
        width, stride = spec.channels[0], spec.strides[0]
        self.stride = stride
        self.num_backbone_levels = len(LEVEL_STRIDES)
        self.num_extra_levels = num_extra_levels
        self.strides = LEVEL_STRIDES + tuple(LEVEL_STRIDES[-1] * 2 ** (i + 1) for i in range(num_extra_levels))
        self.level_norms = nn.ModuleList([LevelNorm(width)]) if level_norm else None
        # Doublings of the map (halvings, if negative) before each level.
        self.doublings = tuple(round(math.log2(stride / level)) for level in LEVEL_STRIDES)
        self.scale = nn.ModuleList(_scaling(width, doublings) for doublings in self.doublings)
        widths = [max(1, width // 2 ** max(0, doublings)) for doublings in self.doublings]
        self.lateral = module_list(nn.Conv2d(own, channels, 1, bias=False) for own in widths)
        self.lateral_norm = nn.ModuleList(LevelNorm(channels, eps=EPS) for _ in widths)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in widths)
        self.output_norm = nn.ModuleList(LevelNorm(channels, eps=EPS) for _ in widths)
        for conv in (*self.lateral, *self.output):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the pyramid, finest level first.

        Args:
            features: the backbone's only map, (B, C, n, m), in any floating dtype.

        Returns:
            One (B, channels, ceil(n s / t), ceil(m s / t)) map per level of stride t, in the parameters' dtype.
        """
        if len(features) != 1:
            raise HeadError(
                f"neck: {len(features)} feature maps came in, the head was built for 1: build it from the FeatureSpec of the "
                "backbone that feeds it"
            )
        x = self._normalised(features[0])
        pyramid = []
        for i, stride in enumerate(LEVEL_STRIDES):
            level = self.scale[i](x)
            level = resample(level, stride=self.stride / 2 ** self.doublings[i], new_stride=stride)
            rows, columns = (-(-side * self.stride // stride) for side in x.shape[-2:])
            level = self.lateral_norm[i](self.lateral[i](level[..., :rows, :columns]))
            pyramid.append(self.output_norm[i](self.output[i](level)))
        for _ in range(self.num_extra_levels):
            pyramid.append(F.max_pool2d(pyramid[-1], kernel_size=1, stride=2))
        return pyramid

    def _normalised(self, x: Tensor) -> Tensor:
        if self.level_norms is not None:
            return self.level_norms[0](x)
        # Under autocast the convolutions cast for themselves.
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.lateral[0].weight.dtype)


def resample(x: Tensor, *, stride: float, new_stride: float) -> Tensor:
    """Sample bilinearly at the centres of cells of another stride; both grids begin at the same corner.

    Cell j of the new grid has its centre at (j + 1/2) new_stride pixels, that is (j + 1/2) new_stride / stride - 1/2 cells of
    the old one; samples beyond the outermost centres take the outermost value.

    Args:
        x: (B, C, n, m), cells of `stride` pixels.
        stride: pixels per cell of `x`.
        new_stride: pixels per cell of the result.

    Returns:
        (B, C, >= ceil(n stride / new_stride), >= ceil(m stride / new_stride)): at least every cell that touches the old grid.
    """
    if stride == new_stride:
        return x
    ratio = stride / new_stride
    # PyTorch takes the exact ratio of the strides only where it may choose the size, and then rounds that down: cells are
    # added until it is large enough, as copies of the border, which is what samples beyond it take anyway.
    rows, columns = (math.ceil(math.ceil(side * ratio) / ratio) - side for side in x.shape[-2:])
    x = F.pad(x, (0, columns, 0, rows), mode="replicate")
    return F.interpolate(x, scale_factor=ratio, mode="bilinear", align_corners=False, recompute_scale_factor=False)


def _scaling(width: int, doublings: int) -> nn.Sequential:
    """Build deconvolutions that double a map and halve its channels, or poolings that halve it and keep them."""
    if doublings <= 0:
        # Rounded up: an odd row at the bottom belongs to the image, too.
        return nn.Sequential(*(nn.MaxPool2d(2, 2, ceil_mode=True) for _ in range(-doublings)))
    layers: list[nn.Module] = []
    for number in range(doublings):
        narrower = max(1, width // 2)
        layers.append(nn.ConvTranspose2d(width, narrower, kernel_size=2, stride=2))
        if number < doublings - 1:
            layers += [LevelNorm(narrower, eps=EPS), nn.GELU()]
        width = narrower
    return nn.Sequential(*layers)
