"""Configurations of video data sets. They hold values only and import no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from permafrost._configuration import Configuration
from permafrost.data.errors import DataError, require, require_within
from permafrost.data.task import SampleExtent, TaskDataConfig

EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")
"""Which files of a folder are taken for videos."""


@dataclass
class ClipConfig(Configuration):
    """Cut of a clip out of a video: Video-Swin's public Kinetics-400 recipe by default (32 frames, every second)."""

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
        counts = ("num_frames", "frame_stride", "test_clips", "test_crops")
        require_within(self, "clip.", *counts, low=1, remedy="it must be at least 1")
        require_within(self, "clip.", "crop_size", low=32, remedy="give at least 32 pixels")
        least = f"it must not be below crop_size {self.crop_size}"
        require_within(self, "clip.", "test_short_side", low=self.crop_size, remedy=least)
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "clip.crop_scale", self.crop_scale, "give two rising shares above 0 and up to 1")
        require_within(self, "clip.", "flip", low=0, high=1, remedy="give a probability between 0 and 1")
        names = [name for pair in self.flip_swaps for name in pair]
        are_pairs = all(len(pair) == 2 for pair in self.flip_swaps) and len(set(names)) == len(names)
        require(are_pairs, "clip.flip_swaps", self.flip_swaps, "give pairs of classes, each class once")
        if both := sorted(set(names) & set(self.never_flip)):
            raise DataError(f"data.clip has {', '.join(both)} both in flip_swaps and in never_flip: choose one")

    @property
    def num_views(self) -> int:
        """Return the number of clips that evaluation makes of each video."""
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
        require_within(self, "", "missing_share", "corrupt_share", low=0, high=1, remedy="give a share between 0 and 1")
        if self.num_classes is not None:
            require_within(self, "", "num_classes", low=2, remedy="give at least 2, or None to count them")
        if self.max_val_videos is not None:
            require_within(self, "", "max_val_videos", low=1, remedy="give at least 1, or None for all")
        require(self.decode_timeout > 0, "decode_timeout", self.decode_timeout, "give seconds above 0")
        require_within(self, "", "decoder_threads", low=0, remedy="give at least 1, or 0 for FFmpeg's choice")

    def extent(self) -> SampleExtent:
        """Return the clip's side and frames, and the classes where they are given."""
        return SampleExtent(self.clip.crop_size, self.clip.num_frames, self.num_classes, objects=1)

    def paths(self, split: str) -> tuple[Path, Path]:
        """Return (list file, folder of videos) of "train" or "val"."""
        root = Path(self.root).expanduser()
        return root / getattr(self, f"{split}_list"), root / getattr(self, f"{split}_videos")

    def required_paths(self) -> list[Path]:
        """Return the lists and folders of both splits."""
        pairs = [self.paths(split) for split in ("train", "val")]
        return [
            path for listed, folder in pairs for path in ((folder,) if self.layout == "folders" else (listed, folder))
        ]
