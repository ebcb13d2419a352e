"""Cut an image into the views of evaluation: scales, windows, flips. `merging` makes one map of their scores."""

from __future__ import annotations

from torch import Tensor

from permafrost.data.pictures.geometry import (
    NO_CLASS,
    PAD_COLOR,
    crop,
    flip,
    pad_to,
    padded_size,
    resize,
    resize_map,
    short_side_size,
)
from permafrost.data.segmentation.config import SegmentationEvaluationConfig
from permafrost.data.segmentation.types import SegmentationView


def plan_views(
    size: tuple[int, int], image_size: int, evaluation: SegmentationEvaluationConfig
) -> list[SegmentationView]:
    """Return all views of an image of (height, width) `size`, in the order in which they are evaluated.

    Args:
        size: of the image on disk.
        image_size: side of a window, and the shorter side unless `evaluation` names another.
        evaluation: which views.
    """
    short = evaluation.short_side or image_size
    views = []
    for scale in evaluation.scales:
        scaled = short_side_size(*size, short * scale, evaluation.max_side * scale)
        places = [(0, 0)]
        if evaluation.mode == "slide":
            rows, columns = (_starts(side, image_size, evaluation.stride) for side in scaled)
            places = [(top, left) for top in rows for left in columns]
        for is_flipped in (False, True) if evaluation.flip else (False,):
            views += [(scaled, place, is_flipped) for place in places]
    return [SegmentationView(number, len(views), *view) for number, view in enumerate(views)]


def num_whole_views(evaluation: SegmentationEvaluationConfig) -> int:
    """Return the number of views of every image under mode "whole"."""
    return len(evaluation.scales) * (1 + evaluation.flip)


def _starts(side: int, window: int, stride: float) -> list[int]:
    """Return where windows begin along one side: equal steps of at most `stride` windows, the last one flush with the end."""
    rest = side - window
    if rest <= 0:
        return [0]
    steps = -(-rest // max(1, int(window * stride)))
    return [round(rest * step / steps) for step in range(steps + 1)]


def see(
    image: Tensor, labels: Tensor, view: SegmentationView, window: int | None
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Return what the network sees of an image in one view.

    Args:
        image: (3, H, W) uint8.
        labels: (H, W) uint8.
        view: which.
        window: side of the windows; None sees the whole image.

    Returns:
        (3, S, T) uint8 and (S, T) uint8, padded to whole multiples of 32 at the bottom and right; (height, width) of what is not
        padding.
    """
    shown = [resize(image, view.scaled), resize_map(labels, view.scaled)]
    if window is not None:
        (height, width), (top, left) = view.scaled, view.place
        size = (min(window, height - top), min(window, width - left))
        shown = [crop(x, top, left, size) for x in shown]
    image, labels = [flip(x) for x in shown] if view.is_flipped else shown
    height, width = image.shape[-2:]
    canvas = padded_size((height, width))
    return pad_to(image, canvas, PAD_COLOR), pad_to(labels, canvas, NO_CLASS), (height, width)
