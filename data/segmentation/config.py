"""Configurations of segmentation data sets. They hold values only and import no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from permafrost._configuration import Configuration
from permafrost.data.errors import DataError, require, require_within
from permafrost.data.task import SampleExtent, TaskDataConfig


@dataclass
class SegmentationJitterConfig(Configuration):
    """Training's augmentation, as the public Mask2Former recipe on ADE20K has it: random scale, square crop, SSD's colour jitter, flip."""

    scale_range: tuple[float, float] = (0.5, 2.0)
    """The shorter side is resized to this range times data.image_size."""
    num_scales: int = 16
    """Steps of that range, each as likely; 1 draws from the whole range."""
    max_side: int = 2560
    """The longer side is never above this, pixels; the shorter one then is smaller than drawn."""
    single_category_limit: float = 1.0
    """Largest share of a crop's labelled pixels that one class may take: up to ten crops are drawn until one keeps it. 1 takes
    the first crop, as the public recipe with Swin does; its ResNet recipes and DeepLab's use 0.75."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color_probability: float = 0.5
    """Of each of the four changes of colour below (Liu et al., SSD, 2016); 0 changes none."""
    brightness: float = 32.0
    """Largest shift, of 255."""
    contrast: float = 0.5
    """Factors lie within 1 - this and 1 + this."""
    saturation: float = 0.5
    """Factors lie within 1 - this and 1 + this."""
    hue: float = 0.1
    """Largest shift, in turns of the circle of colours."""

    def __post_init__(self) -> None:
        low, high = self.scale_range
        require(0 < low <= high, "jitter.scale_range", self.scale_range, "give two rising factors above 0")
        require_within(self, "jitter.", "num_scales", "max_side", low=1, remedy="it must be at least 1")
        limit = self.single_category_limit
        require(0 < limit <= 1, "jitter.single_category_limit", limit, "give a share above 0, 1 for no limit")
        shares = ("flip", "color_probability", "contrast", "saturation")
        require_within(self, "jitter.", *shares, low=0, high=1, remedy="it must lie between 0 and 1")
        if not 0 <= self.brightness <= 255 or not 0 <= self.hue <= 0.5:
            raise DataError(
                f"data.jitter: brightness {self.brightness} must lie in 0..255 and hue {self.hue} in 0..0.5"
            )


@dataclass
class SegmentationEvaluationConfig(Configuration):
    """Views of images in evaluation and prediction: whole or in windows, at one scale or several, flipped too or not."""

    mode: Literal["whole", "slide"] = "whole"
    """The whole image at once, or in overlapping squares of data.image_size whose scores are averaged."""
    short_side: int | None = None
    """What the shorter side is resized to, pixels; None is data.image_size."""
    max_side: int = 2560
    """The longer side is never above this, at scale 1."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of the shorter side; the scores of all are averaged. The public multi-scale test on ADE20K has 0.5 to 1.75 in steps of
    a quarter, with flips: shorter sides of 320 to 1120."""
    flip: bool = False
    """Average over the mirrored image, too."""
    stride: float = 2 / 3
    """Step of the windows as a share of their side."""

    def __post_init__(self) -> None:
        differ = len(set(self.scales)) == len(self.scales) > 0 and min(self.scales) > 0
        require(differ, "evaluation.scales", self.scales, "give different factors above 0")
        remedy = "give a share of the window above 0, at most 1"
        require(0 < self.stride <= 1, "evaluation.stride", self.stride, remedy)
        if self.short_side is not None:
            most = f"give 1 to max_side ({self.max_side}) pixels"
            require_within(self, "evaluation.", "short_side", low=1, high=self.max_side, remedy=most)


@dataclass
class ADE20KDataConfig(TaskDataConfig):
    """Any data set in the layout of ADE20K's SceneParsing release: photos, and PNGs of labels beside them, 0 = ignore."""

    task: ClassVar[str] = "segmentation"
    many_classes: ClassVar[int] = 150
    many_objects: ClassVar[int] = 30
    objects_are: ClassVar[str] = "classes"

    root: str = "data/ADEChallengeData2016"
    train_images: str = "images/training"
    train_annotations: str = "annotations/training"
    val_images: str = "images/validation"
    val_annotations: str = "annotations/validation"
    test_images: str = "release_test/testing"
    """Photos without labels, for submission files; under root, or anywhere."""
    class_info: str = "objectInfo150.txt"
    """Table of the classes under root, a line for each label from 1; where ADE20K's is missing, its 150 names are known."""
    image_size: int = 640
    """Side of the square crops that training sees, pixels; evaluation's shorter side too, unless it says otherwise."""
    jitter: SegmentationJitterConfig = field(default_factory=SegmentationJitterConfig)
    evaluation: SegmentationEvaluationConfig = field(default_factory=SegmentationEvaluationConfig)
    max_val_images: int | None = None
    """Evaluate on n images only, spread evenly over the names; None takes all."""
    corrupt_share: float = 0.001
    """Largest share of unusable training pairs (at least 10 are tolerated) before the run stops."""

    def __post_init__(self) -> None:
        require_within(self, "", "image_size", low=32, remedy="give at least 32 pixels")
        if self.max_val_images is not None:
            require_within(self, "", "max_val_images", low=1, remedy="give at least 1, or None for all")
        require_within(self, "", "corrupt_share", low=0, high=1, remedy="give a share between 0 and 1")

    def paths(self, split: str) -> tuple[Path, Path]:
        """Return the folders of photos and of label PNGs of "train" or "val"."""
        root = Path(self.root).expanduser()
        return root / getattr(self, f"{split}_images"), root / getattr(self, f"{split}_annotations")

    def required_paths(self) -> list[Path]:
        """Return the folders of photos and labels of both splits."""
        return [*self.paths("train"), *self.paths("val")]

    def extent(self) -> SampleExtent:
        """Return the crops' side; only the files say the rest."""
        return SampleExtent(self.image_size)
