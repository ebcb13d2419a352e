"""Write the files of the built-in world `scenery` once into a cache folder: JPEGs and label PNGs in ADE20K's layout.

Equal parameters give equal bytes, however many processes render.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from permafrost.data.worlds.config import SceneryWorld
from permafrost.data.worlds.files import WorldFiles
from permafrost.data.worlds.scenery import CLASSES, render_labelled
from permafrost.data.worlds.shapes import SPLITS

_FOLDERS = {"train": "training", "val": "validation"}


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


def _write_classes(world: SceneryWorld, folder: Path, found: list[list[int]]) -> None:
    """Write the table of classes with their shares of the pixels."""
    pixels = np.sum(found, axis=0)
    rows = [
        f"{label}\t{share:.4f}\t{name}\n" for label, (share, name) in enumerate(zip(pixels / pixels.sum(), CLASSES), 1)
    ]
    (folder / "objectInfo.txt").write_text("Idx\tRatio\tName\n" + "".join(rows), encoding="utf-8")


SCENERY = WorldFiles(
    kind="scenery",
    renderer=1,
    unit="images",
    per_process=150,
    folders=tuple(f"{kind}/{folder}" for kind in ("images", "annotations") for folder in _FOLDERS.values()),
    render_part=_render_part,
    finish=_write_classes,
    module=__spec__.name,
)


if __name__ == "__main__":
    SCENERY.main(SceneryWorld)
