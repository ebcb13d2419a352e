"""A misspelt field of a configuration is refused, in a recipe file too; what configurations went through before still works."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from importlib import import_module
from pathlib import Path

import pytest

from permafrost._configuration import Configuration
from permafrost.data import CocoDataConfig
from permafrost.heads import HeadConfig, MaskRCNNConfig
from permafrost.launcher import Experiment, LoopConfig
from permafrost.launcher.cli import main
from permafrost.launcher.recipes.find import build_recipe, list_recipes

PACKAGES = ("data", "heads", "launcher", "model")


def configurations() -> dict[str, type]:
    found = {}
    for package in PACKAGES:
        front = import_module(f"permafrost.{package}")
        for name in front.__all__:
            if name.endswith(("Config", "Experiment", "World")) and isinstance(getattr(front, name), type):
                found[f"{package}.{name}"] = getattr(front, name)
    return found


@pytest.mark.parametrize("name", configurations())
def test_every_configuration_refuses_what_is_no_field(name: str) -> None:
    cls = configurations()[name]
    assert issubclass(cls, Configuration)
    made = object.__new__(cls)
    with pytest.raises(AttributeError, match=f"{cls.__name__} has no field num_stepz"):
        made.num_stepz = 1
    assert not vars(made)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("loop.num_step = 5", "LoopConfig has no field num_step: did you mean num_steps"),
        ("data.image_sice = 64", "ShapesDataConfig has no field image_sice: did you mean image_size"),
        ("data.world.num_trian = 64", "ShapesWorld has no field num_trian: did you mean num_train"),
        ("backbone.weight = 'random'", "BackboneConfig has no field weight: did you mean weights"),
        ("heads['detection'].learning_rate = 1", "HeadExperiment has no field learning_rate"),
        ("heads['detection'].optimizer.lr = 1", "OptimizerConfig has no field lr: "),
        ("heads['detection'].model.box.nms = 1", "BoxHeadConfig has no field nms: "),
        ("engine.zero = 2", "EngineConfig has no field zero: did you mean zero_stage"),
        ("seed = 3", "Experiment has no field seed"),
    ],
)
def test_a_recipe_file_with_a_typo(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(
        "from permafrost.configs.quickstart import quickstart\n"
        "from permafrost.launcher import Experiment\n"
        "def mine() -> Experiment:\n"
        "    experiment = quickstart()\n"
        f"    experiment.{line}\n"
        "    return experiment\n"
    )
    assert main(["train", f"{tmp_path / 'mine.py'}:mine", "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert f"{tmp_path / 'mine.py'}, line 5" in error
    assert not (tmp_path / "run").exists()


def test_what_belongs_is_set_replaced_copied_and_pickled() -> None:
    for info in list_recipes():
        experiment = build_recipe(info.function, object)
        for other in (
            pickle.loads(pickle.dumps(experiment)),
            copy.deepcopy(experiment),
            dataclasses.replace(experiment),
        ):
            assert other == experiment
    loop = LoopConfig()
    loop.num_steps = 5
    assert vars(dataclasses.replace(loop, seed=3))["num_steps"] == 5
    assert Experiment.__setattr__ is Configuration.__setattr__


@dataclasses.dataclass
class OwnHead(MaskRCNNConfig):
    """A user's, with a field more."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.temperature = float(self.temperature)


def test_a_users_subclass_has_its_fields_and_refuses_typos() -> None:
    own = OwnHead(temperature=2)
    own.temperature, own.ignore_overlap = 3.0, 0.2
    assert (own.temperature, own.ignore_overlap) == (3.0, 0.2)
    with pytest.raises(AttributeError, match="OwnHead has no field temperatur: did you mean temperature"):
        own.temperatur = 1
    with pytest.raises(AttributeError, match="CocoDataConfig has no field task"):
        CocoDataConfig().task = "other"  # a constant of the class, no field
    assert issubclass(OwnHead, HeadConfig)
