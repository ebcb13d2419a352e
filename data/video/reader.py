"""Read single frames of a video file through decord or PyAV, behind one small interface. Imports no torch.

What every backend gives: frames by their number in order of presentation, whatever their times (a file of variable frame rate
has as many frames as it shows pictures), upright (the rotation that a phone writes into the header is applied), RGB.
decord is the faster one; it has no wheel for aarch64, hence the second backend.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from permafrost.data.video.errors import VideoError

if TYPE_CHECKING:
    from av import VideoFrame

Backend = Literal["auto", "decord", "pyav"]

MAX_PIXELS = 64_000_000
"""Largest frame decoded, as for images."""
MAX_BYTES = 4 << 30
"""Most memory that the frames of one request may take."""
_PICTURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
}


class VideoReader(Protocol):
    """One open video.

    Attributes:
        num_frames: pictures that the file shows.
        rate: frames per second, the mean where it varies.
    """

    num_frames: int
    rate: float

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Return (N, H, W, 3) uint8 RGB of the frames with these numbers, in any order, repetitions allowed.

        Raises:
            VideoError: one cannot be decoded.
        """
        ...

    def close(self) -> None:
        """Give the file back."""
        ...


@cache
def chosen_backend(backend: Backend = "auto") -> Literal["decord", "pyav"]:
    """Return the backend; "auto" stands for decord where it is installed, PyAV elsewhere.

    Raises:
        VideoError: the one asked for is not installed.
    """
    if backend == "auto":
        return "decord" if importlib.util.find_spec("decord") else "pyav"
    if importlib.util.find_spec("decord" if backend == "decord" else "av") is None:
        package = "decord" if backend == "decord" else "av"
        raise VideoError(
            f"data.decoder is {backend!r} but {package} is not installed: pip install {package}, or use auto"
        )
    return backend


def open_video(path: Path, backend: Backend = "auto", num_threads: int = 1) -> VideoReader:
    """Open a video file.

    Args:
        path: any container and codec that FFmpeg reads.
        backend: see chosen_backend.
        num_threads: decoding threads; 0 leaves it to FFmpeg.

    Raises:
        VideoError: missing, empty, a picture, without a video stream, or damaged.
    """
    _refuse_by_header(path)
    reader = _DecordReader if chosen_backend(backend) == "decord" else _PyAVReader
    try:
        video = reader(path, num_threads)
    except VideoError:
        raise
    except Exception as error:
        raise VideoError(_opening_problem(path, error)) from error
    if video.num_frames < 1:
        raise VideoError("it holds no frame")
    return video


def _refuse_by_header(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise VideoError("there is no such file") from None
    except OSError as error:
        raise VideoError(f"it cannot be read: {error.strerror or error}") from error
    if not head:
        raise VideoError("the file is empty")
    if not any(head):
        raise VideoError("it begins with zeros: it is no video")
    kind = next((kind for magic, kind in _PICTURES.items() if head.startswith(magic)), None)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        kind = "WebP"
    if kind:
        raise VideoError(f"it is a {kind} picture, not a video, whatever its name says")


def _opening_problem(path: Path, error: Exception) -> str:
    """Return why a file could not be opened: what is inside of it says more than a decoder's message."""
    try:
        import av

        with av.open(str(path)) as container:
            _video_stream(container)
    except VideoError as found:
        return str(found)
    except Exception as own:
        return f"it cannot be opened: {getattr(own, 'strerror', None) or _first_line(own)}"
    return f"it cannot be opened: {_first_line(error)}"


def _video_stream(container: Any) -> Any:
    """Return the stream that is read.

    Raises:
        VideoError: there is none, or nothing here decodes it.
    """
    if not container.streams.video:
        kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
        raise VideoError(f"it holds no video stream, only {', '.join(kinds)}")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise VideoError("it cannot be opened: nothing here decodes its video's codec")
    return stream


def _first_line(error: Exception) -> str:
    # decord's messages begin with a time, a place in its source and the failed check.
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    text = lines[0] if lines else ""
    text = text.split(") ", 1)[-1] if text.startswith("[") and ") " in text else text
    return f"{type(error).__name__}: {text}"


def _check_indices(indices: Sequence[int], num_frames: int) -> None:
    if len(indices) and not 0 <= min(indices) <= max(indices) < num_frames:
        raise IndexError(f"frames {min(indices)} to {max(indices)} of a video of {num_frames}")


def _check_size(width: int, height: int, num_frames: int) -> None:
    if width * height > MAX_PIXELS:
        raise VideoError(f"its frames of {width} x {height} pixels are over the limit of {MAX_PIXELS}")
    if width * height * 3 * num_frames > MAX_BYTES:
        raise VideoError(f"{num_frames} frames of {width} x {height} take more than {MAX_BYTES >> 30} GiB")


class _DecordReader:
    """Frames through decord."""

    def __init__(self, path: Path, num_threads: int) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self._video = decord.VideoReader(str(path), num_threads=num_threads)
        self.num_frames = len(self._video)
        self.rate = float(self._video.get_avg_fps()) if self.num_frames else 0.0

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Return the frames with these numbers as VideoReader has it, each decoded once."""
        _check_indices(indices, self.num_frames)
        unique, places = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        try:
            decoded = self._video.get_batch(unique.tolist()).asnumpy()
        except Exception as error:
            if "size must exactly match" in str(error):
                # Of all widths from 32 to 360 in steps of 4: 48 and 72. It takes a padded row for one of four channels.
                raise VideoError("decord misreads frames as narrow as these: use data.decoder pyav") from error
            raise VideoError(f"frames {unique[0]} to {unique[-1]} cannot be decoded: {_first_line(error)}") from error
        if len(unique) != len(places) or (places[1:] < places[:-1]).any():
            decoded = decoded[places]
        return decoded

    def close(self) -> None:
        """Give the file back."""
        self._video = None


class _PyAVReader:
    """Frames through PyAV: the packets' times are listed once, then each stretch is decoded from the key frame before it."""

    def __init__(self, path: Path, num_threads: int) -> None:
        import av

        self._container = av.open(str(path))
        self._stream = _video_stream(self._container)
        self._stream.codec_context.thread_count = num_threads
        if num_threads != 1:
            self._stream.thread_type = "AUTO"
        times, keys = [], []
        for packet in self._container.demux(self._stream):
            if packet.pts is None or packet.size == 0 or packet.is_discard:
                continue
            times.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
        self._times = np.unique(np.asarray(times, dtype=np.int64))
        self._keys = np.unique(np.asarray(keys, dtype=np.int64))
        self.num_frames = len(self._times)
        span = float((self._times[-1] - self._times[0]) * self._stream.time_base) if self.num_frames > 1 else 0.0
        self.rate = (self.num_frames - 1) / span if span > 0 else float(self._stream.average_rate or 0)

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Return the frames with these numbers as VideoReader has it, each decoded once."""
        import av

        _check_indices(indices, self.num_frames)
        unique, places = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        context = self._stream.codec_context
        _check_size(context.width, context.height, len(unique))
        try:
            decoded = self._decode(self._times[unique])
        except VideoError:
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"frames {unique[0]} to {unique[-1]} cannot be decoded: {_first_line(error)}") from error
        return np.stack([decoded[place] for place in places])

    def _decode(self, times: np.ndarray) -> list[np.ndarray]:
        """Decode the pictures shown at rising times."""
        found: list[np.ndarray] = []
        source = None
        for position, time in enumerate(times):
            before = times[position - 1] if position else None
            key = (
                self._keys[max(0, int(np.searchsorted(self._keys, time, side="right")) - 1)]
                if len(self._keys)
                else None
            )
            # Seek at the first picture, and where a key frame lies between the last picture and this one.
            if source is None or (key is not None and before is not None and key > before):
                start = int(key) if key is not None else int(self._times[0])
                self._container.seek(start, stream=self._stream, backward=True)
                source = self._container.decode(self._stream)
            for frame in source:
                if frame.pts is not None and frame.pts >= time:
                    # A packet may have no picture of its own (a second field), a row of them is damage.
                    place = int(np.searchsorted(self._times, time))
                    if frame.pts > self._times[min(place + 1, self.num_frames - 1)]:
                        raise VideoError(f"frame {place} and the next have no picture")
                    found.append(self._picture(frame))
                    break
            else:
                # A last packet may have no picture of its own: the one before is still shown.
                if not found or time < self._times[-1]:
                    raise VideoError(f"decoding ends before frame {int(np.searchsorted(self._times, time))}")
                found.append(found[-1])
        return found

    @staticmethod
    def _picture(frame: VideoFrame) -> np.ndarray:
        pixels = frame.to_ndarray(format="rgb24")
        # decord turns the pictures itself.
        return np.rot90(pixels, round(frame.rotation / 90))

    def close(self) -> None:
        """Give the file back."""
        self._container.close()
