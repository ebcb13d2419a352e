"""From configurations to data sets, checks and readers: by the exact type, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from permafrost.data.build import (
    KINDS,
    check_data,
    input_reader,
    located,
    submission_set,
    target_type,
    train_set,
    val_set,
)
from permafrost.data.detection.config import CocoDataConfig
from permafrost.data.errors import DataError
from permafrost.data.findings import Finding
from permafrost.data.task import SampleExtent, TaskDataConfig
from permafrost.data.video.config import KineticsDataConfig
from permafrost.data.worlds.config import ShapesDataConfig

BUILDERS: dict[str, Callable[[Any], object]] = {
    "build_train": train_set,
    "build_val": val_set,
    "build_test": lambda config: submission_set(config, Path("here")),
    "check": check_data,
    "target_type": target_type,
    "inputs": lambda config: input_reader(config, ["a"], [1]),
}


@pytest.mark.parametrize("method", BUILDERS)
def test_a_subclass_is_not_built_as_its_parent(method: str, hand_made) -> None:
    @dataclass
    class MyCocoConfig(CocoDataConfig):
        """A kind of COCO that nothing builds."""

    config = MyCocoConfig(root=str(hand_made.root), image_size=64)
    with pytest.raises(DataError, match=f"MyCocoConfig.*method {method}"):
        BUILDERS[method](config)


def test_a_subclass_of_a_world_says_where_its_files_are() -> None:
    @dataclass
    class MyShapesConfig(ShapesDataConfig):
        """A world that nothing renders."""

    with pytest.raises(DataError, match="MyShapesConfig has no method located"):
        located(MyShapesConfig())


def test_a_shipped_configuration_has_no_builder_of_its_own() -> None:
    with pytest.raises(DataError, match=r"CocoDataConfig has no method build_train: permafrost\.data\.build"):
        CocoDataConfig().build_train()


@dataclass
class OwnDataConfig(TaskDataConfig):
    """Somebody else's."""

    task: ClassVar[str] = "own"

    def extent(self) -> SampleExtent:
        return SampleExtent(8)

    def build_train(self) -> Any:
        return "training"

    def build_val(self) -> Any:
        return "validation"

    def build_test(self, submission: Path) -> Any:
        return f"test for {submission}"

    def check(self, *, decode: bool = True, on_progress: Any = None) -> list[Finding]:
        return [Finding("own", f"decode is {decode}")]

    def inputs(self, classes: Any, category_ids: Any) -> Any:
        return (classes, category_ids)


def test_a_configuration_from_outside_brings_its_own_builders() -> None:
    config = OwnDataConfig()
    assert (train_set(config), val_set(config)) == ("training", "validation")
    assert submission_set(config, Path("there")) == "test for there"
    assert check_data(config, decode=False) == [Finding("own", "decode is False")]
    assert input_reader(config, ["a"], [1]) == (["a"], [1])
    assert located(config) is config
    assert (config.describe(), config.required_paths()) == ("own", [])
    assert config.seen_with() is config
    with pytest.raises(
        DataError, match=r"evaluation cannot change flip, sizes: .* a OwnDataConfig, for own, which has no such"
    ):
        config.seen_with(sizes=(32,), flip=True)


def test_data_without_a_test_set_has_no_submission() -> None:
    with pytest.raises(DataError, match="no submission of a KineticsDataConfig, for video"):
        submission_set(KineticsDataConfig(), Path("here"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_missing_files_are_found_by_the_check(kind: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERMAFROST_CACHE", str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("")
    config = kind() if kind().fills_cache else kind(root=str(tmp_path / "nothing"))
    findings = check_data(config)
    assert findings
    assert all(finding.fatal for finding in findings)


def test_kinds_describe_themselves() -> None:
    assert [kind(root="x").describe() for kind in KINDS] == [
        "coco (x)",
        "shapes (x)",
        "ade20k (x)",
        "scenery (x)",
        "kinetics (x)",
        "motion (x)",
    ]
    assert ShapesDataConfig().describe() == "shapes"
    assert ShapesDataConfig().seen_with(sizes=(64, 96), flip=True).evaluation.sizes == (64, 96)
