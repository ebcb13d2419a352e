"""Draw boxes, masks and labels on images, for people."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import ImageDraw, ImageFont
from pycocotools import mask as mask_api
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from permafrost.data.detection.masks import paste_mask
from permafrost.data.pictures.draw import MIN_SIDE, class_color, enlarged


def draw_detections(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    masks: Tensor | None = None,
    scores: Tensor | None = None,
    classes: Sequence[str] = (),
    *,
    min_score: float = 0.0,
    min_side: int = MIN_SIDE,
) -> np.ndarray:
    """Draw objects on an image.

    Args:
        image: (3, H, W) uint8.
        boxes: (N, 4) xyxy in pixels.
        labels: (N,) integers.
        masks: (N, H, W) bool or 0/1, or (N, M, M) probabilities on each box's own grid, or None. Floating-point masks
            are taken as grids.
        scores: (N,), shown beside the class; None for ground truth.
        classes: names by label; a label without a name shows its number.
        min_score: objects with a lower score are left out.
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
    picture = enlarged(image.permute(1, 2, 0).contiguous().numpy(), min_side)
    factor = picture.width // width
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
    pasted = [
        mask_api.decode(paste_mask(grid.float().numpy(), box, height, width))
        for grid, box in zip(masks, boxes.tolist())
    ]
    return torch.from_numpy(np.stack(pasted)).bool() if pasted else torch.zeros(0, height, width, dtype=torch.bool)


def _draw_label(draw: ImageDraw.ImageDraw, text: str, x: float, y: float, color: tuple, font, limits: tuple) -> None:
    """Draw black text on a tag of the class's colour, above the corner (x, y) where there is room, within the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(0, x), max(0, limits[0] - width))
    y = y - height if y >= height else min(y, max(0, limits[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=color)
    draw.text((x + 2 - left, y + 2 - top), text, fill=(0, 0, 0), font=font)
