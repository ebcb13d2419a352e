"""Configurations of video data sets: values only, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from permafrost.data.errors import DataError
from permafrost.data.task import Progress, SampleExtent, Task, TaskDataConfig

if TYPE_CHECKING:
    from permafrost.data.findings import Finding
    from permafrost.data.video.dataset import KineticsClips
    from permafrost.data.video.inputs import VideoInputs

EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")
"""Which files of a folder are taken for videos."""


@dataclass
class ClipConfig:
    """How a clip is cut out of a video: Video-Swin's public Kinetics-400 recipe by default (32 frames, every second)."""

    num_frames: int = 32
    """T."""
    frame_stride: int = 2
    """Dense sampling: frames from one to the next. A video shorter than the (num_frames - 1) * frame_stride + 1 frames of the window is
    looped: after its last frame comes its first."""
    sampling: Literal["dense", "segment"] = "dense"
    """dense: one window of frames; segment: one frame of each of num_frames equal parts of the video."""
    crop_size: int = 224
    """Side of the square that the network sees, pixels."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Training: range of the random crop's share of the frame's area."""
    flip: float = 0.5
    """Training: probability of a horizontal flip."""
    flip_swaps: tuple[tuple[str, str], ...] = ()
    """Pairs of classes that a flip turns into one another (left to right, right to left)."""
    never_flip: tuple[str, ...] = ()
    """Classes whose clips are never flipped."""
    test_short_side: int = 224
    """Evaluation: what the shorter side is resized to before the crops."""
    test_clips: int = 4
    """Evaluation: clips over time."""
    test_crops: int = 3
    """Evaluation: squares along the longer side."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "frame_stride", "test_clips", "test_crops"):
            if getattr(self, name) < 1:
                raise DataError(f"data.clip.{name} is {getattr(self, name)}: it must be at least 1")
        if self.crop_size < 32:
            raise DataError(f"data.clip.crop_size is {self.crop_size}: give at least 32 pixels")
        if self.test_short_side < self.crop_size:
            raise DataError(
                f"data.clip.test_short_side is {self.test_short_side}: it must not be below crop_size {self.crop_size}"
            )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise DataError(f"data.clip.crop_scale is {self.crop_scale}: give two rising shares above 0 and up to 1")
        if not 0 <= self.flip <= 1:
            raise DataError(f"data.clip.flip is {self.flip}: give a probability between 0 and 1")
        names = [name for pair in self.flip_swaps for name in pair]
        if any(len(pair) != 2 for pair in self.flip_swaps) or len(set(names)) < len(names):
            raise DataError(f"data.clip.flip_swaps is {self.flip_swaps}: give pairs of classes, each class once")
        if both := sorted(set(names) & set(self.never_flip)):
            raise DataError(f"data.clip: {', '.join(both)} stand in flip_swaps and in never_flip: choose one")

    @property
    def num_views(self) -> int:
        """Clips that evaluation makes of each video."""
        return self.test_clips * self.test_crops


@dataclass
class KineticsDataConfig(TaskDataConfig):
    """Videos with one class each, in one of Kinetics' three layouts; see data/video/lists.py."""

    task: ClassVar[Task] = "video"
    input_kind: ClassVar[str] = "video"
    input_suffixes: ClassVar[frozenset[str]] = frozenset(EXTENSIONS)

    root: str = "data/kinetics400"
    layout: Literal["list", "csv", "folders"] = "list"
    """list: lines `path label`; csv: the official annotation with youtube_id and times; folders: one folder per class."""
    train_list: str = "train.txt"
    """The list or CSV of the training split, under root; not read for `folders`."""
    val_list: str = "val.txt"
    train_videos: str = "train"
    """Folder of the training split's videos, under root."""
    val_videos: str = "val"
    class_names: str = ""
    """A file of one class per line, for the layout `list`; empty: the classes are called by their numbers."""
    num_classes: int | None = None
    """Layout `list` without class_names: labels are 0 .. num_classes - 1; None counts them in the training list."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    missing_share: float = 0.1
    """Largest share of listed videos that may be missing (dead links) from a split."""
    corrupt_share: float = 0.01
    """Largest share of videos that cannot be decoded (at least 10 are tolerated)."""
    max_val_videos: int | None = None
    """Evaluate on n videos only, spread evenly over the list; None takes all."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    """auto: decord where it is installed, PyAV elsewhere."""
    decoder_threads: int = 1
    """Threads of each worker's decoder; 1 keeps one core busy."""
    decode_timeout: float = 20.0
    """Seconds after which a video's decoding is ended and the video counts as unreadable."""

    def __post_init__(self) -> None:
        for name in ("missing_share", "corrupt_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"data.{name} is {getattr(self, name)}: give a share between 0 and 1")
        if self.num_classes is not None and self.num_classes < 2:
            raise DataError(f"data.num_classes is {self.num_classes}: give at least 2, or None to count them")
        if self.max_val_videos is not None and self.max_val_videos < 1:
            raise DataError(f"data.max_val_videos is {self.max_val_videos}: give at least 1, or None for all")
        if self.decode_timeout <= 0:
            raise DataError(f"data.decode_timeout is {self.decode_timeout}: give seconds above 0")
        if self.decoder_threads < 0:
            raise DataError(
                f"data.decoder_threads is {self.decoder_threads}: give at least 1, or 0 for FFmpeg's choice"
            )

    def extent(self) -> SampleExtent:
        """See TaskDataConfig."""
        return SampleExtent(self.clip.crop_size, self.clip.num_frames, self.num_classes, objects=1)

    def located(self) -> KineticsDataConfig:
        """The same configuration with files behind it: a built-in world writes them first."""
        return self

    def paths(self, split: str) -> tuple[Path, Path]:
        """(list file, folder of videos) of "train" or "val"."""
        root = Path(self.root).expanduser()
        return root / getattr(self, f"{split}_list"), root / getattr(self, f"{split}_videos")

    def required_paths(self) -> list[Path]:
        """Lists and folders of both splits."""
        pairs = [self.paths(split) for split in ("train", "val")]
        return [
            path for listed, folder in pairs for path in ((folder,) if self.layout == "folders" else (listed, folder))
        ]

    def build_train(self) -> KineticsClips:
        """The training set with augmentation."""
        from permafrost.data.video.dataset import KineticsClips

        return KineticsClips.from_config(self.located(), train=True)

    def build_val(self) -> KineticsClips:
        """The validation set: every view of every video."""
        from permafrost.data.video.dataset import KineticsClips

        return KineticsClips.from_config(self.located(), train=False)

    def check(self, *, decode: bool = True, on_progress: Progress | None = None) -> list[Finding]:
        """See TaskDataConfig and `check_kinetics`."""
        from permafrost.data.video.check import check_kinetics

        return check_kinetics(self, decode=decode, on_progress=on_progress)

    def inputs(self, classes: Sequence[str], category_ids: Sequence[int]) -> VideoInputs:
        """See TaskDataConfig; `category_ids` is not needed."""
        from permafrost.data.video.inputs import VideoInputs

        return VideoInputs(self, classes)


@dataclass
class MotionWorld:
    """Size and difficulty of the built-in world `motion`. Other values are another world, in another cache folder.

    The difficulty (object_size, contrast, clutter) follows the rule of benchmarks/motion_calibration.py.
    """

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
        for name in ("num_train", "num_val"):
            if not 1 <= getattr(self, name) <= 1_000_000:
                raise DataError(f"data.world.{name} is {getattr(self, name)}: give 1 to 1000000 videos")
        if not 32 <= self.side <= 1024 or self.side % 2:
            raise DataError(f"data.world.side is {self.side}: give an even number of pixels from 32 to 1024")
        if not 4 <= self.num_frames <= 1000 or not 1 <= self.rate <= 120:
            raise DataError(
                f"data.world: {self.num_frames} frames at {self.rate} a second: give 4 to 1000 frames at 1 to 120"
            )
        if not 0.05 <= self.object_size[0] <= self.object_size[1] <= 0.45:
            raise DataError(f"data.world.object_size is {self.object_size}: give two rising shares within 0.05..0.45")
        if self.clutter < 0 or self.seed < 0:
            raise DataError("data.world.clutter and data.world.seed cannot be negative")
        for name in ("contrast", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"data.world.{name} is {getattr(self, name)}: give a value between 0 and 1")


@dataclass
class MotionDataConfig(KineticsDataConfig):
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

    @property
    def fills_cache(self) -> bool:
        """Unless `root` names a folder."""
        return not self.root

    def required_paths(self) -> list[Path]:
        """None: whoever lacks the world renders it."""
        return []

    def extent(self) -> SampleExtent:
        """See TaskDataConfig."""
        from permafrost.data.worlds.motion import CLASSES

        return replace(super().extent(), num_classes=len(CLASSES))

    def located(self) -> KineticsDataConfig:
        """The same configuration with the world's files written and `root` naming their folder."""
        from permafrost.data.worlds.motion_files import MOTION

        return replace(self, root=str(MOTION.ensure(self.world, Path(self.root) if self.root else None)))
