"""A head that starts from another run's, or from a released detector's file, and says what of it begins anew."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from permafrost.data.build import located
from permafrost.data.detection.config import CocoDataConfig, JitterConfig
from permafrost.heads.necks.config import BiFPNConfig
from permafrost.launcher.cli import main
from permafrost.launcher.errors import CheckpointError, WeightsError
from permafrost.launcher.experiment import Experiment
from permafrost.launcher.recipes.overrides import parse_experiment
from permafrost.launcher.run.checkpoint import load_head
from permafrost.launcher.run.first_weights import class_tensors, read_source, take_over
from permafrost.launcher.run.parts import build_heads
from permafrost.launcher.train import train
from permafrost.model import build_backbone
from permafrost.model.config import BackboneConfig

CLASS_TENSORS = {
    f"{name}.{part}" for name in ("box.classifier", "box.regressor", "mask.predictor") for part in ("weight", "bias")
}


RECIPE = f"{Path(__file__).parents[1] / 'tiny_recipe.py'}:tiny"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Experiment, dict[str, torch.Tensor]]:
    """A finished run and its head."""
    output = tmp_path_factory.mktemp("source") / "run"
    experiment = parse_experiment(RECIPE, ["--output", str(output), "--loop.num-steps", "2", "--loop.image-every", "0"])
    train(experiment)
    return experiment, load_head(output).heads["detection"].parameters


def first_step_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_head(run / "checkpoints" / "step_00000001").heads["detection"].parameters


def start(tiny, head, source, **options) -> tuple[dict[str, torch.Tensor], dict[str, Any], Path]:
    """A run of one step with a rate so small that its checkpoint shows where it started."""
    head.optimizer.learning_rate = 1e-12
    head.init = str(source)
    experiment = tiny("new", heads={"detection": head}, num_steps=1, checkpoint_every=1, **options)
    train(experiment)
    run = Path(experiment.output)
    return first_step_weights(run), json.loads((run / "init_head.json").read_text())["detection"], run


def fewer_classes(data, folder: Path, keep: int) -> CocoDataConfig:
    """The same pictures with the first `keep` categories only."""
    there = located(data)
    (folder / "annotations").mkdir(parents=True)
    for split, (file, images) in ((split, there.paths(split)) for split in ("train", "val")):
        content = json.loads(file.read_text())
        content["categories"] = sorted(content["categories"], key=lambda one: one["id"])[:keep]
        ids = {one["id"] for one in content["categories"]}
        content["annotations"] = [one for one in content["annotations"] if one["category_id"] in ids]
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        (folder / f"{split}2017").symlink_to(images)
    return CocoDataConfig(root=str(folder), image_size=64, jitter=JitterConfig(scale_range=(0.7, 1.3)))


def test_the_same_head_is_taken_over_whole(tiny, make_head, source, capsys) -> None:
    experiment, trained = source
    weights, report, _ = start(tiny, make_head(), experiment.output)
    assert report["fresh"] == {}
    assert report["unused"] == report["notes"] == []
    assert set(report["taken"]) == set(trained) == set(weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, trained[name], rtol=0, atol=1e-9)
    assert f"head detection: {len(trained)} of {len(trained)} tensors start from" in capsys.readouterr().out


def test_a_run_goes_on_from_its_own_checkpoint_when_its_start_is_gone(tiny, make_head, source, tmp_path) -> None:
    experiment, _ = source
    copied = tmp_path / "copied"
    shutil.copytree(experiment.output, copied)
    _, report, run = start(tiny, make_head(), copied)
    assert report["fresh"] == {}
    shutil.rmtree(copied)
    (run / "final.json").unlink()
    again = dataclasses.replace(make_head(learning_rate=1e-12), init=str(copied))
    train(tiny("new", heads={"detection": again}, num_steps=1, checkpoint_every=1), resume="must")


def test_other_classes_and_another_neck_begin_anew_and_are_listed(
    tiny, make_head, make_data, source, tmp_path, capsys
) -> None:
    experiment, trained = source
    head = make_head()
    head.model.neck = BiFPNConfig(channels=16, num_layers=1)
    weights, report, _ = start(
        tiny, head, experiment.output, data=fewer_classes(make_data(), tmp_path / "three", 3), seed=5
    )
    necks = {name for name in weights if name.startswith("neck.")}
    fusion = {name for name in necks if name.startswith("neck.layers.")}
    assert set(report["fresh"]) == CLASS_TENSORS | fusion
    assert report["fresh"]["box.classifier.weight"] == "4x16: there it is 9x16"
    assert all(reason.endswith("not there") for name, reason in report["fresh"].items() if name in fusion)
    assert set(report["unused"]) == {name for name in trained if name.startswith("neck.output.")}
    for name in report["taken"]:
        torch.testing.assert_close(weights[name], trained[name], rtol=0, atol=1e-9)
    out = capsys.readouterr().out
    assert all(f"initialised anew: {name} (" in out for name in report["fresh"])
    assert "8 classes there, 3 here" in out


def test_as_many_but_other_classes_are_not_taken(tiny, make_head, source) -> None:
    experiment, _ = source
    config = make_head()
    spec = build_backbone(BackboneConfig(name="swinv2_nano", weights="random")).spec
    classes = [f"other {i}" for i in range(8)]
    of_classes = class_tensors(config, spec, classes)
    assert of_classes == CLASS_TENSORS
    head = build_heads(tiny("unused", heads={"detection": config}), spec, classes)["detection"]
    found = take_over(head, read_source(experiment.output, "detection"), classes, of_classes)
    assert set(found.fresh) == CLASS_TENSORS
    assert all("other classes" in reason for reason in found.fresh.values())


def test_a_fine_tuned_run_takes_a_frozen_one_s_head_and_the_other_way_round(tiny, make_head, source) -> None:
    experiment, trained = source
    full = BackboneConfig(name="swinv2_nano", weights="random", frozen=False)
    weights, report, run = start(tiny, make_head(), experiment.output, backbone=full)
    assert report["fresh"] == {}
    for name, tensor in trained.items():
        torch.testing.assert_close(weights[f"head.{name}"], tensor, rtol=0, atol=1e-9)
    back = read_source(str(run), "detection")
    assert set(back.tensors) == set(trained)
    assert "not taken along" in back.notes[0]


def test_another_backbone_is_told(tiny, make_head, source) -> None:
    experiment, _ = source
    _, report, _ = start(
        tiny, make_head(), experiment.output, backbone=BackboneConfig(name="swinv2_nano", weights="random:7")
    )
    assert report["fresh"] == {}
    assert any("another backbone" in note for note in report["notes"])


def released_file(path: Path, weights: dict[str, torch.Tensor], classes) -> Path:
    """The head's own weights, as the released detection code would have written them."""
    names = {
        "neck.level_norms.": "backbone.norm", "box.fcs.": "roi_head.bbox_head.shared_fcs.",
        "box.classifier.": "roi_head.bbox_head.fc_cls.", "box.regressor.": "roi_head.bbox_head.fc_reg.",
        "mask.upsample.": "roi_head.mask_head.upsample.", "mask.predictor.": "roi_head.mask_head.conv_logits.",
        "rpn.objectness.": "rpn_head.rpn_cls.", "rpn.regressor.": "rpn_head.rpn_reg.", "rpn.convs.0.": "rpn_head.rpn_conv.",
    }  # fmt: skip
    state = {"backbone.patch_embed.proj.weight": torch.zeros(1)}
    for name, tensor in weights.items():
        for own, theirs in names.items():
            if name.startswith(own):
                state[theirs + name.removeprefix(own)] = tensor
                break
        else:
            kind, rest = name.split(".", 1)
            place, number, part = rest.split(".")
            theirs = {
                "lateral": "neck.lateral_convs",
                "output": "neck.fpn_convs",
                "convs": f"roi_head.{kind}_head.convs",
            }
            state[f"{theirs[place]}.{number}.conv.{part}"] = tensor
    torch.save({"meta": {"CLASSES": tuple(classes), "epoch": 36}, "state_dict": state}, path)
    return path


def test_a_released_file_is_a_start_too(tiny, make_head, source, tmp_path) -> None:
    experiment, trained = source
    classes = load_head(experiment.output).state.classes
    weights, report, _ = start(tiny, make_head(), released_file(tmp_path / "mask_rcnn.pth", trained, classes))
    assert report["fresh"] == {}
    assert report["unused"] == []
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, trained[name], rtol=0, atol=1e-9)
    # The same names in another order: no row would mean what it meant.
    turned = read_source(str(released_file(tmp_path / "turned.pth", trained, classes[::-1])), "detection")
    assert turned.classes == classes[::-1]
    nameless = torch.load(tmp_path / "turned.pth", weights_only=True)
    torch.save({"state_dict": nameless["state_dict"]}, tmp_path / "nameless.pth")
    assert "names no classes" in read_source(str(tmp_path / "nameless.pth"), "detection").notes[-1]


def test_what_cannot_be_a_start_is_refused(tiny, make_head, source, tmp_path, capsys) -> None:
    experiment, _ = source
    with pytest.raises(CheckpointError, match="no such run folder"):
        start(tiny, make_head(), tmp_path / "nowhere")
    torch.save({"model": {"patch_embed.proj.weight": torch.zeros(2)}}, tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match="neither a run's head nor a released detector"):
        read_source(str(tmp_path / "backbone.pth"), "detection")
    (tmp_path / "text.pth").write_text("no pickle")
    with pytest.raises(WeightsError, match="damaged"):
        read_source(str(tmp_path / "text.pth"), "detection")
    head = torch.nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match=r"none of its \d+ tensors fits"):
        take_over(head, read_source(experiment.output, "detection"), [], set())
    assert main(["train", RECIPE, "--init-head", str(tmp_path / "nowhere"), "--output", str(tmp_path / "cli")]) == 2
    assert "no such run folder" in capsys.readouterr().err
