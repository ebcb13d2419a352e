"""Merge segments into the class of every pixel, over all views of an image.

Works on the device of the results and streams: what is kept is the sum of one image's scores, never those of a data set.

Shapes: Q segments, K classes, H W size of the image on disk, h w size of what a view shows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from permafrost.data.errors import DataError
from permafrost.data.segmentation.types import SegmentationResult

_MAX_ELEMENTS = 1 << 26
"""Of scores resized at once: 256 MB."""


def class_scores(result: SegmentationResult) -> Tensor:
    """Return (K, h, w) float32: of every pixel and class, the sum over segments of the probabilities of both, multiplied.

    Mask2Former's semantic inference (Cheng et al. 2022): masks are resized as logits to the padded input, then cut to the image.
    """
    height, width = result.size
    masks = F.interpolate(result.mask_logits[None], size=result.canvas, mode="bilinear", align_corners=False)[0]
    shares = masks[:, :height, :width].sigmoid()
    return (result.class_scores.mT @ shares.flatten(1)).view(-1, height, width)


def best_class(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the class with the highest score, (H, W) uint8, of scores (K, h, w) resized to `size`; the first among equals.

    A few classes are resized at a time: a photo of 12 million pixels has 7 GB of scores for 150.
    """
    if tuple(scores.shape[-2:]) == tuple(size):
        return scores.argmax(dim=0).to(torch.uint8)
    at_once = max(1, _MAX_ELEMENTS // (size[0] * size[1]))

    def best_from(start: int) -> tuple[Tensor, Tensor]:
        part = F.interpolate(scores[None, start : start + at_once], size=size, mode="bilinear", align_corners=False)[0]
        value, index = part.max(dim=0)
        return value, index + start

    best, winner = best_from(0)
    for start in range(at_once, len(scores), at_once):
        value, index = best_from(start)
        is_better = value > best
        best, winner = torch.where(is_better, value, best), torch.where(is_better, index, winner)
    return winner.to(torch.uint8)


class ViewMerger:
    """Adds up the views of images, one image after the other.

    A view's scores are averaged over overlapping windows, then resized to the image, then averaged over scales and flips.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._image: int | None = None
        self._seen = 0
        self._total: Tensor | None = None
        # The scale and flip whose windows are being added up, their sum, and how many windows each pixel lies in.
        self._open: tuple[tuple[tuple[int, int], bool], Tensor, Tensor] | None = None

    @property
    def unfinished(self) -> int | None:
        """Return the image of which views are still to come; None between images."""
        return self._image

    def add(self, result: SegmentationResult) -> Tensor | None:
        """Add a view; return the class of every pixel, (H, W) uint8, once it is the image's last, None before.

        Raises:
            DataError: the views of an image do not come one after the other.
        """
        view = result.view
        if view is None or (view.count == 1 and view.scaled == result.size and not view.is_flipped):
            self._require(result, 0, 1)
            self._image = None
            return best_class(class_scores(result), result.original_size)
        self._require(result, view.number, view.count)
        scores = class_scores(result)
        if view.is_flipped:
            scores = scores.flip(-1)
        kind = (view.scaled, view.is_flipped)
        if self._open is None or kind != self._open[0]:
            self._close_windows(result.original_size)
            self._open = (kind, scores.new_zeros((len(scores), *view.scaled)), scores.new_zeros(view.scaled))
        _, windows, hits = self._open
        (top, left), (height, width) = view.place, result.size
        windows[:, top : top + height, left : left + width] += scores
        hits[top : top + height, left : left + width] += 1
        self._seen += 1
        if self._seen < view.count:
            return None
        self._close_windows(result.original_size)
        total = self._total
        assert total is not None
        self._reset()
        return best_class(total, result.original_size)

    def _close_windows(self, size: tuple[int, int]) -> None:
        """Add the mean over windows to the total."""
        if self._open is None:
            return
        _, windows, hits = self._open
        scores = (windows / hits.clamp(min=1))[None]
        if tuple(scores.shape[-2:]) != tuple(size):
            scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        self._total = scores[0] if self._total is None else self._total + scores[0]
        self._open = None

    def _require(self, result: SegmentationResult, number: int, count: int) -> None:
        expected = (result.image_id if self._image is None else self._image, self._seen)
        if (result.image_id, number) != expected:
            raise DataError(
                f"view {number} of image {result.image_id} came where view {expected[1]} of image {expected[0]} was due: the views "
                "of an image must reach one evaluator, in order"
            )
        self._image = result.image_id if count > 1 else None
