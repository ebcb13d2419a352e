"""Normalise, with trained values, between a frozen backbone's raw maps and a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LevelNorm(nn.Module):
    """LayerNorm over the channels of an (B, C, H, W) map, in the parameters' precision whatever the map's.

    Args:
        channels: C.
        eps: added to the variance.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) to the same shape, in channels_last memory and the parameters' dtype."""
        # Channels last in memory makes both permutes free, and is what the convolutions behind want.
        pixels = x.permute(0, 2, 3, 1).to(self.weight.dtype)
        return F.layer_norm(pixels, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)
