"""The files of the built-in world `motion`: H.264 in MP4 with lists in Kinetics' layout, written once into a cache folder.

    classes.txt   train.txt   val.txt   train/00000.mp4 ...   val/00000.mp4 ...

Equal parameters give equal pictures; the files' bytes are equal under one version of PyAV, however many processes render.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from permafrost.data.procedural.motion import CLASSES, SPLITS, label_of, render_clip
from permafrost.data.procedural.world_files import MANIFEST, ensure_folder, run_parts

if TYPE_CHECKING:
    from permafrost.data.video.config import MotionWorld

# Part of the cache folder's name: raise it when the clips of unchanged parameters change.
_RENDERER = 2
# A further process pays from this many clips on: it takes half a second to start, a clip some 30 ms.
_CLIPS_PER_PROCESS = 40


def write_video(path: Path, frames: np.ndarray | Sequence[np.ndarray], rate: int, *, crf: int = 18) -> None:
    """Encode frames (T, H, W, 3) uint8, H and W even, as H.264 in MP4.

    Args:
        path: The file.
        frames: RGB pictures.
        rate: Frames per second.
        crf: x264's constant rate factor.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        # x264's macroblock tree (measured, build 164 with AVX2) reads memory that nobody set: one clip in seven came out otherwise.
        stream.options = {"crf": str(crf), "preset": "veryfast", "g": "12", "x264-params": "mbtree=0"}
        # One thread: the pictures are small, and the bytes depend on the number of threads.
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _manifest(world: MotionWorld) -> str:
    return json.dumps({"world": "motion", "renderer": _RENDERER, **asdict(world)}, sort_keys=True, indent=1) + "\n"


def ensure_motion_world(world: MotionWorld, folder: Path | None = None) -> Path:
    """Write the world unless it is there already, and return its folder; see `ensure_folder`.

    Raises:
        DataError: The folder holds something else, or cannot be written.
    """
    return ensure_folder(
        "motion",
        _manifest(world),
        folder,
        lambda staging: write_motion_world(world, staging),
        content=f"{world.num_train + world.num_val} videos",
    )


def write_motion_world(world: MotionWorld, folder: Path, num_processes: int | None = None) -> None:
    """Render both splits into an existing folder.

    Args:
        world: The world's parameters.
        folder: Exists and is empty.
        num_processes: Rendering processes, this one included; None is one for each core that this process may use,
            fewer for a small world.

    Raises:
        OSError: The folder cannot be written.
        DataError: A rendering process died.
    """
    counts = dict(zip(SPLITS, (world.num_train, world.num_val)))
    if num_processes is None:
        num_processes = min(len(os.sched_getaffinity(0)), sum(counts.values()) // _CLIPS_PER_PROCESS, 16)
    for split in SPLITS:
        (folder / split).mkdir()
    parts = max(1, num_processes)
    job = {"world": asdict(world), "folder": str(folder)}
    run_parts("motion", __spec__.name, job, parts, lambda: _render_part(world, folder, 0, parts))
    for split in SPLITS:
        lines = [f"{index:05d}.mp4 {label_of(index)}\n" for index in range(counts[split])]
        (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")
    (folder / MANIFEST).write_text(_manifest(world), encoding="utf-8")


def _render_part(world: MotionWorld, folder: Path, part: int, parts: int) -> None:
    """Write every `parts`-th clip of both splits, from `part` on."""
    for split, num_clips in zip(SPLITS, (world.num_train, world.num_val)):
        for index in range(part, num_clips, parts):
            write_video(folder / split / f"{index:05d}.mp4", render_clip(world, split, index), world.rate)


def _main() -> None:
    """One rendering process: the job is the argument."""
    from permafrost.data.video.config import MotionWorld

    job = json.loads(sys.argv[1])
    world = job["world"]
    world["object_size"] = tuple(world["object_size"])
    _render_part(MotionWorld(**world), Path(job["folder"]), job["part"], job["parts"])
    print("null")


if __name__ == "__main__":
    _main()
