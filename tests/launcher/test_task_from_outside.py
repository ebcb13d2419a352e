"""A task that the package does not know is trained, evaluated, predicted with, planned and checked from the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import permafrost
from permafrost.launcher.cli import main
from permafrost.launcher.run.folder import read_json_lines

RECIPE = "depth_task:tiny"


@pytest.fixture(scope="module", autouse=True)
def module_in_reach() -> Iterator[None]:
    """The module can be imported, as one in the current folder can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "depth"
    assert main(["train", RECIPE, "--output", str(folder), "--data.num-train", "12"]) == 0
    return folder


def test_it_learns(run: Path) -> None:
    losses = [line["depth/loss"] for line in read_json_lines(run / "metrics.jsonl") if "depth/loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    recipe = json.loads((run / "recipe.json").read_text())["experiment"]
    assert recipe["data"]["class"] == "depth_task:DepthDataConfig"
    assert recipe["heads"]["depth"]["model"]["class"] == "depth_task:DepthHeadConfig"


def test_it_is_evaluated_as_it_was_in_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((run / "final.json").read_text())["metrics"]
    assert main(["evaluate", str(run)]) == 0
    assert json.loads((run / "evaluation.json").read_text())["metrics"] == before
    assert len(json.loads((run / "results_depth.json").read_text())) == 3
    assert "3 drawn pictures" in capsys.readouterr().out


def test_what_it_has_not_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--flip"]) == 0
    assert main(["evaluate", str(run), "--scales", "0.5", "1"]) == 2
    assert "a DepthDataConfig, for depth, which has no such field" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--submission", str(tmp_path)]) == 2
    assert "no submission of a DepthDataConfig, for depth" in capsys.readouterr().err


def test_it_predicts_on_files(run: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((48, 72, 3), 90, dtype=np.uint8)).save(tmp_path / "one.png")
    Image.fromarray(np.full((8, 8, 3), 90, dtype=np.uint8)).save(tmp_path / "small.png")
    assert main(["predict", str(run), str(tmp_path / "*.png"), "--output", str(tmp_path / "out")]) == 1
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert 0.5 < entry["mean_depth"] < 3.5
    with Image.open(tmp_path / "out" / "one.png") as picture:
        assert picture.size == (72 // 4, 48 // 4)


def test_it_is_loaded_by_the_front_door(run: Path) -> None:
    found = permafrost.load_run(run, device="cpu").predict(np.full((64, 64, 3), 90, dtype=np.uint8))
    assert found.depth.shape == (16, 16)


def test_it_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", RECIPE, "--gpu-memory", "80", "--json"]) == 0
    own = json.loads(capsys.readouterr().out)["own"]
    assert own["memory"]["batch"] == 4 * 64 * 64 * (3 + 4)
    assert own["memory"]["head activations"] > 0


def test_its_data_is_checked_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "sheet.png"
    assert main(["check-data", RECIPE, "--draw", "2", "--output", str(target)]) == 0
    assert "no faults found" in capsys.readouterr().out
    with Image.open(target) as sheet:
        assert sheet.size == (2 * 64 + 4, 64 + 20)
