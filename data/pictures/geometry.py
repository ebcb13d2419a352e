"""Resize, crop, mirror and pad pictures of any task. Shapes: (..., H, W), sizes are (height, width).

Padding takes PAD_COLOR, the mean colour of photographs, not black: after the backbone's normalisation it is close to
0, which is what detection code pads with after normalising, and it draws no edge along the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

PAD_COLOR = (124, 116, 104)
"""RGB of the padding: the mean of ImageNet, 255 * (0.485, 0.456, 0.406)."""
NO_CLASS = 255
"""Value of a pixel in a semantic map that is padding, or that nobody labelled."""
DIVISOR = 32
"""Images that keep their aspect ratio are padded to whole multiples of this, the coarsest stride of most backbones."""


def fitted_size(height: int, width: int, side: float) -> tuple[int, int]:
    """Return the size whose longer side is `side` pixels, aspect ratio kept, no side below 1."""
    return _scaled(height, width, side / max(height, width))


def short_side_size(height: int, width: int, short: float, longest: float) -> tuple[int, int]:
    """Return the size whose shorter side is `short` pixels, or whose longer one is `longest` where that is smaller."""
    return _scaled(height, width, min(short / min(height, width), longest / max(height, width)))


def _scaled(height: int, width: int, ratio: float) -> tuple[int, int]:
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def padded_size(size: Sequence[int]) -> tuple[int, int]:
    """Return the size rounded up to whole multiples of DIVISOR."""
    height, width = (-(-side // DIVISOR) * DIVISOR for side in size)
    return height, width


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return an image (..., 3, H, W) uint8 at another size: bilinear, antialiased."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return functional.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)


def resize_map(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks or labels (..., H, W) at another size: each pixel takes the nearest one."""
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    # As images, not as tv_tensors.Mask: those are resized with `nearest`, which moves them by up to half a source pixel.
    planes = values[None] if values.ndim == 2 else values
    resized = functional.resize(planes, list(size), interpolation=InterpolationMode.NEAREST_EXACT)
    return resized[0] if values.ndim == 2 else resized


def crop(x: Tensor, top: int, left: int, size: tuple[int, int]) -> Tensor:
    """Return the window of `size` whose corner is at (top, left)."""
    return x[..., top : top + size[0], left : left + size[1]]


def flip(x: Tensor) -> Tensor:
    """Return pixels mirrored, left to right."""
    return x.flip(-1)


def pad_to(x: Tensor, canvas: tuple[int, int], value: float | tuple[int, ...]) -> Tensor:
    """Return pixels in the upper left of a canvas of this size filled with a value, or one per channel."""
    if tuple(x.shape[-2:]) == tuple(canvas):
        return x
    filling = torch.tensor(value, dtype=x.dtype)
    filling = filling.reshape(*filling.shape, 1, 1) if filling.ndim else filling
    padded = filling.expand(*x.shape[:-2], *canvas).clone()
    padded[..., : x.shape[-2], : x.shape[-1]] = x
    return padded
