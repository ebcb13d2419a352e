"""Predicting on files: names, bad inputs, and the same detections as evaluation finds."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from permafrost.data.build import located
from permafrost.data.detection.config import CocoDataConfig
from permafrost.data.detection.inputs import DetectionInputs
from permafrost.data.detection.types import DetectionResult
from permafrost.data.pictures import read
from permafrost.data.pictures.draw import class_color
from permafrost.data.task import IMAGE_SUFFIXES
from permafrost.launcher.cli import main
from permafrost.launcher.errors import CheckpointError, RunFolderError
from permafrost.launcher.predict import find_inputs, picture_names, predict_run
from permafrost.launcher.recipes.overrides import parse_experiment
from permafrost.launcher.run import folder as run_folder

RECIPE = Path(__file__).with_name("tiny_recipe.py")


def train(name: str, output: Path) -> Path:
    assert main(["train", f"{RECIPE}:{name}", "--output", str(output), "--device", "cpu"]) == 0
    return output


@pytest.fixture(scope="module")
def run(permafrost_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of one head."""
    return train("tiny", tmp_path_factory.mktemp("predict") / "run")


@pytest.fixture
def images(run: Path, tmp_path: Path) -> Path:
    """A copy of the validation images of the run's world."""
    experiment = parse_experiment(f"{RECIPE}:tiny", [])
    _, folder = located(experiment.data).paths("val")
    return Path(shutil.copytree(folder, tmp_path / "images"))


def digests(folder: Path) -> dict[Path, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_predictions_are_those_of_the_evaluation(run: Path, images: Path, tmp_path: Path) -> None:
    """The same numbers on another path: evaluation goes through loader, batch and evaluator of the validation set."""
    before = digests(images)
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    evaluated = json.loads((run / "results_detection.json").read_text())
    output = tmp_path / "out"
    assert main(["predict", str(run), str(images), "--output", str(output), "--score-threshold", "0"]) == 0
    predicted = json.loads((output / "predictions.json").read_text())
    assert len(predicted) == len(evaluated) > 10
    files = sorted(path.name for path in images.iterdir())
    annotations = located(parse_experiment(f"{RECIPE}:tiny", []).data).paths("val")[0]
    truth = json.loads(annotations.read_text())
    names = {image["id"]: Path(image["file_name"]).name for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    for found, expected in zip(predicted, sorted(evaluated, key=lambda entry: names[entry["image_id"]])):
        assert Path(found["file_name"]).name == names[expected["image_id"]] == files[found["image_id"]]
        assert found["category_id"] == expected["category_id"]
        assert found["category_id"] in categories
        assert found["score"] == pytest.approx(expected["score"], abs=1e-5)
        assert found["bbox"] == pytest.approx(expected["bbox"], abs=0.05)
        masks = [mask_api.decode(entry["segmentation"]) for entry in (found, expected)]
        assert masks[0].shape == (96, 96)
        assert (masks[0] != masks[1]).mean() < 0.002
    for name in files:
        picture = np.asarray(Image.open(output / f"{Path(name).stem}.png"))
        assert picture.shape == (384, 384, 3), "enlarged by a whole factor, so that labels can be read"
    assert digests(images) == before, "inputs are only read"


def test_results_are_drawn_where_they_are_on_the_original_image(tmp_path: Path) -> None:
    result = DetectionResult(
        image_id=0,
        boxes=torch.tensor([[10.0, 5.0, 30.0, 20.0]]),
        labels=torch.tensor([2]),
        scores=torch.tensor([0.9]),
        masks=torch.ones(1, 7, 7),
        size=(40, 64),
        original_size=(400, 640),
    )
    reader = DetectionInputs(CocoDataConfig(), ["a", "b", "c"], [1, 2, 3])
    shown = reader.keep([result], 0.5)
    assert shown.names == ["c"]
    assert shown.masks.sum() == pytest.approx(200 * 150, rel=0.02)
    reader.write(torch.zeros(3, 400, 640, dtype=torch.uint8), shown, tmp_path / "shown.png")
    picture = np.asarray(Image.open(tmp_path / "shown.png"))
    assert picture.shape == (400, 640, 3)
    color = np.array(class_color(2))
    for row, column in ((199, 200), (120, 100), (120, 299)):
        assert (picture[row, column] == color).all(), "the box's outline"
    assert picture[120, 200].any(), "the mask inside"
    assert not picture[120, 90].any()
    assert not picture[210, 200].any()


def test_threshold_leaves_out_what_is_unsure(run: Path, images: Path, tmp_path: Path) -> None:
    everything = predict_run(run, [str(images)], tmp_path / "all", score_threshold=0.0, device="cpu")
    scores = sorted(entry["score"] for entry in everything.results)
    threshold = scores[len(scores) // 2]
    some = predict_run(run, [str(images)], tmp_path / "some", score_threshold=threshold, device="cpu")
    assert sorted(entry["score"] for entry in some.results) == [score for score in scores if score >= threshold]
    nothing = predict_run(run, [str(images)], tmp_path / "none", score_threshold=1.0, device="cpu")
    assert json.loads((tmp_path / "none" / "predictions.json").read_text()) == nothing.results == []
    assert len(nothing.pictures) == 5


def test_bad_inputs_are_named_and_the_others_go_on(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted(images.iterdir())[0]
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "text.jpg").write_text("no image")
    (bad / "empty.png").write_text("")
    (bad / "cut.jpg").write_bytes(good.read_bytes()[:600])
    (bad / "notes.txt").write_text("in a folder, only images are taken")
    missing, output = tmp_path / "missing.jpg", tmp_path / "out"
    before = digests(bad)
    command = ["predict", str(run), str(bad), str(missing), str(good), str(tmp_path / "*.gif"), "--output", str(output)]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert sorted(path.name for path in output.iterdir()) == [f"{good.stem}.png", "predictions.json"]
    assert "error: 5 of 6 inputs could not be read" in captured.err
    for name, reason in (
        (bad / "text.jpg", "not an image"),
        (bad / "empty.png", "the file is empty"),
        (bad / "cut.jpg", ""),
        (missing, "there is no such file or folder"),
        (tmp_path / "*.gif", "no file matches this pattern"),
    ):
        assert f"{name}: " in captured.err
        assert reason in captured.err.split(f"{name}: ")[1].splitlines()[0]
    assert "notes.txt" not in captured.err
    assert digests(bad) == before

    shutil.rmtree(output)
    assert main(["predict", str(run), str(bad), "--output", str(output)]) == 2
    assert not list(output.iterdir()), "nothing is claimed about images that could not be read"


def test_same_names_do_not_overwrite_each_other_nor_the_inputs(run: Path, images: Path, tmp_path: Path) -> None:
    first, second, *_ = sorted(images.iterdir())
    for folder, source in (("a", first), ("b", second)):
        (tmp_path / folder).mkdir()
        shutil.copy(source, tmp_path / folder / "same.jpg")
    Image.open(first).save(tmp_path / "a" / "only.png")
    before = digests(tmp_path / "a")
    done = predict_run(run, [str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "a", device="cpu")
    written = [path.name for path in done.pictures.values()]
    assert written == ["only_predicted.png", "a_same.png", "b_same.png"]
    after = digests(tmp_path / "a")
    assert {file: after[file] for file in before} == before
    assert not list((tmp_path / "b").glob("*.png")), "nothing is written beside inputs unless asked"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["/x/a.jpg", "/x/b.jpg"], ["a", "b"]),
        (["/x/a.jpg", "/y/a.jpg", "/y/b.jpg"], ["x_a", "y_a", "b"]),
        (["/x/a.jpg", "/x/A.png"], ["a_jpg", "A_png"]),
        (["/p/x/a.jpg", "/q/x/a.jpg"], ["p_x_a", "q_x_a"]),
        (["/x/a.jpg", "/y/a.jpg", "/z/x_a.jpg"], None),
        (["/1/2/3/4/5/a.jpg", "/0/2/3/4/5/a.jpg", "/0/9/3/4/5/a.jpg"], None),
        (["/x/a.b.jpg", "/x/a.b.png", "/x/a_b_jpg"], None),
    ],
)
def test_picture_names_differ(files: list[str], expected: list[str] | None) -> None:
    names = picture_names([Path(file) for file in files])
    assert len({name.casefold() for name in names}) == len(files)
    assert all(name.endswith(".png") and "/" not in name for name in names)
    if expected is not None:
        assert names == [f"{name}.png" for name in expected]


def test_the_recipe_and_every_file_are_read_once(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()

    def counted(place: Any, name: str, called: Callable[..., str]) -> None:
        original = getattr(place, name)

        def count(*arguments: Any, **keywords: Any) -> Any:
            reads[called(*arguments)] += 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(place, name, count)

    counted(read, "read_image", lambda path, *_: Path(path).name)
    counted(run_folder, "experiment_from_json", lambda *_: "recipe")
    done = predict_run(run, [str(images)], tmp_path / "out", say=lambda _: None)
    assert len(done.pictures) == 5
    assert reads == {"recipe": 1} | {path.name: 1 for path in images.iterdir()}


def test_inputs_are_files_folders_and_patterns_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in/b.JPG", "in/deep/a.png", "in/notes.txt", "odd[1].png", "plain"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("")
    found, failures = find_inputs(
        ["in", "in/*.JPG", "odd[1].png", "plain", "./in/../plain", "in/**/*.png"], IMAGE_SUFFIXES, "image"
    )
    assert [str(path) for path in found] == ["in/b.JPG", "in/deep/a.png", "odd[1].png", "plain"]
    assert not failures
    Path("empty").mkdir()
    assert set(find_inputs(["empty", "x*", "gone"], IMAGE_SUFFIXES, "image")[1]) == {"empty", "x*", "gone"}


def test_what_cannot_be_predicted_with_is_refused(run: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        predict_run(tmp_path / "no_run", [str(images)], tmp_path / "out", device="cpu")
    with pytest.raises(CheckpointError, match="no head masks: it trains detection"):
        predict_run(run, [str(images)], tmp_path / "out", head="masks", device="cpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="file is not a folder that can be written"):
        predict_run(run, [str(images)], tmp_path / "file", device="cpu")


def test_one_of_several_heads_must_be_named(images: Path, tmp_path: Path) -> None:
    run = train("two_heads", tmp_path / "two")
    with pytest.raises(CheckpointError, match="has the heads detection, second: choose one with --head"):
        predict_run(run, [str(images)], tmp_path / "out", device="cpu")
    command = ["predict", str(run), str(images), "--output", str(tmp_path / "out"), "--head", "second"]
    assert main(command) == 0
