"""`permafrost check-data` on a COCO folder with one fault of each kind that COCO's own tools pass over in silence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from permafrost.data.detection.check import check_coco
from permafrost.data.detection.config import CocoDataConfig
from permafrost.data.findings import count_kinds
from permafrost.launcher.cli import main

SQUARE = [4, 4, 20, 4, 20, 20, 4, 20]
RECIPE = "coco:swinv2_base_fpn"
NUM_IMAGES = 3


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder(change): a sound data set, of which `change` is given the training annotations to spoil."""

    def write(change: Callable[[dict[str, Any]], None]) -> Path:
        root = tmp_path / "coco"
        (root / "annotations").mkdir(parents=True)
        for split in ("train", "val"):
            (root / f"{split}2017").mkdir()
            content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "cat"}]}
            for number in range(1, NUM_IMAGES + 1):
                Image.fromarray(np.zeros((32, 40, 3), dtype=np.uint8)).save(root / f"{split}2017/{number}.jpg")
                content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": 32, "width": 40})
                entry = {"id": number, "image_id": number, "category_id": 7, "bbox": [4, 4, 16, 16], "area": 256}
                content["annotations"].append({**entry, "iscrowd": 0, "segmentation": [SQUARE]})
            if split == "train":
                change(content)
            (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
        return root

    return write


def rle(change: int) -> dict[str, Any]:
    """Run lengths of the whole image, off by a number of pixels."""
    return {"size": [32, 40], "counts": [0, 32 * 40 + change]}


FAULTS: dict[str, tuple[str, Any, str]] = {
    "unknown category": ("category_id", 8, "is not among the categories"),
    "unknown image": ("image_id", 99, "is not among the images"),
    "id 0": ("id", 0, "never matched by pycocotools"),
    "a double id": ("id", 1, "also the id of annotations[0]"),
    "NaN in a box": ("bbox", [4, float("nan"), 16, 16], "not finite"),
    "negative box": ("bbox", [4, 4, -16, 16], "degenerate"),
    "short runs": ("segmentation", rle(-5), "add up to 1275 pixels, the mask has 1280"),
    "long runs": ("segmentation", rle(5), "add up to 1285 pixels, the mask has 1280"),
    "two points": ("segmentation", [[4, 4, 20, 20]], "at least 3 points"),
    "no polygon": ("segmentation", [], "the list of polygons is empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_with_its_place(folder, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    field, value, message = FAULTS[fault]
    root = folder(lambda content: content["annotations"][2].update({field: value}))
    code = main(["check-data", RECIPE, "--data.root", str(root), "--data.bad-annotations", "refuse"])
    place = f"{root}/annotations/instances_train2017.json: annotations[2].{field}: "
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if place in line]
    assert message in line
    assert code == (0 if fault == "id 0" else 2)
    assert line.startswith("warning" if fault == "id 0" else "error")


def test_all_are_counted_by_kind_before_they_are_listed(folder, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(content: dict[str, Any]) -> None:
        sound = copy.deepcopy(content["annotations"][0])
        for number, (field, value, _) in enumerate(FAULTS.values(), start=10):
            content["annotations"].append({**sound, "id": number, field: value})

    root = folder(spoil)
    assert main(["check-data", RECIPE, "--data.root", str(root), "--data.bad-annotations", "refuse"]) == 2
    lines = capsys.readouterr().out.splitlines()
    file = f"{root}/annotations/instances_train2017.json"
    assert lines[0] == f"4 errors at {file}: annotations[].segmentation"
    assert f"2 errors at {file}: annotations[].bbox" in lines[:6]
    assert {f"1 error at {file}: annotations[].id", f"1 warning at {file}: annotations[].id"} < set(lines[:6])
    assert len(lines) == 6 + len(FAULTS)


def test_semantic_maps_are_looked_at_too(folder) -> None:
    root = folder(lambda content: None)
    maps = root / "stuff"
    maps.mkdir()
    Image.fromarray(np.zeros((32, 40), dtype=np.uint8)).save(maps / "1.png")
    Image.fromarray(np.full((32, 40), 200, dtype=np.uint8)).save(maps / "2.png")
    config = CocoDataConfig(root=str(root), semantic="stuff")
    damaged, missing = check_coco(config)
    assert (damaged.path, damaged.fatal) == (str(maps / "2.png"), False)
    assert "holds 200" in damaged.what
    assert (missing.path, missing.fatal) == (str(maps / "3.png"), True)
    assert count_kinds([damaged, missing]) == [f"1 warning at images in {maps}", f"1 error at images in {maps}"]
    assert [finding.path for finding in check_coco(config, decode=False)] == [missing.path]
    (nowhere,) = check_coco(CocoDataConfig(root=str(root), semantic="nowhere"))
    assert nowhere.fatal
    assert "there is no folder" in nowhere.what
