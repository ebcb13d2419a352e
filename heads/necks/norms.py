"""Build the norms of a head's convolutions. None of them looks beyond one image: what a step computes must not depend on how the
batch was split over ranks, which batch normalisation's statistics do."""

from __future__ import annotations

import math

from torch import nn

from permafrost.heads.necks.level_norm import LevelNorm

MAX_GROUPS = 32
"""Groups of a group norm (Wu and He 2018), fewer where the channels do not divide."""
GROUP_CHANNELS = 8
"""Fewest channels of a group: one channel on a map of a single cell has no variance."""


def make_norm(kind: str, channels: int) -> nn.Module:
    """Build the norm of an (R, C, H, W) map that a configuration names.

    Args:
        kind: "group", "layer" (over the channels of each cell) or "none".
        channels: C.
    """
    if kind == "group":
        return nn.GroupNorm(math.gcd(MAX_GROUPS, channels, max(1, channels // GROUP_CHANNELS)), channels)
    return LevelNorm(channels) if kind == "layer" else nn.Identity()
