"""Detection's data and heads through the launcher: low-data splits, semantic maps, images of many sizes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from permafrost.data.build import located
from permafrost.data.detection.config import EvaluationConfig, MultiScaleConfig
from permafrost.heads.detection.config import HTCConfig, SemanticBranchConfig
from permafrost.heads.necks.config import BiFPNConfig
from permafrost.launcher.errors import RecipeError
from permafrost.launcher.evaluate import evaluate_run
from permafrost.launcher.experiment import Experiment
from permafrost.launcher.recipes.serialise import experiment_from_json, to_json
from permafrost.launcher.train import train


def htc_of(model) -> HTCConfig:
    box = dataclasses.replace(model.box, class_agnostic=True)
    parts = {**vars(model), "box": box, "neck": BiFPNConfig(channels=16, num_layers=1)}
    return HTCConfig(**parts, semantic=SemanticBranchConfig(num_classes=9, num_convs=1))


@pytest.fixture
def htc(tiny: Callable[..., Experiment], make_head, make_data) -> Callable[..., Experiment]:
    """htc(**fields of the data): HTC with a semantic branch on painted maps and images of many sizes."""

    def build(**fields: object) -> Experiment:
        options = {
            "semantic": "instances",
            "semantic_classes": 9,
            "jitter": MultiScaleConfig(short_sides=(48, 64, 72), max_side=96),
            "evaluation": EvaluationConfig(resize="short_side", short_side=64, max_side=96),
            **fields,
        }
        head = make_head(htc_of(make_head().model))
        return tiny(num_steps=2, heads={"detection": head}, data=make_data(**options))

    return build


def test_htc_trains_on_a_share_of_images_of_many_sizes(htc, tmp_path: Path) -> None:
    experiment = htc(train_share=0.5, train_share_seed=1)
    metrics = train(experiment)
    assert 0 <= metrics["detection"]["bbox/AP"] <= 1
    ids = json.loads((tmp_path / "run" / "train_images.json").read_text())
    everything = json.loads(next(Path(located(experiment.data).root).glob("annotations/*train*")).read_text())
    assert len(ids) == 6
    assert set(ids) < {image["id"] for image in everything["images"]}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("detection/loss_semantic" in line for line in lines)
    assert evaluate_run(tmp_path / "run", which="latest", say=lambda text: None) == metrics
    assert experiment_from_json(to_json(experiment)) == experiment


def test_all_images_need_no_list(tiny, tmp_path: Path) -> None:
    train(tiny(num_steps=1))
    assert not (tmp_path / "run" / "train_images.json").exists()


def test_a_semantic_branch_without_maps_is_refused_at_once(htc) -> None:
    with pytest.raises(RecipeError, match=r"semantic.num_classes is 9 but data.semantic is empty"):
        htc(semantic="")
    with pytest.raises(RecipeError, match=r"data.semantic_classes is 7: they must be the same"):
        htc(semantic_classes=7)
