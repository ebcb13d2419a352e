"""A small data set in COCO's layout, made by hand, that tests may bend in any way; and a small `shapes` world."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from permafrost.data.build import located
from permafrost.data.detection.config import CocoDataConfig, JitterConfig
from permafrost.data.worlds.config import ShapesDataConfig, ShapesWorld

# (width, height) of the images with ids 3, 7, 12, ...
SIZES = [(40, 30), (24, 48), (50, 50), (33, 21), (64, 48), (20, 20)]
IMAGE_IDS = [12, 3, 40, 7, 21, 33]


class HandMade:
    """A COCO folder under construction: change `content[split]`, then `write()`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content = {split: make_content(split) for split in ("train", "val")}
        for split, content in self.content.items():
            rng = np.random.default_rng(split == "train")
            (root / f"{split}2017").mkdir(parents=True)
            for image in content["images"]:
                pixels = rng.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(self.image(split, image["file_name"]), quality=95)
        (root / "annotations").mkdir()

    def json(self, split: str = "train") -> Path:
        return self.root / "annotations" / f"instances_{split}2017.json"

    def image(self, split: str, name: str) -> Path:
        return self.root / f"{split}2017" / name

    def config(self, **fields: Any) -> CocoDataConfig:
        return CocoDataConfig(**{"root": str(self.root), "image_size": 64, "jitter": JitterConfig(), **fields})

    def write(self) -> CocoDataConfig:
        for split, content in self.content.items():
            self.json(split).write_text(json.dumps(content))
        return self.config()


def make_content(split: str) -> dict[str, Any]:
    """Six images with boxes as polygons, one run-length mask in text, one crowd in numbers."""
    images, annotations = [], []
    for position, (image_id, (width, height)) in enumerate(zip(IMAGE_IDS, SIZES)):
        name = f"{split}_{image_id:03d}.jpg"
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for number in range(1 + position % 3):
            x, y, w, h = 2 + 3 * number, 1 + 2 * number, 7 + position, 7 + number
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            entry = {"bbox": [x, y, w, h], "area": w * h, "segmentation": [polygon], "iscrowd": 0}
            category = (5, 9, 70)[(position + number) % 3]
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category, **entry})
    width, height = SIZES[0]
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[20:28, 25:39] = 1
    encoded = mask_api.encode(np.asfortranarray(mask))
    text = {"counts": encoded["counts"].decode(), "size": [height, width]}
    crowd = {"counts": [0, 5, height * width - 5], "size": [height, width]}
    for extra in (
        {"id": 90, "category_id": 9, "bbox": [25, 20, 14, 8], "area": 112, "segmentation": text, "iscrowd": 0},
        {"id": 91, "category_id": 5, "bbox": [0, 0, 1, 5], "area": 5, "segmentation": crowd, "iscrowd": 1},
    ):
        annotations.append({"image_id": IMAGE_IDS[0], **extra})
    categories = [{"id": 70, "name": "pear"}, {"id": 5, "name": "apple"}, {"id": 9, "name": "fig"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def hand_made(tmp_path: Path) -> HandMade:
    """The folder, already written once."""
    made = HandMade(tmp_path / "coco")
    made.write()
    return made


@pytest.fixture(scope="session")
def shapes_config(permafrost_cache: Path) -> ShapesDataConfig:
    """40 training and 24 validation images of 96 pixels, crowds in many of them; already written."""
    world = ShapesWorld(num_train=40, num_val=24, image_side=96, crowd_share=0.4, min_visible=0.3)
    config = ShapesDataConfig(image_size=96, world=world)
    located(config)
    return config


@pytest.fixture
def file_bytes() -> Callable[[Path], dict[str, bytes]]:
    """file_bytes(folder): every file's relative path and bytes."""
    return lambda folder: {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
