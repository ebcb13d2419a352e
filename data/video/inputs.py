"""Videos without labels, for a video head: they are seen in the views of evaluation and written again with the best classes beneath."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from permafrost._files import replacing
from permafrost.data.errors import DataError
from permafrost.data.pictures.draw import class_color
from permafrost.data.types import Sample, SampleKey
from permafrost.data.video.config import ClipConfig, KineticsDataConfig
from permafrost.data.video.decoder import Decoder
from permafrost.data.video.errors import VideoError
from permafrost.data.video.sampling import choose_frames
from permafrost.data.video.transforms import to_clip, view_crop
from permafrost.data.video.types import ClipResult, ClipTarget

TOP = 5
_NAMED = 2
_MIN_WIDTH = 320
"""Narrower videos are enlarged by a whole factor, or names would not fit."""
_CHUNK_BYTES = 64 << 20
"""Frames decoded at a time for the drawing."""
_FALLBACK_RATE = 25


@dataclass
class VideoClass:
    """Classes that one file shows.

    Attributes:
        video_id: position among the inputs.
        num_views: over which the probabilities are averaged.
        top: (label, probability) of the most probable classes, the best first.
        names: of those classes.
    """

    video_id: int
    num_views: int
    top: list[tuple[int, float]]
    names: list[str]


@dataclass
class SourceVideo:
    """Video that a result is drawn on.

    Attributes:
        path: the file.
        num_frames: pictures it shows.
        rate: of them per second, the mean where it varies.
        frame_bytes: of one picture.
    """

    path: Path
    num_frames: int
    rate: float
    frame_bytes: int


class VideoInputs:
    """Reads videos without labels for a video head.

    Args:
        config: which views a video is seen in, and how it is decoded.
        classes: names by label.
        category_ids: not needed; every kind of reader is made alike.
    """

    suffix = ".mp4"
    threshold = 0.0

    def __init__(self, config: KineticsDataConfig, classes: Sequence[str], category_ids: Sequence[int]) -> None:
        self.config, self.classes = config, list(classes)
        self.decoder = Decoder(
            timeout=config.decode_timeout, backend=config.decoder, num_threads=config.decoder_threads
        )

    def read(self, source: Any, index: int) -> tuple[list[Sample], SourceVideo]:
        """Return one sample for each view, and where the video is.

        Args:
            source: a path, or the frames of a video, (T, H, W, 3) uint8 array or (T, 3, H, W) uint8 tensor.
            index: its position among the inputs.

        Raises:
            DataError: it cannot be decoded, or is no video.
        """
        clip = self.config.clip
        samples: list[Sample] = []
        is_file = isinstance(source, (str, os.PathLike))
        file, given = Path(source).expanduser() if is_file else Path(), None if is_file else to_frames(source)
        try:
            for moment in range(clip.test_clips):
                asked = view_sampling(clip, moment)
                if given is None:
                    frames, facts = self.decoder.read(file, **asked)
                else:
                    frames, facts = given[choose_frames(len(given), **asked)], {"num_frames": len(given), "rate": 0.0}
                for crop in range(clip.test_crops):
                    image = view_crop(to_clip(frames), clip.test_short_side, clip.crop_size, crop, clip.test_crops)
                    target = ClipTarget(index, len(samples), torch.tensor(0))
                    samples.append(Sample(image, target, SampleKey(0, 0, index)))
        except VideoError as error:
            raise DataError(f"{file}: {error}") from error
        return samples, SourceVideo(file, facts["num_frames"], facts["rate"], int(frames[0].nbytes))

    def keep(self, results: Sequence[ClipResult], threshold: float) -> VideoClass:
        """Return the best classes of the mean over the views, from the threshold up."""
        scores = torch.stack([result.scores for result in results]).double().mean(dim=0)
        best = torch.argsort(scores, descending=True, stable=True)[:TOP].tolist()
        top = [(label, float(scores[label])) for label in best if scores[label] >= threshold]
        return VideoClass(results[0].video_id, len(results), top, [self.classes[label] for label, _ in top])

    def describe(self, result: VideoClass) -> str:
        """Return the best classes with their probabilities."""
        return ", ".join(f"{self.classes[label]} {score:.2f}" for label, score in result.top[:_NAMED]) or "nothing"

    def entries(self, result: VideoClass, file: Path) -> list[dict[str, Any]]:
        """Return one entry: the file, over how many views, and the best classes, the best first."""
        top = [{"label": k, "class": self.classes[k], "score": round(score, 6)} for k, score in result.top]
        return [{"video_id": result.video_id, "file_name": str(file), "num_views": result.num_views, "top": top}]

    def write(self, source: SourceVideo, result: VideoClass, target: Path) -> None:
        """Write the video as H.264 in MP4, without sound, with the best classes beneath. It ends where decoding fails.

        A video of variable frame rate plays at its mean rate.

        Raises:
            OSError: it cannot be written.
        """
        import av

        panel: np.ndarray | None = None
        with replacing(target) as partial:
            with av.open(str(partial), "w", format="mp4") as sink:
                rate = Fraction(source.rate or _FALLBACK_RATE).limit_denominator(1001)
                stream = sink.add_stream("libx264", rate=rate)
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": "20", "preset": "veryfast"}
                stream.codec_context.thread_count = 1
                for picture in self._pictures(source):
                    shown = _enlarged(picture)
                    if panel is None:
                        panel = draw_panel(result.top, self.classes, shown.shape[1])
                        stream.height, stream.width = shown.shape[0] + panel.shape[0], shown.shape[1]
                    frame = av.VideoFrame.from_ndarray(np.concatenate([shown, panel]), format="rgb24")
                    sink.mux(stream.encode(frame))
                if panel is not None:
                    sink.mux(stream.encode(None))
            if panel is None:
                raise OSError(f"no frame of {source.path} can be decoded once more")

    def _pictures(self, source: SourceVideo) -> Iterator[np.ndarray]:
        """Yield every frame (H, W, 3) uint8, some at a time."""
        length = max(1, _CHUNK_BYTES // max(1, source.frame_bytes))
        for start in range(0, source.num_frames, length):
            indices = list(range(start, min(start + length, source.num_frames)))
            try:
                yield from self.decoder.read(source.path, kind="frames", indices=indices)[0]
            except VideoError:
                return


def to_frames(given: Any) -> np.ndarray:
    """Return the frames that a caller has at hand, (T, H, W, 3) uint8.

    Raises:
        DataError: another type, shape or dtype.
    """
    if not isinstance(given, (np.ndarray, torch.Tensor)):
        raise DataError(
            f"its type is {type(given).__name__}: give a path, a (T, H, W, 3) uint8 array or a (T, 3, H, W) uint8 tensor"
        )
    kind, layout, channels = (
        ("an array", "(T, H, W, 3)", -1) if isinstance(given, np.ndarray) else ("a tensor", "(T, 3, H, W)", 1)
    )
    shape = tuple(given.shape)
    if len(shape) != 4 or shape[channels] != 3 or 0 in shape:
        raise DataError(f"it has the shape {shape}: {kind} of a video's frames must be {layout}, RGB")
    if given.dtype not in (np.uint8, torch.uint8):
        raise DataError(f"its pixels are {given.dtype}: give uint8, 0 to 255")
    # An array is copied: torch warns of one that cannot be written to.
    return np.array(given) if isinstance(given, np.ndarray) else given.detach().cpu().permute(0, 2, 3, 1).numpy()


def view_sampling(clip: ClipConfig, moment: int) -> dict[str, Any]:
    """Return what a Decoder is asked for to get one of evaluation's clips over time."""
    asked = {"kind": clip.sampling, "length": clip.num_frames, "clip": moment, "num_clips": clip.test_clips}
    return asked | {"stride": clip.frame_stride} if clip.sampling == "dense" else asked


def draw_panel(top: Sequence[tuple[int, float]], classes: Sequence[str], width: int) -> np.ndarray:
    """Draw classes with their probabilities as bars.

    Args:
        top: (label, probability).
        classes: names by label.
        width: pixels, even.

    Returns:
        (H, width, 3) uint8, H even and the same for any classes.
    """
    size = max(12, min(24, width // 28))
    line = size + 8
    picture = Image.new("RGB", (width, TOP * line + (TOP * line) % 2), (24, 24, 24))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=size)
    for row, (label, score) in enumerate(top[:TOP]):
        color = tuple(value // 2 for value in class_color(label))
        draw.rectangle((0, row * line + 1, max(1, round(score * (width - 1))), (row + 1) * line - 2), fill=color)
        draw.text((4, row * line + 2), f"{score:.2f}  {classes[label]}", fill=(255, 255, 255), font=font)
    return np.asarray(picture)


def _enlarged(picture: np.ndarray) -> np.ndarray:
    """Enlarge a frame by a whole factor, with its last row or column once more where H.264 asks for even sides."""
    factor = max(1, -(-_MIN_WIDTH // picture.shape[1]))
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
