"""Choose the frames of a video that make a clip. Pure arithmetic; random numbers come in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def dense_indices(
    num_frames: int, length: int, stride: int, *, draw: float | None = None, clip: int = 0, num_clips: int = 1
) -> np.ndarray:
    """Return one window of `length` frames, every `stride`-th (16 x 4, 32 x 2).

    The window spans (T - 1) * stride + 1 frames. Training places it at random; testing spreads `num_clips` windows evenly from the
    start to the end, with the middle one for a single clip. A video shorter than the window is looped: frame n is frame n
    modulo its length.

    Args:
        num_frames: of the video.
        length: T.
        stride: frames from one to the next.
        draw: in [0, 1) for training; None for testing.
        clip: which of the test windows.
        num_clips: test windows.

    Returns:
        (T,) int64 frame numbers.
    """
    room = max(0, num_frames - (length - 1) * stride - 1)
    if draw is None:
        draw = 0.5 if num_clips == 1 else clip / (num_clips - 1)
    start = min(int(draw * (room + 1)), room)
    return (start + np.arange(length) * stride) % num_frames


def segment_indices(
    num_frames: int, length: int, *, draws: Sequence[float] | None = None, clip: int = 0, num_clips: int = 1
) -> np.ndarray:
    """Return one frame of each of `length` equal segments (Wang et al., Temporal Segment Networks, ECCV 2016).

    Training takes a random frame of each segment, testing the one in the middle, or with several clips evenly spread ones. Segments of
    a video with fewer frames than segments repeat frames.

    Args:
        num_frames: of the video.
        length: T.
        draws: T numbers in [0, 1) for training; None for testing.
        clip: which of the test clips.
        num_clips: test clips.

    Returns:
        (T,) int64 frame numbers, rising.
    """
    within = (clip + 0.5) / num_clips if draws is None else np.asarray(draws)
    indices = np.floor((np.arange(length) + within) * num_frames / length).astype(np.int64)
    return np.minimum(indices, num_frames - 1)


def choose_frames(num_frames: int, kind: str, **arguments: Any) -> np.ndarray:
    """Return the numbers of the frames that are asked of a video.

    Args:
        num_frames: of the video.
        kind: "dense" or "segment", whose functions take `arguments`; "all", of which `most` are taken; or "frames", by `indices`.
    """
    if kind == "dense":
        return dense_indices(num_frames, **arguments)
    if kind == "segment":
        return segment_indices(num_frames, **arguments)
    if kind == "all":
        return np.arange(min(num_frames, arguments["most"]))
    return np.asarray(arguments["indices"], dtype=np.int64)
