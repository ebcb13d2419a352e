"""Video files for tests: real ones through PyAV's encoders, and broken ones made from them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from permafrost.data.worlds.motion_files import write_video


def numbered_frames(count, height=64, width=96) -> np.ndarray:
    """Frames that carry their number as bright blocks of a binary code, so that it survives compression; the top left is red."""
    frames = np.full((count, height, width, 3), 60, dtype=np.uint8)
    for number, frame in enumerate(frames):
        frame[: height // 4, : width // 4] = (220, 30, 30)
        for bit in range(8):
            if number >> bit & 1:
                left = bit * width // 8
                frame[height // 2 : 3 * height // 4, left : left + width // 8] = 230
    return frames


def number_of(frame) -> int:
    """The number that a frame of `numbered_frames` carries."""
    height, width = frame.shape[:2]
    row = frame[5 * height // 8]
    return sum(int(row[bit * width // 8 + width // 16].mean() > 145) << bit for bit in range(8))


def write_with(path, frames, *, rate=10, times=None, rotation=0, audio=False) -> Path:
    """A video with times of its own (in 1/90000 s), a rotation in its header, or sound."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "10", "preset": "ultrafast", "g": "7", "bf": "0"}
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 90000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number if times is None else times[number]
            if times is not None:
                frame.time_base = Fraction(1, 90000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path, seconds=1) -> Path:
    """An MP4 with nothing but sound."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        tone = (8000 * np.sin(np.arange(16000 * seconds) / 10)).astype(np.int16)
        for start in range(0, len(tone), 1024):
            frame = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def damaged(content: bytes, kind: str, seed: int) -> bytes:
    """A file's bytes, truncated, with flipped bits, with a zeroed stretch, or with a damaged header."""
    rng = np.random.default_rng([seed, *kind.encode()])
    data = bytearray(content)
    if kind == "truncated":
        return bytes(data[: rng.integers(0, len(data) * 9 // 10)])
    if kind == "flipped":
        for place in rng.integers(0, len(data), 20):
            data[place] ^= 1 << rng.integers(8)
    elif kind == "zeroed":
        start = int(rng.integers(0, len(data) // 2))
        stop = start + int(rng.integers(len(data) // 4, len(data) // 2))
        data[start:stop] = bytes(stop - start)
    else:
        data[4:64] = rng.bytes(60)
        data[-400:-200] = rng.bytes(200)
    return bytes(data)


def write_numbered(path, count=40, **size) -> Path:
    """A plain video of numbered frames."""
    write_video(path, numbered_frames(count, **size), 10, crf=10)
    return path
