"""What data sets hand to heads, and heads to metrics. Shapes: B batch, H W size, N objects, M mask side."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleKey:
    """Where a sample stands in the stream: everything random about it is a function of these three numbers.

    Augmentation in a worker and sampling inside a head draw from generators derived from the key, so the result does
    not depend on the number of workers, ranks or nodes, nor on what ran before.
    """

    seed: int
    epoch: int
    index: int

    def generator(self, purpose: str) -> torch.Generator:
        """A fresh CPU generator for one named purpose; equal keys and purposes give equal streams."""
        digest = hashlib.sha256(f"{self.seed}/{self.epoch}/{self.index}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


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
class DetectionTarget:
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

    def to(self, device: torch.device | str) -> DetectionTarget:
        """The same target with its tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> DetectionTarget:
        """The same target with its tensors in page-locked memory, from where copies to a GPU are asynchronous."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> DetectionTarget:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)


@dataclass
class Sample:
    """One image as a data set gives it.

    Attributes:
        image: (3, H, W) uint8; a clip is (T, 3, H, W).
        target: what is known about it; DetectionTarget for detection, SegmentationTarget for segmentation, ClipTarget for videos.
        key: where it stands in the stream.
        replaced: files that could not be read and in whose place this image stands: (path, reason).
    """

    image: Tensor
    target: Any
    key: SampleKey
    replaced: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class DetectionResult:
    """What a detection head found in one image, in pixels of the network's input.

    Attributes:
        image_id: the data set's own id.
        boxes: (N, 4) float32, xyxy, clipped to `size`.
        labels: (N,) int64 in 0..K-1.
        scores: (N,) float32 in [0, 1], descending.
        masks: (N, M, M) float32 probabilities on the box's own grid, or None for a head without masks.
        size: (height, width) of the image inside the padded input.
        original_size: (height, width) of the image on disk; boxes scale by original_size / size.
        view: see DetectionTarget; boxes and masks are in the view's own pixels.
    """

    image_id: int
    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None
    size: tuple[int, int]
    original_size: tuple[int, int]
    view: DetectionView | None = None

    def cpu(self) -> DetectionResult:
        """The same result with its tensors in host memory."""
        masks = None if self.masks is None else self.masks.cpu()
        return replace(self, boxes=self.boxes.cpu(), labels=self.labels.cpu(), scores=self.scores.cpu(), masks=masks)


@dataclass
class ClipTarget:
    """What is known about one clip of a video.

    Attributes:
        video_id: position of the video in its data set's list.
        view: which of the video's test views this clip is; 0 in training.
        label: () int64 in 0..K-1.
        is_readable: False for a clip that stands for a video which could not be decoded: it is not scored.
    """

    video_id: int
    view: int
    label: Tensor
    is_readable: bool = True

    def to(self, device: torch.device | str) -> ClipTarget:
        """The same target with its label on `device`."""
        return replace(self, label=self.label.to(device, non_blocking=True))

    def pin_memory(self) -> ClipTarget:
        """The same target with its label in page-locked memory."""
        return replace(self, label=self.label.pin_memory())


@dataclass
class ClipResult:
    """What a video head says about one clip.

    Attributes:
        video_id: see ClipTarget.
        view: see ClipTarget.
        scores: (K,) float32 probabilities.
        is_readable: see ClipTarget.
    """

    video_id: int
    view: int
    scores: Tensor
    is_readable: bool = True

    def cpu(self) -> ClipResult:
        """The same result with its scores in host memory."""
        return replace(self, scores=self.scores.cpu())


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
class SegmentationTarget:
    """What is known about the pixels of one image.

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

    def to(self, device: torch.device | str) -> SegmentationTarget:
        """The same target with its tensors on `device`."""
        labels, semantic = (x.to(device, non_blocking=True) for x in (self.labels, self.semantic))
        return replace(self, labels=labels, semantic=semantic)

    def pin_memory(self) -> SegmentationTarget:
        """The same target with its tensors in page-locked memory."""
        return replace(self, labels=self.labels.pin_memory(), semantic=self.semantic.pin_memory())


@dataclass
class SegmentationResult:
    """What a segmentation head says about one image: segments, of which every pixel and class takes its share.

    The scores of all classes at all pixels would be hundreds of times larger.

    Attributes:
        image_id: see SegmentationTarget.
        class_scores: (Q, K) float32 probabilities; what they lack to 1 is that of no segment.
        mask_logits: (Q, h, w) float32 over the whole padded input.
        canvas: (height, width) of the padded input.
        size: (height, width) of the image inside it.
        original_size: (height, width) of the image on disk.
        view: see SegmentationTarget.
    """

    image_id: int
    class_scores: Tensor
    mask_logits: Tensor
    canvas: tuple[int, int]
    size: tuple[int, int]
    original_size: tuple[int, int]
    view: SegmentationView | None = None

    def cpu(self) -> SegmentationResult:
        """The same result with its tensors in host memory."""
        return replace(self, class_scores=self.class_scores.cpu(), mask_logits=self.mask_logits.cpu())


@dataclass
class Batch:
    """One rank's share of a step.

    Attributes:
        images: (B, 3, H, W) uint8, padded bottom and right to one size (with `transforms.PAD_COLOR`); clips are
            (B, T, 3, H, W).
        targets: one per image or clip; DetectionTarget for detection, SegmentationTarget for segmentation, ClipTarget for videos.
        keys: one per image.
        replaced: files that could not be read and were replaced by a neighbour: (path, reason).
        is_padding: True for a batch that only keeps ranks in step during evaluation; its results are dropped.
    """

    images: Tensor
    targets: list[Any]
    keys: list[SampleKey]
    replaced: list[tuple[str, str]] = field(default_factory=list)
    is_padding: bool = False

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(
            self.images.to(device, non_blocking=True),
            [target.to(device) for target in self.targets],
            self.keys,
            self.replaced,
            self.is_padding,
        )

    def pin_memory(self) -> Batch:
        """The same batch with its tensors in page-locked memory; torch's DataLoader calls this."""
        return replace(self, images=self.images.pin_memory(), targets=[target.pin_memory() for target in self.targets])
