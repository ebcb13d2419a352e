"""Write the files of the built-in world `motion` once into a cache folder: H.264 in MP4 with lists in Kinetics' layout.

    classes.txt   train.txt   val.txt   train/00000.mp4 ...   val/00000.mp4 ...

Equal parameters give equal pictures; the files' bytes are equal under one version of PyAV, however many processes render.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from permafrost.data.worlds.config import MotionWorld
from permafrost.data.worlds.files import WorldFiles
from permafrost.data.worlds.motion import CLASSES, SPLITS, label_of, render_clip


def write_video(path: Path, frames: np.ndarray | Sequence[np.ndarray], rate: int, *, crf: int = 18) -> None:
    """Encode frames (T, H, W, 3) uint8, H and W even, as H.264 in MP4.

    Args:
        path: the file.
        frames: RGB pictures.
        rate: frames per second.
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


def _render_part(world: MotionWorld, folder: Path, part: int, parts: int) -> None:
    """Write every `parts`-th clip of both splits, from `part` on."""
    for split, num_clips in zip(SPLITS, (world.num_train, world.num_val)):
        for index in range(part, num_clips, parts):
            write_video(folder / split / f"{index:05d}.mp4", render_clip(world, split, index), world.rate)


def _write_lists(world: MotionWorld, folder: Path, _: list[None]) -> None:
    """Write the lists of videos with their labels, and the classes' names."""
    for split, count in zip(SPLITS, (world.num_train, world.num_val)):
        lines = [f"{index:05d}.mp4 {label_of(index)}\n" for index in range(count)]
        (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")


MOTION = WorldFiles(
    kind="motion",
    renderer=3,
    unit="videos",
    per_process=40,
    folders=SPLITS,
    render_part=_render_part,
    finish=_write_lists,
    module=__spec__.name,
)


if __name__ == "__main__":
    MOTION.main(MotionWorld)
