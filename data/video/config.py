"""Configurations of video data sets: values only, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from permafrost.data.errors import DataError
from permafrost.data.task import SampleExtent, TaskDataConfig

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

    task: ClassVar[str] = "video"
    many_classes: ClassVar[int] = 400
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
        """Return the clip's side and frames, and the classes where they are given."""
        return SampleExtent(self.clip.crop_size, self.clip.num_frames, self.num_classes, objects=1)

    @property
    def place(self) -> str:
        """Return `root`."""
        return self.root

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
