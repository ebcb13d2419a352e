"""Targets that data sets hand to heads, and results that heads hand on. Shapes: N objects, C crowd regions, H W size, M mask side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from permafrost.data.pictures.geometry import NO_CLASS, pad_to
from permafrost.data.types import SampleKey, Target, Tensors


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

    @classmethod
    def made_up(cls, key: SampleKey, *, side: int, num_classes: int, objects: int) -> Self:
        """Return objects of all sizes, everywhere: diameters of 4 % to 60 % of the image, most of them small, as in photographs."""
        generator = key.generator("plan")
        sides = side * 0.04 * 15 ** torch.rand(objects, 2, generator=generator).prod(dim=1, keepdim=True).expand(-1, 2)
        corner = torch.rand(objects, 2, generator=generator) * (side - sides)
        boxes = torch.cat([corner, corner + sides], dim=1)
        masks = torch.zeros(objects, side, side, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
            mask[top : bottom + 1, left : right + 1] = True
        return cls(
            image_id=key.index,
            boxes=boxes,
            labels=torch.randint(num_classes, (objects,), generator=key.generator("plan/labels")),
            masks=masks,
            ignore_boxes=torch.zeros(0, 4),
            size=(side, side),
            original_size=(side, side),
            semantic=torch.zeros(side, side, dtype=torch.uint8),
        )

    @classmethod
    def pixel_bytes(cls, objects: int) -> int:
        """Return the bytes of the masks."""
        return objects

    def padded(self, canvas: tuple[int, int]) -> Self:
        """Return the same with masks and map of a larger (height, width)."""
        semantic = None if self.semantic is None else pad_to(self.semantic, canvas, NO_CLASS)
        return replace(self, masks=pad_to(self.masks, canvas, False), semantic=semantic)


@dataclass
class DetectionResult(Tensors):
    """Objects that a detection head found in one image, in pixels of the network's input.

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
