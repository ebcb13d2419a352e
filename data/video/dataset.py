"""Read clips of videos with one class each, in one of the layouts of Kinetics that `video/lists.py` describes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from permafrost.data.errors import DataError
from permafrost.data.pictures.draw import captioned, contact_sheet
from permafrost.data.stream.records import PackedRecords, ReplacementTracker, spread
from permafrost.data.task import Split, TaskDataset
from permafrost.data.types import Sample, SampleKey
from permafrost.data.video.config import ClipConfig, KineticsDataConfig
from permafrost.data.video.decoder import Decoder
from permafrost.data.video.errors import VideoError
from permafrost.data.video.evaluator import VideoEvaluator
from permafrost.data.video.inputs import view_sampling
from permafrost.data.video.lists import read_split
from permafrost.data.video.transforms import random_crop, to_clip, view_crop
from permafrost.data.video.types import ClipResult, ClipTarget

SHOWN_FRAMES = 4
"""Frames of a clip that are drawn."""
SHOWN_CLASSES = 2
"""Classes that are named beside them."""


class KineticsClips(TaskDataset):
    """Clips with their class.

    In training index i is video i, and a video that cannot be decoded is replaced by the next readable one, which says so in
    `Sample.replaced`. In evaluation index i is view i % V of video i // V (V views: clips over time, then crops), and a video that
    cannot be decoded gives a black clip marked unreadable, which the evaluator counts and leaves out with all its other views.

    Args:
        config: with files behind it.
        split: "train" augments, "val" gives every view; there is no test set without labels.

    Attributes:
        fingerprint: hash of the list and of what is missing.

    Raises:
        DataError: see `read_split`; or a class of the flip options that does not exist.
    """

    headline = "video/top1"

    def __init__(self, config: KineticsDataConfig, split: Split) -> None:
        train = split == "train"
        listed = read_split(config, split)
        self.config, self.is_train = config, train
        self.classes = listed.classes
        self.category_ids = list(range(len(self.classes)))
        self.notes: list[str] = []
        self.num_missing = len(listed.missing)
        self.num_listed = len(listed.paths) + len(listed.missing)
        if listed.missing:
            self.notes.append(
                f"{self.num_missing} of {self.num_listed} {'training' if train else 'validation'} videos are missing, the "
                f"first: {listed.missing[0]}"
            )
        records: Sequence[tuple[str, int]] = list(zip(listed.paths, listed.labels))
        records = records if train else spread(records, config.max_val_videos)
        self.records = PackedRecords(records)
        self._swapped = _flip_labels(config.clip, self.classes)
        missing = hashlib.sha256("\n".join(listed.missing).encode()).hexdigest()
        self.fingerprint = hashlib.sha256(f"{listed.digest}\n{missing}\n{len(records)}".encode()).hexdigest()
        self.decoder = Decoder(
            timeout=config.decode_timeout, backend=config.decoder, num_threads=config.decoder_threads
        )
        # The last clip decoded for evaluation: the crops of a clip follow one another.
        self._last: tuple[tuple[int, int], Any] | None = None
        # The last video that could not be decoded, and why: its other clips are not tried, each of which could take the whole timeout.
        self._failed: tuple[int, str] | None = None

    @property
    def num_views(self) -> int:
        """Return the number of clips of each video: 1 in training."""
        return 1 if self.is_train else self.config.clip.num_views

    def __len__(self) -> int:
        return len(self.records) * self.num_views

    @property
    def groups(self) -> list[int] | None:  # type: ignore[override]  # computed, not set
        """Return the number of views of each video, whose crops share a decoded clip; None in training."""
        return None if self.is_train else [self.num_views] * len(self.records)

    @property
    def extent(self) -> str:
        """Return the number of videos, and how many clips evaluation makes of them."""
        videos = f"{len(self.records):,} videos"
        return videos if self.is_train else f"{videos} ({len(self):,} clips)"

    def video_path(self, index: int) -> Path:
        """Return the file that sample `index` is cut from."""
        return Path(self.records[index // self.num_views][0])

    def __getitem__(self, key: SampleKey) -> Sample:
        """Decode, cut and augment one clip: image (T, 3, S, S) uint8.

        Raises:
            DataError: in training, a long row of videos cannot be decoded.
        """
        return self._training_clip(key) if self.is_train else self._test_view(key)

    def _training_clip(self, key: SampleKey) -> Sample:
        replaced: list[tuple[str, str]] = []
        for step in range(min(len(self.records), 1000)):
            video = (key.index + step) % len(self.records)
            path, label = self.records[video]
            random = key.generator("clip")
            try:
                frames, _ = self.decoder.read(Path(path), **self._training_sampling(random))
            except VideoError as error:
                replaced.append((path, str(error)))
                continue
            clip = self.config.clip
            images = random_crop(to_clip(frames), clip.crop_size, random, clip.crop_scale)
            flips = torch.rand((), generator=random).item() < clip.flip
            if flips and self._swapped[label] is not None:
                images, label = images.flip(-1), self._swapped[label]
            target = ClipTarget(video, 0, torch.tensor(label, dtype=torch.int64))
            return Sample(images, target, key, replaced)
        raise DataError(
            f"{replaced[0][0]}: {replaced[0][1]}; and none of the {len(replaced) - 1} videos after it can be decoded"
        )

    def _training_sampling(self, random: torch.Generator) -> dict[str, Any]:
        clip = self.config.clip
        draws = torch.rand(clip.num_frames, generator=random, dtype=torch.float64).tolist()
        if clip.sampling == "segment":
            return {"kind": "segment", "length": clip.num_frames, "draws": draws}
        return {"kind": "dense", "length": clip.num_frames, "stride": clip.frame_stride, "draw": draws[0]}

    def _test_view(self, key: SampleKey) -> Sample:
        clip = self.config.clip
        video, view = divmod(key.index, self.num_views)
        moment, crop = divmod(view, clip.test_crops)
        path, label = self.records[video]
        if self._last is None or self._last[0] != (video, moment):
            if self._failed is not None and self._failed[0] != video:
                self._failed = None
            decoded: Any = None if self._failed is None else self._failed[1]
            try:
                if decoded is None:
                    decoded = self.decoder.read(Path(path), **view_sampling(clip, moment))[0]
            except VideoError as error:
                decoded = str(error)
                self._failed = (video, decoded)
            self._last = ((video, moment), decoded)
        decoded = self._last[1]
        target = ClipTarget(video, view, torch.tensor(label, dtype=torch.int64), not isinstance(decoded, str))
        if isinstance(decoded, str):
            images = torch.zeros(clip.num_frames, 3, clip.crop_size, clip.crop_size, dtype=torch.uint8)
            return Sample(images, target, key, [(path, decoded)])
        images = view_crop(to_clip(decoded), clip.test_short_side, clip.crop_size, crop, clip.test_crops)
        return Sample(images, target, key)

    def evaluator(self) -> VideoEvaluator:
        labels = [self.records[index][1] for index in range(len(self.records))]
        paths = [os.path.basename(self.records[index][0]) for index in range(len(self.records))]
        return VideoEvaluator(
            labels,
            self.classes,
            num_views=self.num_views,
            names=paths,
            num_missing=self.num_missing,
            corrupt_share=self.config.corrupt_share,
        )

    def tracker(self) -> ReplacementTracker:
        return ReplacementTracker(len(self.records), self.config.corrupt_share, what="videos")

    def metric_names(self) -> list[str]:
        """Return the names of the shares of right videos, and of each class."""
        measures = ["top1", "top5", "mean_class", *(f"top1-{name}" for name in self.classes)]
        return [f"video/{measure}" for measure in measures]

    def summary(self, metrics: dict[str, float]) -> str:
        """Return the accuracies, and what they are over."""
        shown = ", ".join(f"{name} {metrics[f'video/{name}']:.3f}" for name in ("top1", "top5"))
        counts = {name: int(metrics[f"video/num_{name}"]) for name in ("clips", "videos", "unreadable", "missing")}
        absent = "".join(f", {counts[name]} {name}" for name in ("unreadable", "missing") if counts[name])
        return f"{shown} over {counts['clips']:,} clips of {counts['videos']:,} videos{absent}"

    def caption(self, target: ClipTarget) -> str:
        """Say which video it is, and its class."""
        return f"video {target.video_id}: {self.classes[int(target.label)]}"

    def draw(self, image: torch.Tensor, shown: ClipTarget | ClipResult) -> np.ndarray:
        """Draw some frames of a clip (T, 3, H, W) uint8 beside one another, under its class or the most probable ones."""
        if isinstance(shown, ClipTarget):
            text = self.caption(shown)
        else:
            best = torch.argsort(shown.scores, descending=True, stable=True)[:SHOWN_CLASSES].tolist()
            text = ", ".join(f"{self.classes[label]} {float(shown.scores[label]):.2f}" for label in best)
        chosen = np.linspace(0, len(image) - 1, min(SHOWN_FRAMES, len(image))).round().astype(int)
        frames = [image[index].permute(1, 2, 0).contiguous().numpy() for index in chosen]
        return captioned(contact_sheet(frames, columns=len(frames)), text)


def _flip_labels(clip: ClipConfig, classes: list[str]) -> list[int | None]:
    """Return by label what a flipped clip shows; None for a class that is not flipped."""
    numbers = {name: number for number, name in enumerate(classes)}
    named = [name for pair in clip.flip_swaps for name in pair] + list(clip.never_flip)
    if unknown := [name for name in named if name not in numbers]:
        raise DataError(
            f"data.clip.flip_swaps or never_flip names {', '.join(unknown)}, but the classes are {', '.join(classes[:20])}"
        )
    labels: list[int | None] = list(range(len(classes)))
    for one, other in clip.flip_swaps:
        labels[numbers[one]], labels[numbers[other]] = numbers[other], numbers[one]
    for name in clip.never_flip:
        labels[numbers[name]] = None
    return labels
