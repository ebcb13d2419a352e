"""Segmentation through the command line: a small run with everything that follows it, the paper's recipes, released heads."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import permafrost
from permafrost.data.segmentation.classes import ADE20K_CLASSES
from permafrost.heads.base import Head
from permafrost.heads.build import build_head
from permafrost.heads.segmentation.config import Mask2FormerConfig, PixelDecoderConfig, TransformerDecoderConfig
from permafrost.launcher.cli import main
from permafrost.launcher.errors import CheckpointError
from permafrost.launcher.experiment import HeadExperiment, ScheduleConfig
from permafrost.launcher.recipes.find import RecipeInfo, build_recipe, list_recipes
from permafrost.launcher.run.first_weights import class_tensors, read_source, take_over
from permafrost.model.spec import FeatureSpec

sys.path.insert(0, str(Path(__file__).parent.parent / "data" / "segmentation"))
from scene_files import label_path, write_scenes

WORLD = ["--data.world.num-train", "6", "--data.world.num-val", "3", "--data.world.image-side", "64"]
SMALL = ["--data.image-size", "64", "--loop.num-workers", "0", "--loop.global-batch", "2", "--loop.log-every", "1"]
RECIPES = {info.name: info for info in list_recipes() if info.name.startswith(("paper_ade20k:", "ade20k:"))}
PUBLISHED = {
    # mIoU, frozen and fine-tuned, as printed in the paper; pixel-decoder and transformer blocks.
    "table1_sup_1k": (49.8, 52.3, 1, 9),
    "table1_esvit_1k": (49.7, 52.1, 1, 9),
    "table1_simmim_1k": (42.4, 51.7, 1, 9),
    "table1_icar_laion": (51.0, 55.3, 1, 9),
    "table1_icar_laion_22k": (51.1, 55.4, 1, 9),
    "table3_pixel1_decoder3": (51.0, 55.4, 1, 3),
    "table3_pixel6_decoder3": (52.6, 55.3, 6, 3),
    "table3_pixel1_decoder9": (51.9, 55.3, 1, 9),
    "table3_pixel6_decoder9": (53.2, 55.5, 6, 9),
    "table5_tiny_1k": (48.9, 50.3, 6, 9),
    "table5_base_1k": (51.5, 52.7, 6, 9),
    "table5_large_22k": (54.4, 56.5, 6, 9),
    "table5_giant": (57.6, None, 6, 9),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickstart of two steps on six pictures, with a picture for TensorBoard."""
    folder = tmp_path_factory.mktemp("segmentation") / "run"
    fields = [*WORLD, *SMALL, "--loop.num-steps", "2", "--loop.checkpoint-every", "2", "--loop.image-every", "2"]
    assert main(["train", "quickstart_segmentation", *fields, "--output", str(folder)]) == 0
    return folder


def test_a_run_learns_scores_and_draws(run) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["segmentation/loss"] for line in lines if "segmentation/loss" in line]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    final = json.loads((run / "final.json").read_text())
    assert final["best"]["segmentation"]["metric"] == "semantic/mIoU"
    assert 0 <= final["metrics"]["segmentation"]["semantic/mIoU"] <= 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"segmentation/predicted_and_true", "segmentation/confusion"}


def test_evaluate_writes_every_class_and_the_confusion_of_integers(run, capsys) -> None:
    assert main(["evaluate", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "mIoU of each class" in shown
    metrics = json.loads((run / "evaluation.json").read_text())["metrics"]["segmentation"]
    matrix = np.load(run / "confusion_segmentation.npy")
    assert matrix.dtype == np.int64
    assert matrix.shape == (12, 12)
    true, found, hits = matrix.sum(axis=1), matrix.sum(axis=0), np.diag(matrix)
    iou = (hits / np.maximum(true + found - hits, 1))[true > 0]
    assert metrics["semantic/mIoU"] == pytest.approx(iou.mean())
    listed = json.loads((run / "results_segmentation.json").read_text())
    assert [entry["IoU"] for entry in listed] == pytest.approx(iou.tolist(), abs=1e-6)
    final = json.loads((run / "final.json").read_text())["metrics"]["segmentation"]
    assert metrics == final


def test_several_scales_are_scored_too(run, tmp_path, capsys) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    assert main(["evaluate", str(copy), "--scales", "0.5", "1", "1.5", "--flip"]) == 0
    assert "3 images (18 views) for validation" in capsys.readouterr().out
    many = json.loads((copy / "evaluation.json").read_text())
    assert many["num_samples"] == 18
    assert many["evaluation"] == {"scales": [0.5, 1.0, 1.5], "flip": True}
    assert 0 <= many["metrics"]["segmentation"]["semantic/mIoU"] <= 1
    assert main(["evaluate", str(copy), "--sizes", "64"]) == 2
    assert "evaluation cannot change sizes: the run's data is a SceneryDataConfig" in capsys.readouterr().err


def test_predict_lays_colors_over_photos_of_any_size(run, tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    for name, size in (("wide", (50, 140)), ("high", (130, 70))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    output = tmp_path / "out"
    assert main(["predict", str(run), str(tmp_path / "*.jpg"), "--output", str(output)]) == 1
    assert "1 of 3 inputs could not be read" in capsys.readouterr().err
    listed = json.loads((output / "predictions.json").read_text())
    assert [Path(entry["file_name"]).stem for entry in listed] == ["high", "wide"]
    for entry, size in zip(listed, ((130, 70), (50, 140))):
        stem = Path(entry["file_name"]).stem
        with Image.open(output / f"{stem}_labels.png") as labels:
            assert labels.mode == "L"
            values = np.array(labels)
        assert values.shape == size
        assert 1 <= values.min() <= values.max() <= 12
        shares = {found["label"]: found["share"] for found in entry["classes"]}
        for label, share in shares.items():
            assert share == pytest.approx((values == label).mean(), abs=1e-6)
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        with Image.open(output / f"{stem}.png") as picture:
            # Enlarged by a whole factor, the legend at its right.
            factor = picture.height // size[0]
            assert picture.height == factor * size[0]
            assert picture.width > factor * size[1]

    trained = permafrost.load_run(run, device="cpu")
    with Image.open(tmp_path / "high.jpg") as picture:
        high, wide = trained.predict([np.asarray(picture), str(tmp_path / "wide.jpg")], batch_size=1)
    for found, stem in ((high, "high"), (wide, "wide")):
        with Image.open(output / f"{stem}_labels.png") as labels:
            assert (found.classes.numpy() + 1 == np.array(labels)).all()
        assert found.names == trained.classes
    maps = trained.features(tmp_path / "wide.jpg")
    assert [one.shape[1] for one in maps] == list(trained.backbone.spec.channels)


def test_submission_files_are_those_of_the_test_images(run, tmp_path, capsys) -> None:
    folder = tmp_path / "submission"
    assert main(["evaluate", str(run), "--submission", str(folder)]) == 0
    assert "files for the benchmark server" in capsys.readouterr().out
    assert len(list(folder.glob("scenery_val_*.png"))) == 3
    with Image.open(folder / "scenery_val_000000.png") as labels:
        values = np.array(labels)
        assert labels.mode == "L"
    assert values.shape == (64, 64)
    assert values.min() >= 1


def test_check_data_counts_and_draws(tmp_path, capsys) -> None:
    root = write_scenes(tmp_path / "ade")
    Image.fromarray(np.full((60, 80), 151, dtype=np.uint8)).save(label_path(root, "training", 0))
    Image.fromarray(np.zeros((90, 50), dtype=np.uint8)).save(label_path(root, "training", 1))
    sheet = tmp_path / "sheet.png"
    command = ["check-data", "ade20k:swinv2_base_mask2former", "--data.root", str(root), "--data.image-size", "64"]
    assert main([*command, "--draw", "3", "--output", str(sheet)]) == 0
    shown = capsys.readouterr().out
    assert "1 warning: labels outside the classes" in shown
    assert "1 warning: images without any label" in shown
    assert "4 images for training and 3 images for validation, 150 classes" in shown
    with Image.open(sheet) as picture:
        assert picture.width > 600
    Image.fromarray(np.full((60, 80), 200, dtype=np.uint8)).save(label_path(root, "validation", 0))
    assert main(command) == 2
    assert "1 error: labels outside the classes" in capsys.readouterr().out


def test_a_step_of_images_without_labels_is_finite(tmp_path) -> None:
    """All is ignored: nothing to match, nothing to segment; the losses are numbers and the weights stay so."""
    root = write_scenes(tmp_path / "ade")
    for number in range(4):
        with Image.open(label_path(root, "training", number)) as labels:
            size = labels.size[::-1]
        Image.fromarray(np.zeros(size, dtype=np.uint8)).save(label_path(root, "training", number))
    output = tmp_path / "run"
    fields = reduced(root)
    assert main(["train", "ade20k:swinv2_base_mask2former", *fields, "--output", str(output)]) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in lines if "segmentation/loss" in line)
    assert step["segmentation/loss_mask"] == step["segmentation/loss_dice"] == 0
    assert step["segmentation/loss_class"] > 0
    assert np.isfinite(step["segmentation/grad_norm"])


def reduced(root: Path) -> list[str]:
    """Flags that make a recipe small: the nano backbone, narrow layers, one step; its blocks and options stay."""
    fields = {"backbone.name": "swinv2_nano", "backbone.weights": "random", "backbone.window-size": "None"}
    fields |= {"data.root": root, "data.image-size": 64, "engine.kind": "accelerate", "engine.zero-stage": "None"}
    model = {"pixel-decoder.channels": 16, "pixel-decoder.ffn-channels": 16, "transformer-decoder.ffn-channels": 16}
    model |= {"transformer-decoder.num-queries": 10, "loss.num-points": 64}
    fields |= {f"heads.segmentation.model.{name}": value for name, value in model.items()}
    loop = {"num-steps": 1, "global-batch": 2, "num-workers": 0, "log-every": 1, "image-every": 0}
    fields |= {f"loop.{name}": value for name, value in loop.items()}
    return [part for name, value in fields.items() for part in (f"--{name}", str(value))]


def test_every_row_is_there_with_the_published_numbers() -> None:
    expected = {"ade20k:swinv2_base_mask2former": "51.0 mIoU"}
    for name, (frozen, full, *_) in PUBLISHED.items():
        expected[f"paper_ade20k:{name}"] = f"{frozen} mIoU"
        if full is not None:
            expected[f"paper_ade20k:{name}_full"] = f"{full} mIoU"
    assert {name: info.metric for name, info in RECIPES.items()} == expected
    for name, info in RECIPES.items():
        experiment, text = build_recipe(info.function), inspect.getdoc(info.function)
        head = experiment.heads["segmentation"]
        assert (head.optimizer.clip_norm, head.schedule.kind, head.schedule.power) == (0.01, "poly", 0.9), name
        assert (experiment.loop.num_steps, experiment.loop.global_batch) == (160_000, 16), name
        if not name.startswith("paper"):
            continue
        own = name.partition(":")[2]
        assert experiment.backbone.frozen != own.endswith("_full"), name
        assert experiment.backbone.frozen or experiment.backbone.learning_rate_factor == 0.1, name
        _, _, pixel, decoder = PUBLISHED[own.removesuffix("_full")]
        assert head.model.pixel_decoder.num_blocks == pixel, name
        assert head.model.transformer_decoder.num_blocks == decoder, name
        assert experiment.backbone.weights.endswith(".pth"), name
        for piece in ("Weights: ", "Published mIoU: probably multi-scale", f"permafrost train {name} "):
            assert piece in text, (name, piece)


def one_step(info: RecipeInfo, root: Path, output: Path) -> None:
    assert main(["train", info.name, "--output", str(output), *reduced(root)]) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["segmentation/loss"] for line in lines if "segmentation/loss" in line]
    assert len(losses) == 1
    assert np.isfinite(losses).all()
    assert main(["evaluate", str(output), "--checkpoint", "latest"]) == 0
    metrics = json.loads((output / "evaluation.json").read_text())["metrics"]["segmentation"]
    assert {"semantic/mIoU", "semantic/pixel_accuracy"} <= set(metrics)


@pytest.mark.parametrize("name", ["table3_pixel1_decoder3", "table3_pixel6_decoder9_full"])
def test_one_step_and_one_evaluation_through_the_command_line(name, tmp_path) -> None:
    one_step(RECIPES[f"paper_ade20k:{name}"], write_scenes(tmp_path / "ade", num_val=2), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_a_step_and_is_evaluated(name, tmp_path) -> None:
    one_step(RECIPES[name], write_scenes(tmp_path / "ade", num_val=2), tmp_path / "run")


def test_poly_is_a_power_of_what_is_left() -> None:
    schedule = ScheduleConfig(kind="poly", warmup_steps=0)
    assert schedule.factor(0, 100) == 1
    assert schedule.factor(50, 100) == pytest.approx(0.5**0.9)
    assert schedule.factor(99, 100) == pytest.approx(0.01**0.9)
    assert ScheduleConfig(kind="poly", warmup_steps=10).factor(5, 100) == pytest.approx(0.5005)
    with pytest.raises(ValueError, match=r"schedule\.power"):
        ScheduleConfig(power=0.0)


# Released heads.


def released_names(pixel: int, decoder: int, classes: int, channels: list[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a released Mask2Former's file (`sem_seg_head.*` and the backbone's norms), spelt out."""
    shapes: dict[str, tuple[int, ...]] = {"pixel_decoder.transformer.level_embed": (3, 256)}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    for number, width in enumerate(channels[:0:-1]):
        layer(f"pixel_decoder.input_proj.{number}.0", 256, width, 1, 1)
        layer(f"pixel_decoder.input_proj.{number}.1", 256)
    for number in range(pixel):
        block = f"pixel_decoder.transformer.encoder.layers.{number}"
        for name, rows in (
            ("sampling_offsets", 192),
            ("attention_weights", 96),
            ("value_proj", 256),
            ("output_proj", 256),
        ):
            layer(f"{block}.self_attn.{name}", rows, 256)
        layer(f"{block}.norm1", 256)
        layer(f"{block}.linear1", 1024, 256)
        layer(f"{block}.linear2", 256, 1024)
        layer(f"{block}.norm2", 256)
    layer("pixel_decoder.mask_features", 256, 256, 1, 1)
    for name, width, side in (("adapter_1", channels[0], 1), ("layer_1", 256, 3)):
        shapes[f"pixel_decoder.{name}.weight"] = (256, width, side, side)
        layer(f"pixel_decoder.{name}.norm", 256)
    for number in range(decoder):
        for kind, attention in (("cross", "multihead_attn"), ("self", "self_attn")):
            block = f"predictor.transformer_{kind}_attention_layers.{number}"
            shapes[f"{block}.{attention}.in_proj_weight"] = (768, 256)
            shapes[f"{block}.{attention}.in_proj_bias"] = (768,)
            layer(f"{block}.{attention}.out_proj", 256, 256)
            layer(f"{block}.norm", 256)
        block = f"predictor.transformer_ffn_layers.{number}"
        layer(f"{block}.linear1", 2048, 256)
        layer(f"{block}.linear2", 256, 2048)
        layer(f"{block}.norm", 256)
    layer("predictor.decoder_norm", 256)
    for name, rows in (("query_feat", 100), ("query_embed", 100), ("level_embed", 3)):
        shapes[f"predictor.{name}.weight"] = (rows, 256)
    layer("predictor.class_embed", classes + 1, 256)
    for number in range(3):
        layer(f"predictor.mask_embed.layers.{number}", 256, 256)
    shapes = {f"sem_seg_head.{name}": shape for name, shape in shapes.items()}
    for number, width in enumerate(channels):
        shapes[f"backbone.norm{number}.weight"] = shapes[f"backbone.norm{number}.bias"] = (width,)
    shapes["backbone.patch_embed.proj.weight"] = (channels[0], 3, 4, 4)
    shapes["criterion.empty_weight"] = (classes + 1,)
    return shapes


def write_released(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A file as detectron2 writes it: a pickle (.pkl) of numpy arrays, or torch's (.pth). Returns its tensors."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if path.suffix == ".pkl":
        content = {"model": arrays, "__author__": "third_party", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(content))
    else:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        torch.save({"model": tensors, "trainer": {"iteration": 159_999}, "iteration": 159_999}, path)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


CHANNELS = [128, 256, 512, 1024]


def head_of(pixel: int, decoder: int, classes: list[str]) -> tuple[Head, set[str]]:
    config = HeadExperiment(
        model=Mask2FormerConfig(
            pixel_decoder=PixelDecoderConfig(num_blocks=pixel),
            transformer_decoder=TransformerDecoderConfig(num_blocks=decoder),
        )
    )
    spec = FeatureSpec(channels=tuple(CHANNELS), strides=(4, 8, 16, 32))
    return build_head(config.model, spec=spec, classes=classes), class_tensors(config, spec, classes)


@pytest.mark.parametrize(("suffix", "pixel", "decoder"), [(".pkl", 6, 9), (".pth", 1, 3)])
def test_a_released_head_fits_name_by_name(tmp_path, suffix, pixel, decoder) -> None:
    path = tmp_path / f"model_final{suffix}"
    written = write_released(path, released_names(pixel, decoder, 150, CHANNELS))
    source = read_source(str(path), "segmentation")
    classes = list(ADE20K_CLASSES)
    head, of_classes = head_of(pixel, decoder, classes)
    start = take_over(head, source, classes, of_classes)
    assert start.fresh == {}
    assert start.unused == []
    state = head.state_dict()
    assert len(start.taken) == len(state)
    for name, tensor in written.items():
        if name.startswith("sem_seg_head."):
            assert torch.equal(state[name.removeprefix("sem_seg_head.")], tensor), name
    for number in range(4):
        assert torch.equal(state[f"level_norms.{number}.weight"], written[f"backbone.norm{number}.weight"])


def test_what_a_released_head_does_not_fill_begins_anew_and_is_listed(tmp_path) -> None:
    path = tmp_path / "model_final.pkl"
    shapes = released_names(2, 4, 150, CHANNELS)
    shapes["sem_seg_head.predictor.static_query.weight"] = shapes.pop("sem_seg_head.predictor.query_feat.weight")
    written = write_released(path, shapes)
    source = read_source(str(path), "segmentation")
    classes = [f"kind {number}" for number in range(150)]
    head, of_classes = head_of(1, 3, classes)
    start = take_over(head, source, classes, of_classes)
    assert set(start.fresh) == {"predictor.class_embed.weight", "predictor.class_embed.bias"}
    assert all("other classes" in reason for reason in start.fresh.values())
    assert all(re.search(r"layers\.[1-3]\.", name) for name in start.unused)
    static = written["sem_seg_head.predictor.static_query.weight"]
    assert torch.equal(head.state_dict()["predictor.query_feat.weight"], static)


def test_a_file_of_another_network_is_refused(tmp_path) -> None:
    path = tmp_path / "other.pkl"
    write_released(path, {"sem_seg_head.predictor.class_embed.weight": (3, 4)})
    with pytest.raises(CheckpointError, match=r"sem_seg_head\.\*"):
        read_source(str(path), "segmentation")
