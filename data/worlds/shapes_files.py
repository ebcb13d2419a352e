"""Write the files of the built-in world `shapes` once into a cache folder: JPEGs and COCO JSON.

They follow COCO's official layout and take every form a reader must know: polygons for whole objects, compressed run
lengths for hidden, cut or holed ones, uncompressed run lengths for crowds, category ids with gaps. Equal parameters
give equal bytes, however many processes render.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from permafrost.data.worlds.config import ShapesWorld
from permafrost.data.worlds.files import WorldFiles
from permafrost.data.worlds.shapes import CLASSES, SPLITS, SceneObject, render_scene

CATEGORY_IDS = (1, 2, 3, 5, 8, 13, 21, 34)

_FIRST_IMAGE_ID = {"train": 1, "val": 1_000_001}


def _annotation(region: SceneObject, side: int) -> dict[str, Any]:
    """Return COCO's entry for a region, its ids aside; box and area are of exactly the pixels the segmentation decodes to."""
    from pycocotools import mask as mask_api

    if region.is_whole and len(region.rings) == 1:
        polygon = [round(float(value), 2) for value in region.rings[0].ravel()]
        segmentation: Any = [polygon]
        run_lengths = mask_api.frPyObjects([polygon], side, side)[0]
    else:
        run_lengths = mask_api.encode(np.asfortranarray(region.mask.astype(np.uint8)))
        if region.is_crowd:
            segmentation = {"counts": _run_lengths(region.mask), "size": [side, side]}
        else:
            segmentation = {"counts": run_lengths["counts"].decode("ascii"), "size": [side, side]}
    return {
        "category_id": CATEGORY_IDS[region.label],
        "iscrowd": int(region.is_crowd),
        "area": float(mask_api.area(run_lengths)),
        "bbox": [float(value) for value in mask_api.toBbox(run_lengths)],
        "segmentation": segmentation,
    }


def _run_lengths(mask: np.ndarray) -> list[int]:
    """Return COCO's uncompressed run lengths of a mask (H, W): column by column, zeros first."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return [int(run) for run in (runs[:-1] if runs[-1] == 0 else runs)]


def _coco(world: ShapesWorld, split: str, regions: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return COCO's JSON of a split from the annotations of each picture, which get their ids here."""
    side, first = world.image_side, _FIRST_IMAGE_ID[split]
    numbered = [(first + index, region) for index, of_image in enumerate(regions) for region in of_image]
    return {
        "info": {"description": f"Permafrost's built-in world shapes, {split} split"},
        "licenses": [],
        "categories": [
            {"id": category_id, "name": name, "supercategory": "shape"}
            for category_id, name in zip(CATEGORY_IDS, CLASSES)
        ],
        "images": [
            {"id": first + index, "file_name": _file_name(split, index), "height": side, "width": side}
            for index in range(len(regions))
        ],
        "annotations": [
            {"id": number, "image_id": image_id, **region} for number, (image_id, region) in enumerate(numbered, 1)
        ],
    }


def _file_name(split: str, index: int) -> str:
    return f"{_FIRST_IMAGE_ID[split] + index:012d}.jpg"


def _render_part(world: ShapesWorld, folder: Path, part: int, parts: int) -> dict[str, list[list[dict[str, Any]]]]:
    """Write every `parts`-th picture of both splits, from `part` on; returns their annotations, without ids."""
    regions: dict[str, list[list[dict[str, Any]]]] = {}
    for split, num_images in zip(SPLITS, (world.num_train, world.num_val)):
        regions[split] = []
        for index in range(part, num_images, parts):
            pixels, objects = render_scene(world, split, index)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="JPEG", quality=92)
            (folder / f"{split}2017" / _file_name(split, index)).write_bytes(buffer.getvalue())
            regions[split].append([_annotation(region, len(pixels)) for region in objects])
    return regions


def _write_annotations(world: ShapesWorld, folder: Path, rendered: list[dict[str, list[list[dict[str, Any]]]]]) -> None:
    """Write COCO's JSON of both splits."""
    for split, count in zip(SPLITS, (world.num_train, world.num_val)):
        # Picture i is the (i // parts)-th of part i % parts.
        regions = [rendered[index % len(rendered)][split][index // len(rendered)] for index in range(count)]
        path = folder / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(_coco(world, split, regions), separators=(",", ":")), encoding="utf-8")


SHAPES = WorldFiles(
    kind="shapes",
    renderer=1,
    unit="images",
    per_process=200,
    folders=("annotations", *(f"{split}2017" for split in SPLITS)),
    render_part=_render_part,
    finish=_write_annotations,
    module=__spec__.name,
)


if __name__ == "__main__":
    SHAPES.main(ShapesWorld)
