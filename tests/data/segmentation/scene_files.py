"""A small data set in the layout of ADE20K's SceneParsing release, that tests may bend in any way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = {"training": "train", "validation": "val"}
SIZES = [(60, 80), (90, 50), (64, 64), (40, 120)]
"""(height, width)."""


def write_scenes(root: Path, *, num_train: int = 4, num_val: int = 3, num_classes: int = 150) -> Path:
    """Photos of noise; labels in patches of 10 pixels, 0 among them."""
    rng = np.random.default_rng(0)
    for folder, count in (("training", num_train), ("validation", num_val)):
        for kind in ("images", "annotations"):
            (root / kind / folder).mkdir(parents=True)
        for number in range(count):
            height, width = SIZES[number % len(SIZES)]
            photo = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            patches = rng.integers(0, num_classes + 1, (-(-height // 10), -(-width // 10)), dtype=np.uint8)
            labels = np.kron(patches, np.ones((10, 10), dtype=np.uint8))[:height, :width]
            Image.fromarray(photo).save(photo_path(root, folder, number), quality=95)
            Image.fromarray(labels).save(label_path(root, folder, number))
    return root


def photo_path(root: Path, folder: str, number: int) -> Path:
    return root / "images" / folder / f"ADE_{SPLITS[folder]}_{number:08d}.jpg"


def label_path(root: Path, folder: str, number: int) -> Path:
    return root / "annotations" / folder / f"ADE_{SPLITS[folder]}_{number:08d}.png"
