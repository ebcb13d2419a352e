"""Draw the class of every pixel as a colour over the photo, with a legend, for people."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from permafrost.data.pictures.draw import MIN_SIDE, class_color, enlarged
from permafrost.data.pictures.geometry import NO_CLASS

_ALPHA = 0.6
_LISTED = 24
"""Classes in a legend; the smaller ones are summed up."""


def class_shares(classes: Tensor | np.ndarray) -> list[tuple[int, float]]:
    """Return (class, share of the pixels) of the classes that occur, the largest first; NO_CLASS counts as one."""
    values, counts = np.unique(np.asarray(classes), return_counts=True)
    shares = zip(values.tolist(), (counts / counts.sum()).tolist())
    return sorted(shares, key=lambda pair: (-pair[1], pair[0]))


def draw_classes(image: Tensor, classes: Tensor, names: Sequence[str], *, min_side: int = MIN_SIDE) -> np.ndarray:
    """Lay the colours of classes over a photo, with a legend at its right.

    Args:
        image: (3, H, W) uint8.
        classes: (H, W) uint8; pixels of NO_CLASS keep the photo's colours.
        names: by class.
        min_side: A smaller photo is enlarged by a whole factor to at least about this many pixels.

    Returns:
        (H', W', 3) uint8: the picture, enlarged, beside the legend of the classes that occur, the largest first.
    """
    photo, values = image.cpu().permute(1, 2, 0).float(), classes.cpu().long()
    colors = torch.tensor([class_color(label) for label in range(len(names))], dtype=torch.float32)
    known = values != NO_CLASS
    mixed = torch.where(
        known[..., None], (1 - _ALPHA) * photo + _ALPHA * colors[values.clamp(max=len(names) - 1)], photo
    )
    picture = enlarged(mixed.round().to(torch.uint8).numpy(), min_side)
    return np.concatenate([np.asarray(picture), _legend(values, names, picture.height)], axis=1)


def _legend(classes: Tensor, names: Sequence[str], height: int) -> np.ndarray:
    """Draw colour, name and share of each class, (height, W', 3) uint8."""
    shares = class_shares(classes)
    line = max(11, min(18, height // max(8, min(len(shares), _LISTED + 1))))
    room = min(_LISTED, max(1, height // line - (len(shares) > height // line)))
    entries = []
    for label, share in shares[:room]:
        color, name = ((96, 96, 96), "ignored") if label == NO_CLASS else (class_color(label), names[label])
        entries.append((color, f"{name} {share:.0%}"))
    if rest := shares[room:]:
        entries.append(((32, 32, 32), f"{len(rest)} more {sum(share for _, share in rest):.0%}"))
    font = ImageFont.load_default(size=line - 3)
    width = max(round(font.getlength(text)) for _, text in entries) + line + 12
    canvas = Image.new("RGB", (width, height), (32, 32, 32))
    draw = ImageDraw.Draw(canvas)
    for number, (color, text) in enumerate(entries):
        top = number * line
        draw.rectangle((4, top + 2, line, top + line - 2), fill=color)
        draw.text((line + 6, top), text, fill=(255, 255, 255), font=font)
    return np.asarray(canvas)
