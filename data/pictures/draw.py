"""Draw pictures for people, of any task: colours of classes, captions, sheets of many pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 320
"""Smaller pictures are enlarged by a whole factor to about this many pixels, or labels would hide them."""


def class_color(label: int) -> tuple[int, int, int]:
    """Return a vivid RGB colour per label; labels next to one another are far apart in hue (steps of the golden ratio)."""
    hue = (0.11 + label * 0.618034) % 1.0
    red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.85, 1.0))
    return red, green, blue


def enlarged(picture: np.ndarray, min_side: int = MIN_SIDE) -> Image.Image:
    """Return a picture (H, W, 3) uint8 enlarged by the least whole factor, to at least about `min_side` pixels a side."""
    height, width = picture.shape[:2]
    factor = max(1, -(-min_side // max(height, width)))
    return Image.fromarray(picture).resize((width * factor, height * factor), Image.Resampling.NEAREST)


def captioned(picture: np.ndarray, caption: str) -> np.ndarray:
    """Return a picture (H, W, 3) with a line of text on a dark bar above it."""
    font = ImageFont.load_default(size=14)
    bar = Image.new("RGB", (picture.shape[1], 20), (32, 32, 32))
    ImageDraw.Draw(bar).text((4, 1), caption, fill=(255, 255, 255), font=font)
    return np.concatenate([np.asarray(bar), picture])


def side_by_side(left: np.ndarray, right: np.ndarray, captions: tuple[str, str] = ("predicted", "true")) -> np.ndarray:
    """Return two pictures (H, W, 3) uint8 beside one another, each with its caption above."""
    return contact_sheet([captioned(left, captions[0]), captioned(right, captions[1])], columns=2)


def contact_sheet(pictures: Sequence[np.ndarray], columns: int = 4, gap: int = 4) -> np.ndarray:
    """Return pictures (H, W, 3) uint8 of any sizes on one sheet, row by row, each in a cell of the largest size.

    Args:
        pictures: at least one.
        columns: pictures in a row.
        gap: pixels between cells.
    """
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    height = max(picture.shape[0] for picture in pictures)
    width = max(picture.shape[1] for picture in pictures)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for position, picture in enumerate(pictures):
        top, left = (position // columns) * (height + gap), (position % columns) * (width + gap)
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet
