"""What detection data sets hand to heads, and heads to metrics. Shapes: N objects, C crowd regions, H W size, M mask side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from permafrost.data.pictures.geometry import NO_CLASS, pad_to
from permafrost.data.types import Target, Tensors


@dataclass(frozen=True)
class DetectionView:
    """One of the ways in which an image is looked at in evaluation.

    Attributes:
        number: of this view, from 0.
        count: views of the image.
        is_flipped: whether the image is mirrored, left to right.
    """

    number: int
    count: int
    is_flipped: bool = False


@dataclass
class DetectionTarget(Target):
    """Ground truth of one image, in pixels of the network's input.

    Attributes:
        image_id: the data set's own id.
        boxes: (N, 4) float32, xyxy.
        labels: (N,) int64 in 0..K-1 (contiguous; the data set maps them to its category ids).
        masks: (N, H, W) bool, of the input's size.
        ignore_boxes: (C, 4) float32, xyxy: crowd regions, neither positive nor negative.
        size: (height, width) of the image inside the padded input; what lies beyond is padding.
        original_size: (height, width) of the image on disk.
        semantic: (H, W) uint8 class of every pixel, 255 where there is none; None without semantic maps.
        view: which view of the image this is, in evaluation with several; None is the only one.
    """

    image_id: int
    boxes: Tensor
    labels: Tensor
    masks: Tensor
    ignore_boxes: Tensor
    size: tuple[int, int]
    original_size: tuple[int, int]
    semantic: Tensor | None = None
    view: DetectionView | None = None

    def padded(self, canvas: tuple[int, int]) -> Self:
        """Return the same with masks and map of a larger (height, width)."""
        semantic = None if self.semantic is None else pad_to(self.semantic, canvas, NO_CLASS)
        return replace(self, masks=pad_to(self.masks, canvas, False), semantic=semantic)


@dataclass
class DetectionResult(Tensors):
    """What a detection head found in one image, in pixels of the network's input.

    Attributes:
        image_id: the data set's own id.
        boxes: (N, 4) float32, xyxy, clipped to `size`.
        labels: (N,) int64 in 0..K-1.
        scores: (N,) float32 in [0, 1], descending.
        masks: (N, M, M) float32 probabilities on the box's own grid, or None for a head without masks.
        size: (height, width) of the image inside the padded input.
        original_size: (height, width) of the image on disk; boxes scale by original_size / size.
        view: as of the target; boxes and masks are in the view's own pixels.
    """

    image_id: int
    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None
    size: tuple[int, int]
    original_size: tuple[int, int]
    view: DetectionView | None = None
