"""The run folder: what it records, when a command may go on in it, and the recipe's way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from permafrost.configs.coco import swinv2_base_fpn
from permafrost.heads.detection.config import MaskRCNNConfig
from permafrost.launcher.errors import RecipeError, RunFolderError
from permafrost.launcher.experiment import EngineConfig, Experiment
from permafrost.launcher.files import read_json_lines, write_atomically
from permafrost.launcher.provenance import versions
from permafrost.launcher.recipes.serialise import differing_fields, experiment_from_json, to_json
from permafrost.launcher.run.folder import RunFolder


@dataclass
class OwnHeadConfig(MaskRCNNConfig):
    """A head of a user's own recipe."""

    depth: int = 2
    names: tuple[tuple[str, float], ...] = ()
    table: dict[str, int | None] = dataclasses.field(default_factory=dict)


def through_text(experiment: Experiment) -> Experiment:
    return experiment_from_json(json.loads(json.dumps(to_json(experiment))))


def test_every_value_and_class_comes_back(tiny: Callable[..., Experiment], make_head: Callable[..., Any]) -> None:
    own = OwnHeadConfig(depth=3, names=(("a", 1.5), ("b", 0.1)), table={"x": 1, "y": None})
    for experiment in (swinv2_base_fpn(), tiny(), tiny(heads={"one": make_head(), "two": make_head(own)})):
        back = through_text(experiment)
        assert back == experiment
        assert repr(back) == repr(experiment)  # tuples are tuples again, subclasses are themselves
        assert [type(head.model) for head in back.heads.values()] == [type(h.model) for h in experiment.heads.values()]
        assert type(back.data) is type(experiment.data)


def test_a_field_that_the_file_does_not_have_gets_its_default() -> None:
    data = to_json(swinv2_base_fpn())
    del data["loop"]["worker_timeout"], data["engine"]
    assert experiment_from_json(data) == swinv2_base_fpn()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["loop"].update(num_steps="many"), r"experiment\.loop\.num_steps is 'many': expected an integer"),
        (lambda d: d["loop"].update(num_steps=True), r"num_steps is True: expected an integer"),
        (lambda d: d["loop"].update(speed=3), r"experiment\.loop: LoopConfig has no field speed"),
        (lambda d: d["engine"].update(kind="magic"), r"engine\.kind is 'magic': expected one of 'auto'"),
        (lambda d: d["data"]["jitter"].update(scale_range=[1.0]), r"scale_range is \[1\.0\]: expected a list of 2"),
        (lambda d: d["backbone"].pop("weights"), r"experiment\.backbone: .*weights"),
        (lambda d: d.update(heads=[1]), r"experiment\.heads is \[1\]: expected an object"),
        (
            lambda d: d["data"].update({"class": "permafrost.data.detection.config:Nothing"}),
            "which permafrost does not have",
        ),
        (
            lambda d: d["data"].update({"class": "permafrost.data.detection.config:JitterConfig"}),
            "expected a TaskDataConfig",
        ),
        (lambda d: d["data"].update({"class": "permafrost.data.nowhere:X"}), "which permafrost does not have"),
        (lambda d: d["data"].update({"class": "os:system"}), "expected a TaskDataConfig"),
        (lambda d: d["data"].update({"class": "wave:Error"}), "wave:Error, which is not part of permafrost"),
        (lambda d: d["data"].pop("class"), "expected a TaskDataConfig with its class"),
    ],
)
def test_what_does_not_belong_is_named(change: Callable[[dict], object], message: str) -> None:
    data = to_json(swinv2_base_fpn())
    sys.modules.pop("wave", None)
    change(data)
    with pytest.raises(RunFolderError, match=message):
        experiment_from_json(data)
    assert "wave" not in sys.modules


def test_contradicting_values_are_refused_as_in_a_recipe() -> None:
    data = to_json(swinv2_base_fpn())
    data["loop"]["num_steps"] = 0
    with pytest.raises(RecipeError, match=r"loop\.num_steps is 0"):
        experiment_from_json(data)


def test_differing_fields_are_dotted_leaves() -> None:
    found = {"a": 1, "b": {"c": [1, 2], "d": {}}, "gone": 0}
    expected = {"a": 1, "b": {"c": [1, 3], "d": {"e": None}}}
    assert differing_fields(found, expected) == [
        ("b.c", [1, 2], [1, 3]),
        ("b.d", {}, "not there"),
        ("gone", 0, "not there"),
        ("b.d.e", "not there", None),
    ]
    assert differing_fields(found, found) == []


@pytest.fixture
def started(tiny: Callable[..., Experiment]) -> tuple[Experiment, RunFolder]:
    """An experiment whose folder holds a run."""
    experiment = tiny()
    run = RunFolder.of(experiment)
    assert run.prepare(experiment) == "new"
    run.close()
    return experiment, run


def add_checkpoint(run: RunFolder, step: int = 4) -> None:
    run.checkpoint_folder(step).mkdir(parents=True)


def snapshot(run: RunFolder) -> dict[str, bytes | None]:
    """Every path below the folder, with its content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(run.path.rglob("*"))}


def test_the_default_place_is_named_after_the_recipe(tiny: Callable[..., Experiment]) -> None:
    assert RunFolder.of(tiny(None)).path == Path("runs/tiny")


def test_a_new_folder_gets_the_recipe(started: tuple[Experiment, RunFolder]) -> None:
    experiment, run = started
    assert run.experiment() == experiment
    assert run.prepare(experiment) == "resume"


def test_auto_goes_on_only_with_the_same_recipe(
    started: tuple[Experiment, RunFolder], make_head: Callable[..., Any]
) -> None:
    experiment, run = started
    add_checkpoint(run)
    before = snapshot(run)
    other = dataclasses.replace(
        experiment,
        heads={"detection": make_head(learning_rate=0.5), "second": make_head()},
        loop=dataclasses.replace(experiment.loop, num_steps=99, seed=8),
    )
    with pytest.raises(RunFolderError) as caught:
        run.prepare(other)
    text = str(caught.value)
    assert str(run.path) in text
    assert "1 checkpoint(s), the newest step_00000004" in text
    assert "loop.num_steps: the run has 8, now 99" in text
    assert "loop.seed: the run has 0, now 8" in text
    assert "heads.detection.optimizer.learning_rate: the run has 0.002, now 0.5" in text
    assert "heads.second.metric: the run has not there" in text
    assert "heads.detection.schedule" not in text
    assert snapshot(run) == before


@pytest.mark.parametrize(
    "loop",
    [
        {"log_every": 7},
        {"image_every": 7},
        {"checkpoint_every": 7},
        {"keep_checkpoints": 7},
        {"num_workers": 7},
        {"worker_timeout": 7.0},
        {"process_group_timeout": 7.0},
        {"evaluation_batch": 7},
    ],
)
def test_fields_that_change_no_result_may_differ(started: tuple[Experiment, RunFolder], loop: dict[str, Any]) -> None:
    experiment, run = started
    changed = dataclasses.replace(experiment, loop=dataclasses.replace(experiment.loop, **loop))
    assert run.prepare(changed) == "resume"
    assert run.experiment() == experiment


def test_a_run_may_move_to_another_folder_and_engine_but_not_precision(
    started: tuple[Experiment, RunFolder], tmp_path: Path
) -> None:
    experiment, run = started
    run.path.rename(tmp_path / "moved")
    moved = RunFolder(tmp_path / "moved")
    engine = EngineConfig(kind="deepspeed", zero_stage=3, accumulation=2)
    assert moved.prepare(dataclasses.replace(experiment, output=str(moved.path), engine=engine)) == "resume"
    with pytest.raises(RunFolderError, match=r"engine\.precision: the run has \"auto\", now \"bfloat16\""):
        moved.prepare(dataclasses.replace(experiment, engine=EngineConfig(precision="bfloat16")))


def test_must_refuses_a_folder_without_a_checkpoint(tiny: Callable[..., Experiment]) -> None:
    experiment = tiny()
    run = RunFolder.of(experiment)
    with pytest.raises(RunFolderError, match=r"--resume is must but .*run holds no run"):
        run.prepare(experiment, "must")
    assert not run.path.exists()
    run.prepare(experiment)
    with pytest.raises(RunFolderError, match="a run without any checkpoint"):
        run.prepare(experiment, "must")
    add_checkpoint(run)
    assert run.prepare(experiment, "must") == "resume"


def test_never_refuses_a_folder_that_holds_a_run(
    started: tuple[Experiment, RunFolder], tiny: Callable[..., Experiment]
) -> None:
    experiment, run = started
    before = snapshot(run)
    with pytest.raises(RunFolderError, match=r"already holds a run \(no checkpoint yet\) and --resume is never"):
        run.prepare(experiment, "never")
    assert snapshot(run) == before
    assert RunFolder.of(tiny("fresh")).prepare(tiny("fresh"), "never") == "new"


def test_an_unknown_choice_is_refused(started: tuple[Experiment, RunFolder]) -> None:
    experiment, run = started
    with pytest.raises(RunFolderError, match="--resume is 'yes': give auto, must, never"):
        run.prepare(experiment, "yes")


def test_checkpoints_without_a_recipe_are_not_touched(tiny: Callable[..., Experiment]) -> None:
    experiment = tiny()
    run = RunFolder.of(experiment)
    add_checkpoint(run)
    with pytest.raises(RunFolderError, match=r"checkpoints but no recipe\.json"):
        run.prepare(experiment)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}', '{"format": 1, "experiment": {"class": "x:y"}}'])
def test_an_unreadable_recipe_is_named(started: tuple[Experiment, RunFolder], content: str) -> None:
    experiment, run = started
    run.recipe.write_text(content)
    for action in (run.experiment, lambda: run.prepare(experiment)):
        with pytest.raises(RunFolderError, match=r"run/recipe\.json"):
            action()


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"nowhere holds no run \(no such folder\)"):
        RunFolder(tmp_path / "nowhere").experiment()
    with pytest.raises(RunFolderError, match=r"holds no run \(it has no recipe\.json\)"):
        RunFolder(tmp_path).experiment()


@pytest.mark.parametrize("output", ["file", "file/run"])
def test_where_nothing_can_be_written_nothing_starts(
    tiny: Callable[..., Experiment], tmp_path: Path, output: str
) -> None:
    # Permissions would not stop a test that runs as root; a regular file in the way stops everyone.
    (tmp_path / "file").write_text("mine")
    experiment = tiny(output)
    with pytest.raises(RunFolderError, match=rf"cannot write to the run folder .*{output}: .*; give another --output"):
        RunFolder.of(experiment).prepare(experiment)
    assert (tmp_path / "file").read_text() == "mine"


def test_one_process_at_a_time(started: tuple[Experiment, RunFolder]) -> None:
    experiment, run = started
    script = (
        "import fcntl, sys; lock = open(sys.argv[1], 'a'); fcntl.lockf(lock, fcntl.LOCK_EX); "
        "print('held', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(run.path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match="another process is training in"):
            run.prepare(experiment)
    finally:
        holder.communicate("\n")
    assert run.prepare(experiment) == "resume"


def test_only_complete_checkpoints_are_listed_newest_first(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.checkpoint_folders == []
    for name in ("step_00000002", "step_00000010", "step_100000000", ".writing_step_00000011", "step_x", "step_"):
        (run.checkpoints / name).mkdir(parents=True)
    (run.checkpoints / "step_00000099").write_text("a file")
    assert [path.name for path in run.checkpoint_folders] == ["step_100000000", "step_00000010", "step_00000002"]


def test_evaluations_are_rewound_with_the_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (4, 8, 12):
        run.record_evaluation(
            step, {"a": {"bbox/AP": step / 100}}, {"a": {"step": step, "metric": "bbox/AP", "value": 0.1}}
        )
    with run.evaluations.open("a") as file:
        file.write('{"step": 16, "metr')  # cut off by a kill
    run.write_final({"step": 12})
    assert run.read_best()["a"]["step"] == 12
    assert [run.has_evaluation(step) for step in (4, 5, 12, 16)] == [True, False, True, False]
    run.rewind(8)
    assert [entry["step"] for entry in run.read_evaluations()] == [4, 8]
    assert run.read_final() is None


def test_a_start_records_its_surroundings(started: tuple[Experiment, RunFolder]) -> None:
    _, run = started
    for world_size in (1, 2):
        run.record_start({"world_size": world_size})
    first, second = read_json_lines(run.provenance)
    assert [first["world_size"], second["world_size"]] == [1, 2]
    assert first["versions"] == versions()
    assert first["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"time", "command", "folder", "host", "system", "git_commit"} <= first.keys()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "new" * 1000)
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "new"


def test_the_folder_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, permafrost.launcher.run.folder; assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
