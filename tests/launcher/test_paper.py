"""Recipes of the paper's detection tables: built at full size without memory, and each run once, small, by the command line."""

from __future__ import annotations

import inspect
import json
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from permafrost.data.detection.config import MultiScaleConfig
from permafrost.heads.build import build_head
from permafrost.heads.necks.config import BiFPNConfig
from permafrost.launcher.cli import main
from permafrost.launcher.experiment import Experiment
from permafrost.launcher.plan.backbone import settle_windows
from permafrost.launcher.plan.fine_tune import build_trained
from permafrost.launcher.recipes.find import RecipeInfo, build_recipe, list_recipes

NUM_CLASSES = {"CocoDataConfig": 80, "ShapesDataConfig": 8, "ADE20KDataConfig": 150, "SceneryDataConfig": 12}
NUM_CLASSES |= {"KineticsDataConfig": 400, "MotionDataConfig": 10}
RECIPES = {
    info.name: info for info in list_recipes() if info.name.startswith(("paper:", "low_data:", "detection_shapes:"))
}
COUNTED = [
    info.name
    for info in list_recipes()
    if info.command == "train" and not build_recipe(info.function).backbone.name.startswith("timm/")
]
"""What plan can build, too: SwinV2, without weights. Not timm models, whose shapes are theirs to say."""
PUBLISHED = {
    # Box and mask AP, frozen and fine-tuned, as printed in the paper.
    "paper:table1_sup_1k": (42.4, 38.7, 50.5, 44.5),
    "paper:table1_esvit_1k": (42.0, 38.5, 51.5, 45.6),
    "paper:table1_simmim_1k": (34.1, 32.4, 52.9, 46.7),
    "paper:table1_icar_laion": (43.3, 39.5, 51.7, 45.5),
    "paper:table1_icar_laion_22k": (44.9, 41.2, 52.3, 46.1),
    "paper:table2_fpn": (45.0, 41.1, 51.9, 45.7),
    "paper:table2_residual_fpn": (49.5, 44.0, 52.1, 45.6),
    "paper:table2_bifpn": (51.9, 46.0, 52.3, 45.7),
    "paper:table2_cascade": (49.0, 43.0, 54.5, 46.9),
    "paper:table2_bifpn_cascade": (53.8, 46.7, 54.3, 46.9),
    "paper:table5_tiny_1k": (49.6, 44.0, 49.8, 43.8),
    "paper:table5_base_1k": (50.3, 44.5, 51.1, 44.8),
    "paper:table5_base_22k": (52.5, 46.6, 52.3, 45.7),
    "paper:table5_large_22k": (53.0, 46.8, 53.0, 46.5),
    "paper:table5_giant_htc": (57.9, 50.4),
    "paper:table5_giant_htc_multi_scale": (59.3, 51.6),
    "low_data:table6_fpn_1pct": (27.5, 26.4, 27.5, 25.8),
    "low_data:table6_bifpn1_1pct": (29.8, 27.6, 26.3, 24.7),
    "low_data:table6_bifpn2_1pct": (31.4, 28.4, 26.3, 24.6),
    "low_data:table6_bifpn3_1pct": (32.1, 28.9, 25.9, 24.3),
    "low_data:table6_bifpn4_1pct": (31.9, 28.6, 26.0, 24.1),
    "low_data:table6_fpn_10pct": (39.1, 36.2, 42.2, 37.5),
    "low_data:table6_bifpn1_10pct": (42.8, 38.5, 42.0, 37.3),
    "low_data:table6_bifpn2_10pct": (44.2, 39.4, 42.1, 37.3),
    "low_data:table6_bifpn3_10pct": (44.6, 39.7, 42.3, 37.6),
    "low_data:table6_bifpn4_10pct": (45.0, 40.0, 42.1, 37.4),
}


def count_trainable(experiment: Experiment) -> int:
    """Parameters of the head, and of the backbone where it learns, built on the meta device."""
    backbone = build_trained(settle_windows(experiment.backbone)[0])
    classes = [str(number) for number in range(NUM_CLASSES[type(experiment.data).__name__])]
    with torch.device("meta"):
        (config,) = experiment.heads.values()
        head = build_head(config.model, spec=backbone.spec, classes=classes)
    parts = [head] if experiment.backbone.frozen else [head, backbone]
    assert all(parameter.is_meta for part in parts for parameter in part.parameters())
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def test_every_row_is_there_with_the_published_numbers() -> None:
    expected = {}
    for name, values in PUBLISHED.items():
        expected[name] = f"{values[0]} box AP, {values[1]} mask AP"
        if len(values) > 2:
            expected[f"{name}_full"] = f"{values[2]} box AP, {values[3]} mask AP"
    assert {name: info.metric for name, info in RECIPES.items() if info.metric} == expected
    depths = {"table2_bifpn": 5, "table5_tiny_1k": 9, "table5_large_22k": 5}
    depths |= {f"table6_bifpn{n}_{part}pct": n for n in (1, 2, 3, 4) for part in (1, 10)}
    for name, info in RECIPES.items():
        experiment = build_recipe(info.function)
        own = name.partition(":")[2]
        assert experiment.backbone.frozen != own.endswith("_full"), name
        if own.removesuffix("_full") in depths:
            neck = experiment.heads["detection"].model.neck
            assert isinstance(neck, BiFPNConfig), name
            assert neck.num_layers == depths[own.removesuffix("_full")], name
        if own.startswith("table6"):
            assert experiment.data.train_share == (0.01 if "_1pct" in own else 0.1), name
        if not name.startswith("detection_shapes"):
            assert "Weights: " in inspect.getdoc(info.function), name
            assert experiment.backbone.weights.endswith(".pth"), name
        assert re.search(rf"permafrost train {name}\b", inspect.getdoc(info.function)), name


def test_every_recipe_builds_at_full_size_and_its_trainable_parameters_are_on_record() -> None:
    record = json.loads(files("permafrost.configs").joinpath("trainable.json").read_text())
    assert record == {name: count_trainable(build_recipe(name)) for name in COUNTED}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 training and 2 validation images in the official layout: two squares each, semantic maps beside them."""
    root = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir()
    for split, num_images in (("train", 120), ("val", 2)):
        images, annotations = [], []
        for folder in (f"{split}2017", f"stuffthingmaps/{split}2017"):
            (root / folder).mkdir(parents=True)
        for number in range(1, num_images + 1):
            name = f"{number:012d}"
            Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(root / f"{split}2017/{name}.jpg")
            maps = rng.integers(0, 183, (48, 64), dtype=np.uint8)
            Image.fromarray(maps).save(root / f"stuffthingmaps/{split}2017/{name}.png")
            images.append({"id": number, "file_name": f"{name}.jpg", "height": 48, "width": 64})
            for left, category in ((4, 1), (34, 90)):
                polygon = [left, 8, left + 24, 8, left + 24, 36, left, 36]
                entry = {"image_id": number, "bbox": [left, 8, 24, 28], "area": 672, "iscrowd": 0}
                entry |= {"id": len(annotations) + 1, "category_id": category, "segmentation": [polygon]}
                annotations.append(entry)
        categories = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return root


def reduced(info: RecipeInfo, root: Path) -> list[str]:
    """Flags that make a recipe small: the nano backbone, narrow layers, one step; its kinds and options stay."""
    experiment = build_recipe(info.function)
    fields = {"backbone.name": "swinv2_nano", "backbone.weights": "random", "backbone.window-size": "None"}
    fields |= {
        "data.image-size": 64,
        "data.max-val-images": 2,
        "engine.kind": "accelerate",
        "engine.zero-stage": "None",
    }
    if info.name.startswith("detection_shapes"):
        fields |= {"data.world.num-train": 4, "data.world.num-val": 2, "data.world.image-side": 64}
    else:
        fields |= {"data.root": root}
    if isinstance(experiment.data.jitter, MultiScaleConfig):
        fields |= {"data.jitter.short-sides": "48 64", "data.jitter.max-side": 96}
        fields |= {"data.evaluation.short-side": 64, "data.evaluation.max-side": 96}
    if experiment.data.evaluation.sizes:
        fields |= {"data.evaluation.sizes": "64 96"}
    model = {
        "neck.channels": 16,
        "box.fc-channels": 16,
        "box.num-samples": 16,
        "mask.num-convs": 1,
        "mask.channels": 16,
    }
    model |= {"rpn.num-proposals-train": 20, "rpn.num-proposals-test": 10, "rpn.num-samples": 16}
    model |= {"rpn.num-pre-nms-train": 20, "rpn.num-pre-nms-test": 10, "box.num-detections": 5}
    fields |= {f"heads.detection.model.{name}": value for name, value in model.items()}
    loop = {"num-steps": 1, "global-batch": 2, "num-workers": 0, "log-every": 1, "image-every": 0}
    fields |= {f"loop.{name}": value for name, value in loop.items()}
    return [part for name, value in fields.items() for part in (f"--{name}", *str(value).split())]


@pytest.mark.parametrize("name", RECIPES)
def test_one_step_and_one_evaluation_through_the_command_line(name: str, coco: Path, tmp_path: Path) -> None:
    assert main(["train", name, "--output", str(tmp_path / "run"), *reduced(RECIPES[name], coco)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["detection/loss"] for line in lines if "detection/loss" in line]
    assert len(losses) == 1
    assert np.isfinite(losses).all()
    assert main(["evaluate", str(tmp_path / "run"), "--checkpoint", "latest"]) == 0
    metrics = json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]["detection"]
    assert {"bbox/AP", "segm/AP"} <= set(metrics)
    if name.startswith("low_data:"):
        share = build_recipe(RECIPES[name].function).data.train_share
        assert len(json.loads((tmp_path / "run" / "train_images.json").read_text())) == round(120 * share)


@pytest.mark.parametrize("empty_images", [False, True])
def test_bad_annotations_are_dropped_and_no_loss_is_nan(coco: Path, tmp_path: Path, empty_images: bool, capsys) -> None:
    """Eight images train: one without annotations, one all crowd, one with a polygon of 2 points, one with run lengths of the wrong
    size, four sound; crops so deep that some images lose every object, and category ids with gaps."""
    content = json.loads((coco / "annotations/instances_train2017.json").read_text())
    content["images"] = content["images"][:8]
    kept = [entry for entry in content["annotations"] if 1 < entry["image_id"] <= 8]
    for entry in kept:
        if entry["image_id"] == 2:
            entry |= {"iscrowd": 1, "segmentation": {"size": [48, 64], "counts": [100, 500, 2472]}}
        elif entry["image_id"] == 3:
            entry["segmentation"] = [[4, 8, 28, 36]]
        elif entry["image_id"] == 4:
            entry["segmentation"] = {"size": [48, 64], "counts": [100, 500]}
    (tmp_path / "bad.json").write_text(json.dumps({**content, "annotations": kept}))
    flags = reduced(RECIPES["paper:table2_cascade"], coco)
    flags += ["--data.train-annotations", str(tmp_path / "bad.json"), "--data.train-empty-images", str(empty_images)]
    flags += ["--data.jitter.scale-range", "4.0", "8.0", "--loop.num-steps", "4", "--output", str(tmp_path / "run")]
    assert main(["train", "paper:table2_cascade", *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [value for line in lines for name, value in line.items() if name.startswith("detection/loss")]
    assert len(losses) >= 4
    assert np.isfinite(losses).all()
    assert max(line.get("detection/skipped_steps", 0) for line in lines) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "4 annotations are left out as unusable" in out
    assert f"{8 if empty_images else 4} images for training and 2 images for validation" in out
