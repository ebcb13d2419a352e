"""A run folder and recipes that were written before the configurations' files moved (commit e418ddf) read, resume and score as then."""

from __future__ import annotations

import dataclasses
import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest

from permafrost.heads import HTCConfig
from permafrost.launcher.cli import main
from permafrost.launcher.errors import RunFolderError
from permafrost.launcher.files import read_json_lines
from permafrost.launcher.recipes import old_runs
from permafrost.launcher.recipes.find import build_recipe
from permafrost.launcher.recipes.old_runs import OldValue
from permafrost.launcher.recipes.serialise import PACKAGES, experiment_from_json, public_name, to_json
from permafrost.launcher.run.folder import RunFolder

BEFORE = Path(__file__).with_name("before")
RECIPE = f"{BEFORE / 'recipe.py'}:before"
LOSSES = {3: 4.039310249267146, 4: 3.7713334198342636}
"""Of the steps that the run went on to take at that commit."""
RECIPES = json.loads((BEFORE / "recipes.json").read_text())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run after 2 of its 4 steps."""
    return Path(shutil.copytree(BEFORE / "run", tmp_path / "run"))


def test_it_resumes_and_takes_the_same_steps(run: Path) -> None:
    written = (run / "recipe.json").read_bytes()
    assert main(["train", RECIPE, "--output", str(run)]) == 0
    losses = {line["step"]: line["detection/loss"] for line in read_json_lines(run / "metrics.jsonl")}
    assert sorted(losses) == [1, 2, 3, 4]
    assert {step: losses[step] for step in LOSSES} == pytest.approx(LOSSES, rel=1e-4)
    assert (run / "recipe.json").read_bytes() == written
    assert main(["evaluate", str(run)]) == 0


def test_a_changed_field_is_still_refused_by_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["train", RECIPE, "--output", str(run), "--heads.detection.model.box.nms-iou", "0.6"])
    assert code == 2
    error = capsys.readouterr().err
    assert "heads.detection.model.box.nms_iou: the run has 0.5, now 0.6" in error
    assert "class" not in error


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_before_are_todays(name: str) -> None:
    found, today = experiment_from_json(RECIPES[name]), build_recipe(name)
    for head, own in today.heads.items():
        if isinstance(own.model, HTCConfig):
            # The one thing whose default has changed since.
            assert found.heads[head].model.semantic.resize == "after"
            own.model.semantic.resize = "after"
    assert found == today
    text = json.dumps(to_json(found))
    assert "permafrost." not in text
    assert experiment_from_json(json.loads(text)) == found


def test_a_field_that_was_added_later_means_what_the_code_did_then(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As if smooth_l1_beta had come after this run, when the code had 0.5 and no field; its default is 0 today.
    content = json.loads((run / "recipe.json").read_text())
    del content["experiment"]["heads"]["detection"]["model"]["box"]["smooth_l1_beta"]
    (run / "recipe.json").write_text(json.dumps(content))
    monkeypatch.setattr(old_runs, "OLD_VALUES", [OldValue("heads.BoxHeadConfig", "smooth_l1_beta", "2026-12-24", 0.5)])
    assert RunFolder(run).experiment().heads["detection"].model.box.smooth_l1_beta == 0.5  # type: ignore[attr-defined]

    assert main(["train", RECIPE, "--output", str(run)]) == 2
    assert "heads.detection.model.box.smooth_l1_beta: the run has 0.5, now 0.0" in capsys.readouterr().err
    assert main(["train", RECIPE, "--output", str(run), "--heads.detection.model.box.smooth-l1-beta", "0.5"]) == 0
    losses = {line["step"]: line["detection/loss_box"] for line in read_json_lines(run / "metrics.jsonl")}
    assert losses[3] < 0.9 * 0.0003629650454968214  # the loss of that step with 0, squared in part


def test_the_old_value_of_a_base_class_holds_for_its_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.loads(json.dumps(RECIPES["quickstart"]))
    del data["data"]["train_empty_images"]
    monkeypatch.setattr(old_runs, "OLD_VALUES", [OldValue("data.CocoDataConfig", "train_empty_images", "later", True)])
    assert data["data"]["class"].endswith("ShapesDataConfig")
    assert experiment_from_json(data).data.train_empty_images is True  # type: ignore[attr-defined]


def configurations() -> dict[str, type]:
    found = {}
    for package in PACKAGES:
        front = import_module(f"permafrost.{package}")
        for name in front.__all__:
            value = getattr(front, name)
            if (
                isinstance(value, type)
                and dataclasses.is_dataclass(value)
                and name.endswith(("Config", "Experiment", "World"))
            ):
                found[f"{package}.{name}"] = value
    return found


def test_every_configuration_is_in_its_packages_front_under_the_name_that_is_written() -> None:
    found = configurations()
    assert len(found) >= 40
    assert {name: public_name(cls) for name, cls in found.items()} == {name: name for name in found}
    assert json.loads((BEFORE / "fields.json").read_text()).keys() <= found.keys()


def test_every_field_that_was_added_since_says_what_its_absence_means() -> None:
    before = json.loads((BEFORE / "fields.json").read_text())
    told = {(entry.configuration, entry.field) for entry in old_runs.OLD_VALUES}
    untold = []
    for name, cls in configurations().items():
        lineage = [public_name(base) for base in cls.__mro__[:-1]]
        for field in dataclasses.fields(cls):
            is_new = name in before and field.init and field.name not in before[name]
            if is_new and not any((base, field.name) in told for base in lineage):
                untold.append(f"{name}.{field.name}")
    assert not untold, "give each a row in OLD_VALUES: what did the code do before it?"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("permafrost.data.detection.config:ShapeDataConfig", "did you mean data.ShapesDataConfig"),
        ("data.ShapeDataConfig", "did you mean data.ShapesDataConfig"),
        ("heads.CocoDataConfig", "did you mean data.CocoDataConfig"),
        ("tomorrow.CocoDataConfig", "did you mean data.CocoDataConfig"),
        ("data.check_coco", "expected a TaskDataConfig"),
        ("permafrost.nowhere:CocoDataConfig", "not part of permafrost"),
        ("my_module:MyData", "import my_module before reading this run"),
        ("nonsense", "there is data.ADE20KDataConfig"),
    ],
)
def test_a_name_that_is_not_known_is_named(written: str, message: str) -> None:
    data = json.loads(json.dumps(RECIPES["quickstart"]))
    data["data"]["class"] = written
    with pytest.raises(RunFolderError, match=message) as caught:
        experiment_from_json(data)
    assert written in str(caught.value)
    assert "\n" not in str(caught.value)
