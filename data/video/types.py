"""Targets that video data sets hand to heads, and results that heads hand to metrics. Shapes: K classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from permafrost.data.types import SampleKey, Target, Tensors


@dataclass
class ClipTarget(Target):
    """Ground truth of one clip of a video.

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

    @classmethod
    def made_up(cls, key: SampleKey, *, side: int, num_classes: int, objects: int) -> Self:
        """Return a clip of some class."""
        label = torch.randint(num_classes, (1,), generator=key.generator("plan/labels"))[0]
        return cls(video_id=key.index, view=0, label=label)


@dataclass
class ClipResult(Tensors):
    """Result of a video head for one clip.

    Attributes:
        video_id: as of the target.
        view: as of the target.
        scores: (K,) float32 probabilities.
        is_readable: as of the target.
    """

    video_id: int
    view: int
    scores: Tensor
    is_readable: bool = True
