"""Turn decoded frames into the square that the network sees, alike for all frames of a clip.

All randomness is drawn from the generator that is passed in, always the same number of draws.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from permafrost.data.pictures.geometry import resize

CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
_TRIES = 10


def to_clip(frames: np.ndarray) -> Tensor:
    """Return frames (T, H, W, 3) uint8 as (T, 3, H, W), without a copy."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def random_crop(clip: Tensor, side: int, generator: torch.Generator, scale: tuple[float, float] = CROP_SCALE) -> Tensor:
    """Return a random part of random aspect ratio, resized to a square (Szegedy et al. 2015, as in Video-Swin's training).

    Args:
        clip: (T, 3, H, W) uint8.
        side: of the square, pixels.
        generator: what is drawn from.
        scale: range of the part's share of the area.
    """
    height, width = clip.shape[-2:]
    draws = torch.rand(_TRIES, 2, generator=generator, dtype=torch.float64)
    top_draw, left_draw = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    for area_draw, ratio_draw in draws.tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
        ratio = math.exp(low + (high - low) * ratio_draw)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            break
    else:
        crop_height = crop_width = min(height, width)
    top, left = int(top_draw * (height - crop_height + 1)), int(left_draw * (width - crop_width + 1))
    return resize(clip[..., top : top + crop_height, left : left + crop_width].contiguous(), (side, side))


def view_crop(clip: Tensor, short_side: int, side: int, crop: int, num_crops: int) -> Tensor:
    """Return one of the squares along the longer side of the clip resized to `short_side`.

    Args:
        clip: (T, 3, H, W) uint8.
        short_side: what the shorter side is resized to, at least `side`.
        side: of the square, pixels.
        crop: which square, 0 is the first from the left or top.
        num_crops: squares, evenly spread; 1 is the centre.
    """
    height, width = clip.shape[-2:]
    ratio = short_side / min(height, width)
    clip = resize(clip.contiguous(), (max(side, round(height * ratio)), max(side, round(width * ratio))))
    height, width = clip.shape[-2:]
    share = 0.5 if num_crops == 1 else crop / (num_crops - 1)
    top, left = (round((height - side) * share), (width - side) // 2)
    if width >= height:
        top, left = (height - side) // 2, round((width - side) * share)
    return clip[..., top : top + side, left : left + side].contiguous()
