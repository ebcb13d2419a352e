"""Pictures for people: boxes, masks and labels drawn on images, and sheets of many images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

_MIN_SIDE = 320
"""Smaller pictures are enlarged by a whole factor to about this many pixels, or labels would hide them."""


def class_color(label: int) -> tuple[int, int, int]:
    """A vivid RGB colour per label; labels next to one another are far apart in hue (steps of the golden ratio)."""
    hue = (0.11 + label * 0.618034) % 1.0
    return tuple(round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.85, 1.0))


def draw_detections(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    masks: Tensor | None = None,
    scores: Tensor | None = None,
    classes: Sequence[str] = (),
    *,
    min_score: float = 0.0,
    min_side: int = _MIN_SIDE,
) -> np.ndarray:
    """Draw objects on an image.

    Args:
        image: (3, H, W) uint8.
        boxes: (N, 4) xyxy in pixels.
        labels: (N,) integers.
        masks: (N, H, W) bool or 0/1, or (N, M, M) probabilities on each box's own grid, or None. Floating-point masks
            are taken as grids.
        scores: (N,), shown beside the class; None for ground truth.
        classes: Names by label; a label without a name shows its number.
        min_score: Objects with a lower score are left out.
        min_side: A smaller picture is enlarged by a whole factor to at least about this many pixels.

    Returns:
        (H', W', 3) uint8, enlarged by a whole factor.
    """
    image, boxes, labels = image.cpu(), boxes.detach().cpu().float(), labels.cpu()
    masks = None if masks is None else masks.detach().cpu()
    scores = None if scores is None else scores.detach().cpu().float()
    if scores is not None:
        shown = scores >= min_score
        boxes, labels, scores = boxes[shown], labels[shown], scores[shown]
        masks = None if masks is None else masks[shown]
    height, width = image.shape[-2:]
    colors = [class_color(int(label)) for label in labels]
    if masks is not None and len(masks):
        if masks.is_floating_point():
            masks = paste_masks(masks, boxes, height, width)
        image = draw_segmentation_masks(image, masks.bool(), alpha=0.45, colors=colors)
    factor = max(1, -(-min_side // max(height, width)))
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture = picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(10, min(18, max(picture.size) // 40)))
    # The least certain first: what is surest ends up on top.
    order = range(len(boxes)) if scores is None else torch.argsort(scores).tolist()
    for position in order:
        x0, y0, x1, y1 = (boxes[position] * factor).tolist()
        x1, y1 = max(x0, x1 - 1), max(y0, y1 - 1)
        draw.rectangle((x0, y0, x1, y1), outline=colors[position], width=2)
        label = int(labels[position])
        text = classes[label] if 0 <= label < len(classes) else str(label)
        if scores is not None:
            text = f"{text} {float(scores[position]):.2f}"
        _draw_label(draw, text, x0, y0, colors[position], font, picture.size)
    return np.asarray(picture)


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Return masks (N, H, W) bool from grids (N, M, M) of probabilities on their boxes (N, 4) xyxy."""
    from pycocotools import mask as mask_api

    from permafrost.data.detection.evaluator import paste_mask

    pasted = [
        mask_api.decode(paste_mask(grid.float().numpy(), box, height, width))
        for grid, box in zip(masks, boxes.tolist())
    ]
    return torch.from_numpy(np.stack(pasted)).bool() if pasted else torch.zeros(0, height, width, dtype=torch.bool)


def _draw_label(draw: ImageDraw.ImageDraw, text: str, x: float, y: float, color: tuple, font, limits: tuple) -> None:
    """Black text on a tag of the class's colour, above the corner (x, y) where there is room, within the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(0, x), max(0, limits[0] - width))
    y = y - height if y >= height else min(y, max(0, limits[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=color)
    draw.text((x + 2 - left, y + 2 - top), text, fill=(0, 0, 0), font=font)


def captioned(picture: np.ndarray, caption: str) -> np.ndarray:
    """A picture (H, W, 3) with a line of text on a dark bar above it."""
    font = ImageFont.load_default(size=14)
    bar = Image.new("RGB", (picture.shape[1], 20), (32, 32, 32))
    ImageDraw.Draw(bar).text((4, 1), caption, fill=(255, 255, 255), font=font)
    return np.concatenate([np.asarray(bar), picture])


def side_by_side(left: np.ndarray, right: np.ndarray, captions: tuple[str, str] = ("predicted", "true")) -> np.ndarray:
    """Two pictures (H, W, 3) uint8 beside one another, each with its caption above."""
    return contact_sheet([captioned(left, captions[0]), captioned(right, captions[1])], columns=2)


def contact_sheet(pictures: Sequence[np.ndarray], columns: int = 4, gap: int = 4) -> np.ndarray:
    """Pictures (H, W, 3) uint8 of any sizes on one sheet, row by row, each in a cell of the largest size.

    Args:
        pictures: At least one.
        columns: Pictures in a row.
        gap: Pixels between cells.
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
