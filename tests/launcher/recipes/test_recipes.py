"""Finding recipes by name, and the overrides of their fields."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from permafrost._nearest import nearest
from permafrost.configs import coco, quickstart, vitdet
from permafrost.data.errors import DataError
from permafrost.data.worlds.config import ShapesDataConfig, ShapesWorld
from permafrost.heads.necks.config import FPNConfig, SimplePyramidConfig
from permafrost.launcher.errors import RecipeError
from permafrost.launcher.experiment import Experiment
from permafrost.launcher.pretraining.config import PretrainExperiment
from permafrost.launcher.recipes.find import build_recipe, find_recipe, list_recipes, summary_of
from permafrost.launcher.recipes.overrides import apply_overrides, flags_of
from permafrost.launcher.recipes.serialise import experiment_from_json, to_json

OWN = '''
from __future__ import annotations
from dataclasses import dataclass
from permafrost.data.worlds.config import ShapesDataConfig
from permafrost.launcher.experiment import Experiment, HeadExperiment
from permafrost.model.config import BackboneConfig

@dataclass
class MyData(ShapesDataConfig):
    extra: int | None = None

def {name}() -> Experiment:
    """A recipe of my own. With a second sentence."""
    heads = {{"detection": HeadExperiment(), "second_head": HeadExperiment()}}
    backbone = BackboneConfig(name="swinv2_nano", weights="random")
    return Experiment(name="mine", backbone=backbone, data=MyData(), heads=heads)
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file with one recipe of a user's own."""
    file = tmp_path / "own_recipes.py"
    file.write_text(OWN.format(name="mine"))
    return file


def test_shipped_recipes_are_found_by_module_and_function() -> None:
    assert find_recipe("quickstart") is quickstart.quickstart
    assert find_recipe("quickstart:quickstart") is quickstart.quickstart
    assert find_recipe("coco:swinv2_base_fpn") is coco.swinv2_base_fpn
    assert find_recipe("swinv2_base_fpn") is coco.swinv2_base_fpn
    assert find_recipe("permafrost.configs.coco:swinv2_base_fpn") is coco.swinv2_base_fpn


def test_every_shipped_recipe_builds_and_says_what_it_is() -> None:
    listed = {info.name: info for info in list_recipes()}
    assert {"quickstart", "coco:swinv2_base_fpn", "pretrain:nano_glyphs"} <= set(listed)
    for info in listed.values():
        assert info.error is None, info
        assert info.summary, info
        assert info.backbone, info
        assert find_recipe(info.name) is info.function
        expected = Experiment if info.command == "train" else PretrainExperiment
        assert isinstance(build_recipe(info.name, expected), expected)
    assert listed["coco:swinv2_base_fpn"].metric == "45.0 box AP, 41.1 mask AP"
    assert listed["coco:swinv2_base_fpn"].data == "coco (data/coco)"
    assert listed["quickstart"].data == "shapes"
    assert listed["pretrain:nano_glyphs"].command == "pretrain"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quickstrat", "did you mean quickstart"),
        ("coco:swinv2_base_fnp", "did you mean coco:swinv2_base_fpn"),
        ("cocoo:swinv2_base_fpn", "did you mean coco:swinv2_base_fpn"),
        ("coco", "swinv2_base_fpn"),
        ("no.such.module:function", "there is no recipe"),
        ("os.no_such_part:function", "there is no module os.no_such_part"),
        ("os:getcwdb", "returns a bytes, expected a Experiment"),
        ("os:fork_there", "has no recipe 'fork_there'"),
        ("", "is not a recipe"),
        ("--loop.num-steps", "the recipe's name comes before its fields"),
        ("nowhere/file.py:function", "there is no recipe file"),
        ("we ird:name", "there is no recipe"),
    ],
)
def test_unknown_names_say_what_is_near(name: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        build_recipe(name)


def test_a_recipe_for_another_command_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="it is for `permafrost pretrain`"):
        build_recipe("pretrain:nano_glyphs")


def test_own_file(own: Path) -> None:
    found = find_recipe(f"{own}:mine")
    assert summary_of(found) == "A recipe of my own."
    assert find_recipe(str(own)) is found, "the only recipe of a file needs no name"
    experiment = build_recipe(f"{own}:mine")
    assert experiment.name == "mine"
    with pytest.raises(RecipeError, match=r"did you mean .*own_recipes.py:mine"):
        find_recipe(f"{own}:mien")
    with pytest.raises(RecipeError, match=r"did you mean .*own_recipes.py"):
        find_recipe(f"{own.parent}/own_recipe.py:mine")


def test_own_file_with_a_table(tmp_path: Path) -> None:
    file = tmp_path / "table.py"
    file.write_text(
        "from permafrost.configs.paper_parts import TINY_1K, Protocol, Row, recipes_of\n"
        "from permafrost.configs.quickstart import quickstart\n"
        "from permafrost.heads import CascadeConfig, MaskRCNNConfig\n"
        "from permafrost.launcher import Experiment\n"
        "MINE = Protocol(quickstart, prefix='mine', command='permafrost train table.py:NAME', metrics=('box AP', 'mask AP'))\n"
        "ROWS = [\n"
        "    Row('plain', 'one stage', TINY_1K, MaskRCNNConfig, [40.0, 35.5], [41.0, 36.5]),\n"
        "    Row('cascade', 'three stages', TINY_1K, CascadeConfig, [42.0, 37.5], [43.0, 38.5], remark='Slow.'),\n"
        "]\n"
        "globals().update(recipes_of(__name__, 'My table', ROWS, MINE))\n"
        "for steps in (10, 20):\n"
        "    def recipe(steps=steps) -> Experiment:\n"
        "        experiment = quickstart()\n"
        "        experiment.loop.num_steps = steps\n"
        "        return experiment\n"
        "    globals()[f'steps_{steps}'] = recipe\n"
        "del recipe\n"
    )
    found = find_recipe(f"{file}:cascade_full")
    assert found.__doc__ == (
        "My table, three stages: fine-tuned, 43.0 box AP and 38.5 mask AP.\n\n    permafrost train table.py:cascade_full\n\n"
        "Weights: swinv2_tiny_patch4_window8_256.pth, of the Swin Transformer release.\nSlow."
    )
    experiment, frozen = build_recipe(f"{file}:cascade_full"), build_recipe(f"{file}:cascade")
    assert (experiment.name, experiment.backbone.frozen, frozen.backbone.frozen) == ("mine_cascade_full", False, True)
    assert experiment.heads["detection"].model == frozen.heads["detection"].model
    assert build_recipe(f"{file}:steps_20").loop.num_steps == 20
    with pytest.raises(RecipeError, match="holds 6 recipes"):
        find_recipe(str(file))
    with pytest.raises(RecipeError, match=r"did you mean .*table.py:plain_full"):
        find_recipe(f"{file}:plain_ful")


def test_recipes_are_functions_that_their_module_holds() -> None:
    """Those of a table too: workers and engines may send them by name."""
    for info in list_recipes():
        name = info.name.rpartition(":")[2]
        assert info.function.__name__ == info.function.__qualname__ == name
        assert info.function.__module__ == f"permafrost.configs.{info.name.partition(':')[0]}"
        assert pickle.loads(pickle.dumps(info.function)) is info.function


def test_own_module_in_the_current_folder(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = own.with_name("my_recipes_module.py")
    own.rename(module)
    monkeypatch.chdir(module.parent)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert build_recipe("my_recipes_module:mine").name == "mine"
    assert sys.path.index(str(module.parent)) == len(sys.path) - 1, (
        "a folder of the user's must not shadow what is installed"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def broken(:\n", r"SyntaxError.*own_recipes.py, line 1"),
        ("import no_such_package\n", r"ModuleNotFoundError.*own_recipes.py, line 1"),
        ("\n\ndef mine():\n    return 1 / 0\n", r"fails: ZeroDivisionError.*own_recipes.py, line 4"),
        ("def mine(size):\n    return None\n", "without required arguments"),
        ("mine = 3\n", "without required arguments"),
        ("def mine():\n    return None\n", "returns a NoneType"),
    ],
)
def test_a_faulty_file_is_a_user_error_that_names_the_line(own: Path, text: str, expected: str) -> None:
    own.write_text(text)
    with pytest.raises(RecipeError, match=expected):
        build_recipe(f"{own}:mine")


@pytest.mark.parametrize("recipe", [vitdet.dinov2_small, vitdet.debug, quickstart.quickstart])
def test_a_field_of_several_kinds_is_the_recipes_own(recipe) -> None:
    """The neck: its flags are those of the kind the recipe holds, and a run folder keeps the kind."""
    before = recipe()
    kind = FPNConfig if recipe is quickstart.quickstart else SimplePyramidConfig
    args = ("--heads.detection.model.neck.channels", "24", "--heads.detection.model.neck.level-norm", "False")
    if kind is SimplePyramidConfig:
        args = (*args, "--backbone.taps", "3", "7", "11")
    changed = apply_overrides(before, args, prog="permafrost train mine")
    neck = changed.heads["detection"].model.neck
    assert neck == kind(channels=24, num_extra_levels=neck.num_extra_levels, level_norm=False)
    assert changed.backbone.taps == ((3, 7, 11) if kind is SimplePyramidConfig else None)
    assert experiment_from_json(to_json(changed)) == changed
    assert experiment_from_json(to_json(before)) == before


def test_nearest_knows_initials_and_last_parts() -> None:
    flags = ["heads.detection.optimizer.learning-rate", "loop.num-steps", "loop.seed"]
    assert nearest("lr", flags) == ["heads.detection.optimizer.learning-rate"]
    assert nearest("num-step", flags) == ["loop.num-steps"]
    assert nearest("loop.sede", flags) == ["loop.seed"]
    assert nearest("zzz", flags) == []


def override(own: Path, *args: str) -> Experiment:
    return apply_overrides(build_recipe(f"{own}:mine"), args, prog="permafrost train mine")


def test_overrides_of_every_kind_of_field(own: Path) -> None:
    before = build_recipe(f"{own}:mine")
    assert override(own) == before
    changed = override(
        own,
        *("--heads.detection.optimizer.learning-rate", "2e-4"),
        *("--heads.second_head.optimizer.learning_rate=3e-4", "--heads.second-head.optimizer.clip-norm", "1.5"),
        *("--heads.detection.optimizer.betas", "0.8", "0.95", "--heads.detection.optimizer.no-decay", "bias"),
        *("--heads.detection.model.neck.channels", "64"),
        *(
            "--loop.evaluate_every",
            "None",
            "--loop.num-steps",
            "7",
            "--engine.kind",
            "deepspeed",
            "--engine.zero-stage",
            "3",
        ),
        *("--data.extra", "4", "--data.world.num-train", "9", "--data.train-empty-images", "True"),
        *("--backbone.window-size", "8", "8", "4", "4", "--output", "some where"),
    )
    assert changed.heads["detection"].optimizer.learning_rate == 2e-4
    assert changed.heads["second_head"].optimizer.learning_rate == 3e-4
    assert changed.heads["second_head"].optimizer.clip_norm == 1.5
    assert changed.heads["detection"].optimizer.betas == (0.8, 0.95)
    assert changed.heads["detection"].optimizer.no_decay == ("bias",)
    assert changed.heads["detection"].model.neck.channels == 64
    assert (changed.loop.evaluate_every, changed.loop.num_steps) == (None, 7)
    assert (changed.engine.kind, changed.engine.zero_stage) == ("deepspeed", 3)
    assert type(changed.data) is type(before.data)
    assert changed.data.extra == 4
    assert changed.data.train_empty_images is True
    assert isinstance(changed.data, ShapesDataConfig)
    assert changed.data.world == ShapesWorld(num_train=9)
    assert changed.backbone.window_size == (8, 8, 4, 4)
    assert changed.output == "some where"
    assert changed.heads["second_head"].model == before.heads["second_head"].model
    assert override(own) == before, "the recipe itself is as it was"


@pytest.mark.parametrize(
    ("args", "error", "expected"),
    [
        (["--loop.num-step", "3"], RecipeError, "no option --loop.num-step: did you mean --loop.num-steps"),
        (["--heads.detektion.metric", "x"], RecipeError, "did you mean --heads.detection.metric"),
        (["--lr", "1"], RecipeError, "did you mean .*learning-rate"),
        (["--loop.num-steps", "3", "4"], RecipeError, "unexpected argument '4'"),
        (
            ["--heads.detection.optimizer.learning-rate", "-1"],
            RecipeError,
            "optimizer.learning_rate is -1.0: it must be above 0",
        ),
        (["--loop.num-steps", "0"], RecipeError, "loop.num_steps is 0"),
        (["--loop.global-batch", "3", "--engine.accumulation", "2"], RecipeError, "does not divide"),
        (["--data.jitter.flip", "7"], DataError, "data.jitter: flip 7"),
    ],
)
def test_wrong_overrides_are_user_errors(own: Path, args: list[str], error: type, expected: str) -> None:
    with pytest.raises(error, match=expected) as caught:
        override(own, *args)
    assert "│" not in str(caught.value), "the message itself, not a picture of it"


@pytest.mark.parametrize(
    "args",
    [
        ["--loop.num-steps", "three"],
        ["--engine.kind", "fast"],
        ["--loop.num-steps"],
        ["--data.train-empty-images", "maybe"],
    ],
)
def test_values_of_the_wrong_type_exit_with_2(own: Path, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        override(own, *args)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert args[0] in captured.err
    assert not captured.out


def test_flags_are_those_that_help_shows(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        override(own, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = flags_of(build_recipe(f"{own}:mine"))
    assert len(flags) > 80
    missing = [flag for flag in flags if flag not in text]
    assert not missing
    assert "--heads.second-head.optimizer.learning-rate FLOAT" in text
    assert "(default: 0.0001)" in text
