"""Write every video once with a short side of some 256 pixels, offline, so that training decodes no more than it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from permafrost._files import replacing
from permafrost.data.errors import DataError
from permafrost.data.video.config import EXTENSIONS
from permafrost.data.video.decoder import Decoder
from permafrost.data.video.errors import VideoError

QUALITY = "20"
"""x264's constant rate factor: hardly visible losses."""
KEY_EVERY = 32
"""Frames from one key frame to the next: what a random access decodes in vain."""


def resize_video(path: Path, target: Path, short_side: int) -> dict[str, Any]:
    """Write a video as H.264 in MP4 with its shorter side at `short_side`, without sound, times and rotation kept.

    A smaller video keeps its size. The target appears when it is complete.

    Raises:
        VideoError: there is no video stream, or nothing can be decoded.
    """
    import av

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            replacing(target) as partial,
            av.open(str(path)) as source,
            av.open(str(partial), "w", format="mp4") as sink,
        ):
            if not source.streams.video:
                raise VideoError("it holds no video stream")
            stream = source.streams.video[0]
            output = None
            last, num_frames = -1, 0
            for frame in source.decode(stream):
                if output is None:
                    quarters = round(frame.rotation / 90) % 4
                    width, height = _size(frame.width, frame.height, short_side)
                    output = sink.add_stream("libx264", rate=stream.average_rate or 25)
                    output.width, output.height, output.pix_fmt = width, height, "yuv420p"
                    assert stream.time_base is not None
                    output.time_base = output.codec_context.time_base = stream.time_base
                    output.options = {"crf": QUALITY, "preset": "veryfast", "g": str(KEY_EVERY)}
                    output.codec_context.thread_count = 1
                    if quarters:
                        output.set_display_rotation(90 * quarters)
                frame = frame.reformat(width, height, "yuv420p", interpolation="BILINEAR")
                # Times must rise; damaged files have repeated ones.
                frame.pts = last = max(last + 1, frame.pts if frame.pts is not None else last + 1)
                frame.time_base = stream.time_base
                frame.pict_type = 0
                sink.mux(output.encode(frame))
                num_frames += 1
            if output is None:
                raise VideoError("it holds no frame")
            sink.mux(output.encode(None))
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"it cannot be resized: {type(error).__name__}: {error}".split("\n")[0]) from error
    return {"num_frames": num_frames, "width": width, "height": height}


def _size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return even sides, as H.264 with subsampled colour asks for, never larger than the original."""
    ratio = min(1.0, short_side / min(width, height))
    return max(2, round(width * ratio / 2) * 2), max(2, round(height * ratio / 2) * 2)


@dataclass
class Resized:
    """Outcome of `resize_folder`.

    Attributes:
        num_written: videos written now.
        num_present: videos that were there already.
        failures: (path below the folder, reason).
    """

    num_written: int = 0
    num_present: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


def resize_folder(
    source: Path,
    target: Path,
    short_side: int,
    *,
    num_processes: int,
    timeout: float = 600.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Resized:
    """Resize every video below a folder into the same tree below another; it can be interrupted and started again.

    Each video is decoded in a process that can be killed: a broken one is listed and the rest goes on.

    Args:
        source: nothing in it is changed.
        target: becomes a copy of the tree with .mp4 files; other files (lists, annotations) are not copied.
        short_side: pixels.
        num_processes: videos at once.
        timeout: seconds for one video.
        on_progress: called with videos done and in all.

    Raises:
        DataError: no such folder, no video in it, or the target lies inside of it.
    """
    if not source.is_dir():
        raise DataError(f"{source}: there is no such folder of videos")
    if target.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{target} lies inside {source}: resized copies need a folder of their own")
    videos = sorted(path for path in source.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not videos:
        raise DataError(f"{source}: there is no video ({', '.join(EXTENSIONS)}) in it")
    result = Resized()
    wanted = [(path, target / path.relative_to(source).with_suffix(".mp4")) for path in videos]
    open_jobs = [(path, out) for path, out in wanted if not out.exists()]
    result.num_present = len(wanted) - len(open_jobs)
    parts = [open_jobs[part::num_processes] for part in range(num_processes)]
    done = result.num_present

    def work(jobs: Iterable[tuple[Path, Path]]) -> None:
        nonlocal done
        decoder = Decoder(timeout=timeout)
        try:
            for path, out in jobs:
                try:
                    decoder.resize(path, out, short_side)
                    result.num_written += 1
                except VideoError as error:
                    result.failures.append((str(path.relative_to(source)), str(error)))
                done += 1
                if on_progress is not None:
                    on_progress(done, len(wanted))
        finally:
            decoder.close()

    with ThreadPoolExecutor(max_workers=num_processes) as pool:
        list(pool.map(work, parts))
    result.failures.sort()
    return result
