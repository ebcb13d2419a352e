"""Targets that data sets hand to heads, and results that heads hand on. Shapes: H W size, N classes in an image, Q segments, K classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from permafrost.data.pictures.geometry import NO_CLASS, pad_to
from permafrost.data.types import SampleKey, Target, Tensors


@dataclass(frozen=True)
class SegmentationView:
    """One of the ways in which an image is looked at in evaluation: a window of the resized image, mirrored or not.

    Attributes:
        number: of this view, from 0.
        count: views of the image.
        scaled: (height, width) of the whole image, resized.
        place: (top, left) of the window in it.
        is_flipped: whether the window's content is mirrored, left to right.
    """

    number: int
    count: int
    scaled: tuple[int, int]
    place: tuple[int, int] = (0, 0)
    is_flipped: bool = False


@dataclass
class SegmentationTarget(Target):
    """Ground truth of the pixels of one image.

    Attributes:
        image_id: the image's position in its data set.
        labels: (N,) int64, the classes that occur in `semantic`, rising.
        semantic: (H, W) uint8 class of every pixel of the input in 0..K-1; 255 is ignored, padding included.
        size: (height, width) of the image inside the padded input; what lies beyond is padding.
        original_size: (height, width) of the image on disk.
        view: which part of the image this is, in evaluation; None is all of it, or a training sample.
    """

    image_id: int
    labels: Tensor
    semantic: Tensor
    size: tuple[int, int]
    original_size: tuple[int, int]
    view: SegmentationView | None = None

    @classmethod
    def made_up(cls, key: SampleKey, *, side: int, num_classes: int, objects: int) -> Self:
        """Return as many classes as there are to be, in upright stripes."""
        count = min(objects, num_classes)
        stripes = torch.arange(side) * count // side
        semantic = stripes.to(torch.uint8).expand(side, side).contiguous()
        return cls(key.index, torch.arange(min(count, side)), semantic, size=(side, side), original_size=(side, side))

    @classmethod
    def pixel_bytes(cls, objects: int) -> int:
        """Return the bytes of the map."""
        return 1

    def padded(self, canvas: tuple[int, int]) -> Self:
        """Return the same with a map of a larger (height, width)."""
        return replace(self, semantic=pad_to(self.semantic, canvas, NO_CLASS))


@dataclass
class SegmentationResult(Tensors):
    """Result of a segmentation head for one image: segments, of which every pixel and class takes its share.

    The scores of all classes at all pixels would be hundreds of times larger.

    Attributes:
        image_id: as of the target.
        class_scores: (Q, K) float32 probabilities; what they lack to 1 is that of no segment.
        mask_logits: (Q, h, w) float32 over the whole padded input.
        canvas: (height, width) of the padded input.
        size: (height, width) of the image inside it.
        original_size: (height, width) of the image on disk.
        view: as of the target.
    """

    image_id: int
    class_scores: Tensor
    mask_logits: Tensor
    canvas: tuple[int, int]
    size: tuple[int, int]
    original_size: tuple[int, int]
    view: SegmentationView | None = None
