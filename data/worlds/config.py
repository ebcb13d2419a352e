"""Configurations of the built-in worlds, and of the data sets that read their files. They hold values only and import no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from permafrost._configuration import Configuration
from permafrost.data.detection.config import CocoDataConfig
from permafrost.data.errors import DataError, require, require_within
from permafrost.data.segmentation.config import ADE20KDataConfig
from permafrost.data.task import SampleExtent, TaskDataConfig
from permafrost.data.video.config import ClipConfig, KineticsDataConfig

TEXTURES = ("stripes", "checkers", "noise", "gradient")


@dataclass
class ShapesWorld(Configuration):
    """Size and difficulty of the built-in world `shapes`. Other values are another world, in another cache folder."""

    classes: ClassVar[tuple[str, ...]] = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")

    num_train: int = 2000
    num_val: int = 300
    image_side: int = 160
    """Side of the square images, pixels."""
    objects: tuple[int, int] = (2, 5)
    """Fewest and most objects tried in an image; one that finds no place is left out."""
    object_size: tuple[float, float] = (0.15, 0.45)
    """Diameter of an object as a share of the image's side, drawn log-uniformly."""
    min_visible: float = 0.4
    """Share of its area that every object keeps visible; 1 allows no occlusion."""
    stretch: float = 1.25
    """Largest ratio of an object's two axes; 1 never stretches."""
    rotation: float = 1.0
    """Share of a half turn that objects are rotated by, to either side; 0 keeps all upright."""
    contrast: float = 0.3
    """Least difference of an object's colour from the ground below it, in the clearest of R, G and B (0..1)."""
    background_contrast: float = 0.4
    """Difference of the two colours of a background's texture, as a share of that between two random colours."""
    textured_share: float = 0.5
    """Share of objects filled with a texture instead of one colour."""
    clutter: int = 4
    """Most distracting strokes in an image."""
    crowd_share: float = 0.08
    """Share of images with a crowd: one region of many tiny shapes, annotated iscrowd."""
    noise: float = 0.02
    """Standard deviation of the pixel noise; pixels are in 0..1."""
    seed: int = 0

    def __post_init__(self) -> None:
        most = "give 1 to 1000000 images"
        require_within(self, "world.", "num_train", "num_val", low=1, high=1_000_000, remedy=most)
        require_within(self, "world.", "image_side", low=32, high=4096, remedy="give 32 to 4096 pixels")
        (fewest, greatest), (small, large) = self.objects, self.object_size
        require(1 <= fewest <= greatest, "world.objects", self.objects, "give fewest and most, at least 1")
        remedy = "give two rising shares of the side within 0..1"
        require(0 < small <= large <= 1, "world.object_size", self.object_size, remedy)
        require_within(self, "world.", "stretch", low=1, remedy="a ratio of axes is at least 1")
        if self.clutter < 0 or self.seed < 0:
            raise DataError("data.world.clutter and data.world.seed cannot be negative")
        shares = ("rotation", "contrast", "background_contrast", "textured_share", "crowd_share", "noise")
        require_within(self, "world.", *shares, low=0, high=1, remedy="give a value between 0 and 1")
        require(0 < self.min_visible <= 1, "world.min_visible", self.min_visible, "give a share above 0 and up to 1")


@dataclass
class SceneryWorld(ShapesWorld):
    """The built-in world `scenery`: the objects of `shapes` on areas of stuff. Other values are another world, in another cache folder."""

    classes: ClassVar[tuple[str, ...]] = (*ShapesWorld.classes, *TEXTURES)
    """In the order of the labels, which count from 1."""

    regions: tuple[int, int] = (1, 3)
    """Fewest and most regions of a background; each has a texture of its own, which is its class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fewest, most = self.regions
        require(1 <= fewest <= most <= 4, "world.regions", self.regions, "give fewest and most, within 1 to 4")


@dataclass
class MotionWorld(Configuration):
    """Size and difficulty of the built-in world `motion`. Other values are another world, in another cache folder.

    The difficulty (object_size, contrast, clutter) follows the rule of benchmarks/motion_calibration.py.
    """

    classes: ClassVar[tuple[str, ...]] = (
        "moves_right",
        "moves_left",
        "grows",
        "shrinks",
        "speeds_up",
        "slows_down",
        "passes_before",
        "passes_behind",
        "turns_star",
        "turns_cross",
    )
    num_train: int = 800
    num_val: int = 200
    side: int = 64
    """Side of the square frames, pixels; even."""
    num_frames: int = 24
    rate: int = 12
    """Frames per second."""
    object_size: tuple[float, float] = (0.33, 0.45)
    """Diameter of the moving object as a share of the side."""
    clutter: int = 0
    """Most resting shapes in the background."""
    contrast: float = 0.6
    """Least difference of the moving object's colour from the background's mean, in the clearest of R, G and B."""
    noise: float = 0.02
    """Standard deviation of the pixel noise; pixels are in 0..1."""
    seed: int = 0

    def __post_init__(self) -> None:
        most = "give 1 to 1000000 videos"
        require_within(self, "world.", "num_train", "num_val", low=1, high=1_000_000, remedy=most)
        is_even = 32 <= self.side <= 1024 and self.side % 2 == 0
        require(is_even, "world.side", self.side, "give an even number of pixels from 32 to 1024")
        if not 4 <= self.num_frames <= 1000 or not 1 <= self.rate <= 120:
            raise DataError(
                f"data.world: {self.num_frames} frames at {self.rate} a second: give 4 to 1000 frames at 1 to 120"
            )
        small, large = self.object_size
        remedy = "give two rising shares within 0.05..0.45"
        require(0.05 <= small <= large <= 0.45, "world.object_size", self.object_size, remedy)
        if self.clutter < 0 or self.seed < 0:
            raise DataError("data.world.clutter and data.world.seed cannot be negative")
        require_within(self, "world.", "contrast", "noise", low=0, high=1, remedy="give a value between 0 and 1")


class _Rendered(TaskDataConfig):
    """A data set that is rendered once, into `root` or the cache folder."""

    @property
    def fills_cache(self) -> bool:
        """Tell whether `root` names no folder."""
        return not self.root

    def required_paths(self) -> list[Path]:
        """Return none: whoever lacks the world renders it."""
        return []


@dataclass
class ShapesDataConfig(_Rendered, CocoDataConfig):
    """The built-in world `shapes`: rendered once into a cache folder, then read like any COCO data set."""

    root: str = ""
    """Folder of the files; empty is a folder under $PERMAFROST_CACHE or ~/.cache/permafrost."""
    test_annotations: str = "annotations/instances_val2017.json"
    test_images: str = "val2017"
    image_size: int = 160
    world: ShapesWorld = field(default_factory=ShapesWorld)

    def extent(self) -> SampleExtent:
        """Return the extent that the world's parameters give."""
        return SampleExtent(self.image_size, num_classes=len(self.world.classes), objects=self.world.objects[1])


@dataclass
class SceneryDataConfig(_Rendered, ADE20KDataConfig):
    """The built-in world `scenery`: rendered once into a cache folder, then read like any data set in ADE20K's layout."""

    root: str = ""
    """Folder of the files; empty is a folder under $PERMAFROST_CACHE or ~/.cache/permafrost."""
    test_images: str = "images/validation"
    class_info: str = "objectInfo.txt"
    image_size: int = 160
    world: SceneryWorld = field(default_factory=SceneryWorld)

    def extent(self) -> SampleExtent:
        """Return the extent that the world's parameters give."""
        num_classes = len(self.world.classes)
        most = min(self.world.objects[1] + self.world.regions[1], num_classes)
        return SampleExtent(self.image_size, num_classes=num_classes, objects=most)


@dataclass
class MotionDataConfig(_Rendered, KineticsDataConfig):
    """The built-in world `motion`: rendered once into a cache folder as MP4 files with lists, then read like Kinetics."""

    root: str = ""
    """Folder of the files; empty is a folder under $PERMAFROST_CACHE or ~/.cache/permafrost."""
    class_names: str = "classes.txt"
    clip: ClipConfig = field(
        default_factory=lambda: ClipConfig(
            num_frames=8,
            frame_stride=3,
            crop_size=64,
            crop_scale=(0.8, 1.0),
            test_short_side=64,
            test_clips=1,
            test_crops=1,
            flip_swaps=(("moves_left", "moves_right"),),
        )
    )
    world: MotionWorld = field(default_factory=MotionWorld)

    def extent(self) -> SampleExtent:
        """Return the clip's side and frames, and the world's classes."""
        return replace(super().extent(), num_classes=len(self.world.classes))
