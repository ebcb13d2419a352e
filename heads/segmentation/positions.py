"""Encode where a cell lies as sines and cosines: the position code that both decoders add."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10_000.0


def sine_positions(height: int, width: int, channels: int, *, like: Tensor) -> Tensor:
    """Return (H * W, C) sines and cosines of each cell's row, then of its column, both as shares of the map times 2 pi.

    The code of DETR (Carion et al. 2020), normalised. Computed in float32 at least, whatever autocast says.

    Args:
        height: H.
        width: W.
        channels: C, a multiple of 4.
        like: whose device and dtype the result has.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    half = channels // 2
    # Two channels of one frequency each, from 1 down to 1 / TEMPERATURE.
    pairs = torch.arange(half, device=like.device).div(2, rounding_mode="floor").to(dtype)
    periods = TEMPERATURE ** (2 * pairs / half)

    def code(length: int) -> Tensor:
        places = torch.arange(1, length + 1, device=like.device, dtype=dtype) / (length + 1e-6) * (2 * math.pi)
        angles = places[:, None] / periods
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1)

    rows, columns = code(height), code(width)
    full = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=2)
    return full.flatten(0, 1).to(like.dtype)
