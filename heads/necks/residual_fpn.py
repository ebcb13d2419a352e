"""Define the feature pyramid with residual blocks inside: the paper's Table 2, "FPN w. 4x Residual Blocks inside".

The paper says neither where the blocks stand nor of which kind and norm they are: each is a field. By default they are the
basic blocks of ResNet (He et al. 2016, "Deep Residual Learning for Image Recognition", figure 5 left) on every level, after
the top-down sum and before the level's last convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from permafrost._modules import module_list
from permafrost.heads.necks.fpn import FPN
from permafrost.heads.necks.norms import make_norm

if TYPE_CHECKING:
    from permafrost.model.spec import FeatureSpec

BOTTLENECK = 4
"""Factor by which the inside of a bottleneck block is narrower."""


class ResidualBlock(nn.Module):
    """ReLU of x plus convolutions of x: two 3x3 (basic), or 1x1, 3x3, 1x1 with a quarter of the width (bottleneck).

    Each convolution is followed by a norm, and but for the last by a ReLU.

    Args:
        channels: width in and out.
        kind: "basic" or "bottleneck".
        norm: a norm's name, as make_norm takes it.
    """

    def __init__(self, *, channels: int, kind: str, norm: str) -> None:
        super().__init__()
        inner = max(1, channels // BOTTLENECK)
        shapes = [(channels, channels, 3)] * 2
        if kind == "bottleneck":
            shapes = [(channels, inner, 1), (inner, inner, 3), (inner, channels, 1)]
        has_bias = norm == "none"
        self.convs = module_list(nn.Conv2d(a, b, k, padding=k // 2, bias=has_bias) for a, b, k in shapes)
        self.norms = nn.ModuleList(make_norm(norm, width) for _, width, _ in shapes)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to the same shape."""
        branch = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            branch = norm(conv(F.relu(branch) if i else branch))
        return F.relu(x + branch)


class ResidualFPN(FPN):
    """An FPN whose every backbone level passes through residual blocks of its own.

    Attributes and errors are FPN's.

    Args:
        spec: the backbone's maps, finest first; each stride doubles the one before.
        channels: width of every output level.
        num_extra_levels: levels subsampled from the coarsest one, each by 2.
        level_norm: whether a LevelNorm stands before each lateral convolution.
        num_blocks: residual blocks of each level.
        block: "basic" or "bottleneck".
        place: "merged", after the top-down sum; or "lateral", before it.
        norm: a norm's name, as make_norm takes it.
    """

    def __init__(
        self,
        *,
        spec: FeatureSpec,
        channels: int = 256,
        num_extra_levels: int = 1,
        level_norm: bool = True,
        num_blocks: int = 4,
        block: str = "basic",
        place: str = "merged",
        norm: str = "group",
    ) -> None:
        super().__init__(spec=spec, channels=channels, num_extra_levels=num_extra_levels, level_norm=level_norm)
        self.place = place
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(channels=channels, kind=block, norm=norm) for _ in range(num_blocks)))
            for _ in spec.channels
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the pyramid, finest level first, as FPN does."""
        levels = self.laterals(features)
        if self.place == "lateral":
            levels = [blocks(x) for blocks, x in zip(self.blocks, levels)]
        levels = self.top_down(levels)
        if self.place == "merged":
            levels = [blocks(x) for blocks, x in zip(self.blocks, levels)]
        return self.outputs(levels)
