"""The files of the built-in world `scenery`: JPEGs and label PNGs in the layout of ADE20K's SceneParsing release, written once into
a cache folder. Equal parameters give equal bytes, however many processes render.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from permafrost.data.procedural.scenery import CLASSES, render_labelled
from permafrost.data.procedural.shapes import SPLITS
from permafrost.data.procedural.world_files import MANIFEST, ensure_folder, run_parts

if TYPE_CHECKING:
    from permafrost.data.segmentation.config import SceneryWorld

# Part of the cache folder's name: raise it when the pictures of unchanged parameters change.
_RENDERER = 1
# A further process pays from this many pictures on: it takes half a second to start, a picture some 8 ms.
_IMAGES_PER_PROCESS = 150
_FOLDERS = {"train": "training", "val": "validation"}


def _manifest(world: SceneryWorld) -> str:
    return json.dumps({"world": "scenery", "renderer": _RENDERER, **asdict(world)}, sort_keys=True, indent=1) + "\n"


def ensure_scenery(world: SceneryWorld, folder: Path | None = None) -> Path:
    """Write the world unless it is there already, and return its folder; see `ensure_folder`.

    Raises:
        DataError: The folder holds something else, or cannot be written.
    """
    return ensure_folder(
        "scenery",
        _manifest(world),
        folder,
        lambda staging: write_scenery(world, staging),
        content=f"{world.num_train + world.num_val} images",
    )


def write_scenery(world: SceneryWorld, folder: Path, num_processes: int | None = None) -> None:
    """Render both splits into an existing folder: images/*/*.jpg, annotations/*/*.png, objectInfo.txt and world.json.

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
        num_processes = min(len(os.sched_getaffinity(0)), sum(counts.values()) // _IMAGES_PER_PROCESS, 16)
    for kind in ("images", "annotations"):
        for split in SPLITS:
            (folder / kind / _FOLDERS[split]).mkdir(parents=True)
    parts = max(1, num_processes)
    job = {"world": asdict(world), "folder": str(folder)}
    found = run_parts("scenery", __spec__.name, job, parts, lambda: _render_part(world, folder, 0, parts))
    pixels = np.sum(found, axis=0)
    rows = [
        f"{label}\t{share:.4f}\t{name}\n" for label, (share, name) in enumerate(zip(pixels / pixels.sum(), CLASSES), 1)
    ]
    (folder / "objectInfo.txt").write_text("Idx\tRatio\tName\n" + "".join(rows), encoding="utf-8")
    (folder / MANIFEST).write_text(_manifest(world), encoding="utf-8")


def _render_part(world: SceneryWorld, folder: Path, part: int, parts: int) -> list[int]:
    """Write every `parts`-th picture of both splits, from `part` on; returns the pixels of each class."""
    pixels = np.zeros(len(CLASSES) + 1, dtype=np.int64)
    for split, num_images in zip(SPLITS, (world.num_train, world.num_val)):
        for index in range(part, num_images, parts):
            image, labels = render_labelled(world, split, index)
            name = f"scenery_{split}_{index:06d}"
            Image.fromarray(image).save(folder / "images" / _FOLDERS[split] / f"{name}.jpg", quality=92)
            Image.fromarray(labels).save(folder / "annotations" / _FOLDERS[split] / f"{name}.png")
            pixels += np.bincount(labels.ravel(), minlength=len(pixels))
    return pixels[1:].tolist()


def _main() -> None:
    """One rendering process: the job is the argument, the pixels of each class go to stdout as JSON."""
    from permafrost.data.segmentation.config import SceneryWorld

    job = json.loads(sys.argv[1])
    world = {name: tuple(value) if isinstance(value, list) else value for name, value in job["world"].items()}
    json.dump(_render_part(SceneryWorld(**world), Path(job["folder"]), job["part"], job["parts"]), sys.stdout)


if __name__ == "__main__":
    _main()
