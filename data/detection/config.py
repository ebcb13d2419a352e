"""Configurations of detection data sets. They hold values only and import no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from permafrost._configuration import Configuration
from permafrost.data.errors import DataError, require, require_within
from permafrost.data.task import SampleExtent, TaskDataConfig


@dataclass
class JitterConfig(Configuration):
    """Large-scale jitter with a fixed-size square crop (the paper, section 3.3; Simple Copy-Paste): training only."""

    scale_range: tuple[float, float] = (0.1, 2.0)
    """The image is resized to this range times the size that fits the square, aspect ratio kept."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color: float = 0.0
    """Strength of brightness, contrast and saturation jitter (0.4: factors within 0.6 to 1.4); 0 is off."""
    min_box_side: float = 1.0
    """Boxes narrower or lower than this many pixels after the crop are dropped."""

    def __post_init__(self) -> None:
        low, high = self.scale_range
        require(0 < low <= high, "jitter.scale_range", self.scale_range, "give two rising factors above 0")
        _check_flip_and_color(self)


@dataclass
class MultiScaleConfig(Configuration):
    """The classical augmentation that keeps the aspect ratio and cuts nothing off: training only; a batch is padded to its largest."""

    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    """Pixels; the shorter side takes one of them, each as likely."""
    max_side: int = 1333
    """The longer side is never above this; the shorter one then is smaller than drawn."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color: float = 0.0
    """As in JitterConfig."""
    min_box_side: float = 1.0
    """Boxes narrower or lower than this many pixels are dropped."""

    def __post_init__(self) -> None:
        if not self.short_sides or min(self.short_sides) < 1 or self.max_side < max(self.short_sides):
            raise DataError(
                f"data.jitter: short_sides {self.short_sides} must be pixels from 1 to max_side ({self.max_side})"
            )
        _check_flip_and_color(self)


def _check_flip_and_color(jitter: JitterConfig | MultiScaleConfig) -> None:
    if not 0 <= jitter.flip <= 1 or not 0 <= jitter.color < 1:
        raise DataError(
            f"data.jitter: flip {jitter.flip} must lie in 0..1 and color {jitter.color} in 0..1, 1 left out"
        )


@dataclass
class EvaluationConfig(Configuration):
    """Resizing and views of images in evaluation and prediction, and what scores the results."""

    resize: Literal["square", "short_side"] = "square"
    """Into the square of data.image_size, padded to it; or by the shorter side, padded to whole multiples of 32."""
    short_side: int = 800
    max_side: int = 1333
    """The longer side is never above this; of a view of another size, above this in proportion."""
    sizes: tuple[int, ...] = ()
    """Multi-scale testing: a view of each image at each of these, shorter sides or sides of squares; empty is one of `short_side`
    or data.image_size. How views become one result: see data/detection/views.py."""
    flip: bool = False
    """Each view mirrored, too."""
    merge_iou: float = 0.5
    """Overlap above which boxes of one class from all views are one object; and from which masks have a vote."""
    merged_masks: Literal["voted", "best"] = "voted"
    """Mean of the masks of a merged box's class that overlap it, weighted by score; or its own."""
    num_detections: int = 100
    """Merged detections kept of an image."""
    scorer: Literal["pycocotools", "faster_coco_eval"] = "pycocotools"
    """The package that computes the average precision; the second, `pip install permafrost[fast-eval]`, gives the same numbers sooner."""

    def __post_init__(self) -> None:
        most = f"give 1 to max_side ({self.max_side}) pixels"
        require_within(self, "evaluation.", "short_side", low=1, high=self.max_side, remedy=most)
        differ = len(set(self.sizes)) == len(self.sizes) and all(size >= 32 for size in self.sizes)
        require(differ, "evaluation.sizes", self.sizes, "give different sizes of at least 32 pixels")
        require(0 < self.merge_iou <= 1, "evaluation.merge_iou", self.merge_iou, "give a share above 0 and at most 1")
        require_within(self, "evaluation.", "num_detections", low=1, remedy="give at least 1")

    def views(self) -> list[tuple[int | None, bool]]:
        """Return, for each view of an image, its size (None: the one that holds without `sizes`), and whether it is mirrored."""
        return [(size, flip) for size in (self.sizes or (None,)) for flip in ((False, True) if self.flip else (False,))]


@dataclass
class CocoDataConfig(TaskDataConfig):
    """Any data set in COCO's layout: annotations/instances_*.json and image folders. Classes are read from the JSON."""

    task: ClassVar[str] = "detection"
    result_names: ClassVar[Mapping[str, str]] = {"bbox": "box", "segm": "mask"}
    many_classes: ClassVar[int] = 80
    many_objects: ClassVar[int] = 100
    """No training image of COCO has more than 93."""

    root: str = "data/coco"
    train_annotations: str = "annotations/instances_train2017.json"
    train_images: str = "train2017"
    val_annotations: str = "annotations/instances_val2017.json"
    val_images: str = "val2017"
    test_annotations: str = "annotations/image_info_test-dev2017.json"
    """Images and categories of a test set whose annotations are not public, for submission files; its name stands behind the last
    underscore."""
    test_images: str = "test2017"
    image_size: int = 1024
    """Side of the square that the network sees, pixels."""
    jitter: JitterConfig | MultiScaleConfig = field(default_factory=JitterConfig)
    """Augmentation of training images: a square crop of a random scale, or a random short side with padding."""
    copy_paste: float = 0.0
    """Probability that objects of a second training image are pasted into an image (Simple Copy-Paste); with a square crop
    only."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    train_share: float = 1.0
    """Train on this share of the training images, 0.01 for 1 % of COCO: exactly round(share * images) of them, chosen by
    `train_share_seed` alone; a smaller share of the same seed is part of a larger one."""
    train_share_seed: int = 0
    semantic: str = ""
    """Maps of the class of every pixel, for heads that learn from them: a folder of PNGs named as the training images, under
    `root` ("stuffthingmaps/train2017"); or "instances", which paints the annotated objects (label) on background (K). Empty:
    none."""
    semantic_classes: int = 183
    """Values 0..semantic_classes-1 of those maps, 255 is ignored; 183 for COCO-stuff."""
    max_val_images: int | None = None
    """Evaluate on the first n images only; None takes all."""
    corrupt_share: float = 0.001
    """Largest share of unreadable training images (at least 10 are tolerated) before the run stops."""
    bad_annotations: Literal["refuse", "drop"] = "refuse"
    """Treatment of single annotations that cannot be used (degenerate or out-of-image box, broken segmentation):
    refuse to start, or leave them out and say how many. COCO's own train2017 has two boxes without height."""
    train_empty_images: bool = False
    """Train also on images without any object; they are left out otherwise."""

    def __post_init__(self) -> None:
        require_within(self, "", "image_size", low=32, remedy="give at least 32 pixels")
        if self.max_val_images is not None:
            require_within(self, "", "max_val_images", low=1, remedy="give at least 1, or None for all")
        require_within(self, "", "corrupt_share", low=0, high=1, remedy="give a share between 0 and 1")
        require(0 < self.train_share <= 1, "train_share", self.train_share, "give a share above 0 and at most 1")
        require_within(self, "", "copy_paste", low=0, high=1, remedy="give a probability between 0 and 1")
        if self.copy_paste and not isinstance(self.jitter, JitterConfig):
            raise DataError(
                "data.copy_paste needs images of one size: use JitterConfig as data.jitter, or set data.copy_paste 0"
            )
        require_within(self, "", "semantic_classes", low=1, high=255, remedy="give 1 to 255 classes")

    def paths(self, split: str) -> tuple[Path, Path]:
        """Return the annotation file and the image folder of "train", "val" or "test", which no run needs."""
        root = Path(self.root).expanduser()
        return root / getattr(self, f"{split}_annotations"), root / getattr(self, f"{split}_images")

    def required_paths(self) -> list[Path]:
        """Return the annotation files and image folders of both splits."""
        return [*self.paths("train"), *self.paths("val")]

    def extent(self) -> SampleExtent:
        """Return the square's side; only the files say the rest."""
        return SampleExtent(self.image_size)
