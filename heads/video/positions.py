"""Build position codes of a clip's tokens: the sum of one code per axis, learned or fixed waves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.heads.video.config import PositionKind

AXES = ("frames", "rows", "columns")


class LearnedPositions(nn.Module):
    """A trained table per axis. A clip with another number of frames, rows or columns resamples it linearly.

    Args:
        channels: D.
        lengths: rows of the table by axis, for those of AXES that are told apart.
    """

    def __init__(self, channels: int, lengths: dict[str, int]) -> None:
        super().__init__()
        self.tables = nn.ParameterDict({axis: nn.Parameter(torch.empty(n, channels)) for axis, n in lengths.items()})
        for table in self.tables.values():
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, size: tuple[int, int, int]) -> Tensor:
        """Return codes (T, h, w, D) of a clip of `size` (T, h, w); axes without a table have length 1."""
        total = torch.zeros((), device=next(self.parameters()).device)
        for axis, table in self.tables.items():
            place = AXES.index(axis)
            shape = [1, 1, 1, table.shape[1]]
            shape[place] = size[place]
            total = total + _resampled(table, size[place]).view(shape)
        return total


def _resampled(table: Tensor, length: int) -> Tensor:
    if len(table) == length:
        return table
    return F.interpolate(table.T[None], size=length, mode="linear", align_corners=False)[0].T


class SinCosPositions(nn.Module):
    """Fixed waves per axis (Vaswani et al. 2017, section 3.5), each axis in its own share of the channels.

    Args:
        channels: D.
        axes: those of AXES that are told apart.
    """

    anchor: Tensor

    def __init__(self, channels: int, axes: Sequence[str]) -> None:
        super().__init__()
        self.channels, self.axes = channels, tuple(axes)
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    def forward(self, size: tuple[int, int, int]) -> Tensor:
        """Return codes (T, h, w, D) of a clip of `size` (T, h, w); axes without waves have length 1."""
        # An even number each; what is left over stays 0.
        share = self.channels // len(self.axes) // 2 * 2
        total = torch.zeros(1, 1, 1, self.channels, device=self.anchor.device)
        for number, axis in enumerate(self.axes):
            place = AXES.index(axis)
            exponents = torch.arange(0, share, 2, device=total.device) / max(1, share)
            angles = torch.arange(size[place], device=total.device)[:, None] * 10_000.0**-exponents
            waves = F.pad(
                torch.cat([angles.sin(), angles.cos()], dim=1),
                (number * share, self.channels - (number + 1) * share),
            )
            shape = [1, 1, 1, self.channels]
            shape[place] = size[place]
            total = total + waves.view(shape)
        return total


def make_positions(
    kind: PositionKind, channels: int, axes: Sequence[str], *, num_frames: int, map_side: int
) -> nn.Module | None:
    """Build the position codes that a configuration names; None for none.

    Args:
        kind: learned, fixed waves, or none, per PositionKind.
        channels: D.
        axes: those of AXES that are told apart.
        num_frames: rows of a learned table of frames.
        map_side: rows of the learned tables of rows and columns.
    """
    if kind == "none":
        return None
    if kind == "sincos":
        return SinCosPositions(channels, axes)
    return LearnedPositions(channels, {axis: num_frames if axis == "frames" else map_side for axis in axes})
