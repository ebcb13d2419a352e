"""Checkpoints: what is in them, how they are written, and what a damaged or foreign one leads to."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from permafrost.heads.build import build_head
from permafrost.launcher.engines.base import HeadState
from permafrost.launcher.errors import CheckpointError
from permafrost.launcher.experiment import Experiment
from permafrost.launcher.run import checkpoint as module
from permafrost.launcher.run.checkpoint import (
    CheckpointWarning,
    DamagedCheckpoint,
    TrainingState,
    load_head,
    load_newest,
    read_checkpoint,
    save_checkpoint,
)
from permafrost.launcher.run.folder import RunFolder
from permafrost.launcher.train import train
from permafrost.model import build_backbone


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.Conv2d(40, 30, 3))


def make_state(scale: float = 1.0, step: int = 7) -> HeadState:
    model = make_model()
    parameters = {name: p.detach() * scale for name, p in model.named_parameters()}
    buffers = {name: t.clone() for name, t in model.state_dict().items() if name not in parameters}
    moments = [{name: torch.randn_like(p) * scale for name, p in parameters.items()} for _ in range(2)]
    ema = {name: p * 0.5 for name, p in parameters.items()}
    return HeadState(parameters, buffers, moments[0], moments[1].copy(), step, ema)


def training_state(step: int, **fields: object) -> TrainingState:
    defaults = {
        "epoch": 1,
        "seed": 3,
        "global_batch": 4,
        "backbone": {"name": "swinv2_nano", "fingerprint": "abc"},
        "data": "d1",
        "classes": ["a", "b"],
        "loop": {"window": {"loss": [0.1 + 0.2, 3.0]}},
    }
    return TrainingState(step=step, **{**defaults, **fields})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    return folder


def save(
    run: RunFolder, step: int, heads: dict[str, HeadState] | None = None, *, keep: int = 9, **fields: object
) -> Path:
    protect = fields.pop("protect", ())
    return save_checkpoint(
        run, heads or {"head": make_state(step)}, training_state(step, **fields), keep=keep, protect=protect
    )


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def assert_equal_states(found: HeadState, expected: HeadState) -> None:
    for part in ("parameters", "buffers", "exp_avg", "exp_avg_sq", "ema"):
        own, other = getattr(found, part), getattr(expected, part)
        assert own.keys() == other.keys()
        for name in other:
            assert own[name].dtype == other[name].dtype
            assert torch.equal(own[name], other[name]), name
    assert found.step == expected.step


def test_what_is_saved_is_what_is_read(run: RunFolder) -> None:
    heads = {"one": make_state(1.0, 7), "two": make_state(2.0, 5)}
    folder = save(run, 12, heads)
    checkpoint, problems = load_newest(run)
    assert problems == []
    assert checkpoint.path == folder == run.checkpoints / "step_00000012"
    assert checkpoint.state == training_state(12)
    for name, state in heads.items():
        assert_equal_states(checkpoint.heads[name], state)
    assert run.latest.read_text() == "step_00000012\n"
    assert names(run) == ["step_00000012"]
    assert load_newest(RunFolder(run.path / "nothing")) == (None, [])


def test_only_the_head_is_in_it_and_little_else(tiny: Callable[..., Experiment]) -> None:
    experiment = tiny(num_steps=2)
    train(experiment)
    folder = Path(experiment.output) / "checkpoints/step_00000002"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "detection/head.safetensors",
        "detection/optimizer.safetensors",
        "state.json",
    ]
    head = build_head(
        experiment.heads["detection"].model, spec=build_backbone(experiment.backbone).spec, classes=["x"] * 8
    )
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    weights = safetensors.torch.load_file(folder / "detection/head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in head.state_dict().values())
    assert num_bytes <= (folder / "detection/head.safetensors").stat().st_size <= 1.1 * num_bytes
    assert (folder / "detection/optimizer.safetensors").stat().st_size <= 1.1 * 2 * num_bytes
    assert (folder / "state.json").stat().st_size < 10_000


def test_files_can_be_read_by_whom_the_umask_lets(run: RunFolder) -> None:
    previous = os.umask(0o027)
    try:
        folder = save(run, 1)
    finally:
        os.umask(previous)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o640}


FILES = ("state.json", "head/head.safetensors", "head/optimizer.safetensors", "head/ema.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("file", FILES)
def test_a_truncated_newest_one_is_passed_over(run: RunFolder, file: str, share: float) -> None:
    save(run, 1)
    path = save(run, 2) / file
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    checkpoint, problems = load_newest(run)
    assert checkpoint.state.step == 1
    assert_equal_states(checkpoint.heads["head"], read_checkpoint(run.checkpoint_folder(1)).heads["head"])
    (problem,) = problems
    assert str(path) in problem


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_noticed(run: RunFolder, file: str) -> None:
    save(run, 1)
    path = save(run, 2) / file
    data = path.read_bytes()
    unnoticed = []
    step = max(1, len(data) // 97)
    for position in range(0, len(data), step):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        if load_newest(run)[0].state.step == 2:
            unnoticed.append(position)
    if file == "state.json":
        # Blanks between the values carry nothing: one may become another.
        unnoticed = [position for position in unnoticed if data[position : position + 1].strip()]
    assert not unnoticed
    path.write_bytes(data)
    assert load_newest(run)[0].state.step == 2


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_noticed(run: RunFolder, file: str) -> None:
    save(run, 1)
    path = save(run, 2) / file
    path.unlink()
    checkpoint, (problem,) = load_newest(run)
    assert checkpoint.state.step == 1
    assert f"{path} is missing" in problem


def test_none_valid_is_an_error_that_names_all(run: RunFolder) -> None:
    paths = [save(run, step) / "head/head.safetensors" for step in (1, 2)]
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoint") as caught:
        load_newest(run)
    assert all(str(path) in str(caught.value) for path in paths)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_head(run.path, "head")


@pytest.mark.parametrize("content", ["", "../../elsewhere", "\x00\xff", "step_00000099"])
def test_a_spoilt_latest_file_changes_nothing(run: RunFolder, content: str) -> None:
    save(run, 4)
    run.latest.write_text(content)
    assert load_newest(run)[0].state.step == 4
    assert load_head(run.path, "head", "latest").state.step == 4


def test_paths_in_a_forged_state_lead_nowhere(run: RunFolder) -> None:
    folder = save(run, 4)
    shutil.copytree(folder / "head", run.checkpoints / "outside")
    content = json.loads((folder / "state.json").read_text())
    del content["sha256"]
    content["files"] = {name.replace("head/", "../outside/", 1): entry for name, entry in content["files"].items()}
    content["heads"] = {"..": content["heads"]["head"]}
    content["sha256"] = module._digest(content)
    (folder / "state.json").write_text(json.dumps(content))
    with pytest.raises(DamagedCheckpoint, match=r"state\.json"):
        read_checkpoint(folder)


def test_another_format_is_not_taken_for_damage(run: RunFolder) -> None:
    folder = save(run, 4)
    content = json.loads((folder / "state.json").read_text())
    del content["sha256"]
    content["format"] = 99
    (folder / "state.json").write_text(json.dumps({**content, "sha256": module._digest(content)}))
    with pytest.raises(CheckpointError, match="format 99") as caught:
        load_newest(run)
    assert not isinstance(caught.value, DamagedCheckpoint)


@pytest.mark.parametrize("when", ["write", "rename", "sync"])
def test_a_kill_while_saving_leaves_the_one_before(run: RunFolder, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    save(run, 1)

    def die(*arguments: object, **fields: object) -> None:
        os._exit(9)

    target = {
        "write": (safetensors.torch, "save_file"),
        "rename": (Path, "replace"),
        "sync": (module, "write_atomically"),
    }
    child = os.fork()
    if not child:
        # A process of its own: what a killed one would tidy up stays.
        monkeypatch.setattr(*target[when], die)
        save(run, 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    checkpoint, problems = load_newest(run)
    assert (checkpoint.state.step, problems) == (1, [])
    assert run.latest.read_text() == "step_00000001\n"
    leftover, kept = names(run)
    assert re.fullmatch(r"\.step_00000002\.[0-9a-f]{12}\.partial", leftover)
    assert kept == "step_00000001"
    # Of others nothing is followed or removed.
    (run.checkpoints / ".step_00000007.0123456789ab.partial").symlink_to(run.path / "elsewhere")
    (run.path / "elsewhere").mkdir()
    (run.path / "elsewhere" / "file").touch()
    (run.checkpoints / ".step_00000002.partial").mkdir()
    save(run, 2)
    assert (run.path / "elsewhere" / "file").exists()
    (run.checkpoints / ".step_00000007.0123456789ab.partial").unlink()
    (run.checkpoints / ".step_00000002.partial").rmdir()
    assert names(run) == ["step_00000001", "step_00000002"]
    assert load_newest(run)[0].state.step == 2


def test_a_full_disk_leaves_the_one_before_and_no_litter(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1)

    def fail(*arguments: object, **fields: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save(run, 2)
    assert names(run) == ["step_00000001"]
    assert run.latest.read_text() == "step_00000001\n"


def test_a_damaged_one_is_replaced_when_its_step_comes_again(run: RunFolder) -> None:
    save(run, 1)
    path = save(run, 2) / "head/head.safetensors"
    path.write_bytes(b"broken")
    save(run, 2)
    checkpoint, problems = load_newest(run)
    assert (checkpoint.state.step, problems, names(run)) == (2, [], ["step_00000001", "step_00000002"])


def test_the_newest_few_and_the_best_are_kept(run: RunFolder) -> None:
    for step in range(1, 7):
        save(run, step, keep=2, protect=[2] if step >= 2 else [])
    assert names(run) == ["step_00000002", "step_00000005", "step_00000006"]
    assert load_newest(run)[0].state.step == 6


def test_what_is_damaged_takes_no_place_of_what_is_kept(run: RunFolder) -> None:
    for step in (1, 6):
        path = save(run, step, keep=1, protect=[1])
    (path / "head/head.safetensors").write_bytes(b"")
    # The run resumed at step 1 and now saves steps before the damaged one.
    for step in (2, 4):
        save(run, step, keep=1)
        assert load_newest(run)[0].state.step == step
    assert names(run) == ["step_00000004", "step_00000006"]
    save(run, 6, keep=1)
    assert names(run) == ["step_00000006"]
    assert load_newest(run)[1] == []


def test_the_last_state_of_a_stopped_head_is_kept(run: RunFolder) -> None:
    both = {"a": make_state(1.0), "b": make_state(2.0)}
    save(run, 1, both, keep=1)
    save(run, 2, both, keep=1)
    for step in (3, 4):
        save(run, step, {"a": make_state()}, keep=1, stopped={"b": 3})
    assert names(run) == ["step_00000002", "step_00000004"]
    found = load_head(run.path, "b", "latest")
    assert found.state.step == 2
    assert_equal_states(found.heads["b"], both["b"])
    assert load_head(run.path, "a", "latest").state.step == 4


def test_what_is_not_finite_is_not_saved(run: RunFolder) -> None:
    save(run, 1)
    for part in ("parameters", "exp_avg", "exp_avg_sq", "ema"):
        state = make_state()
        getattr(state, part)["0.weight"][3, 1, 0, 0] = float("nan")
        with pytest.raises(CheckpointError, match="'head' is not finite at step 2"):
            save(run, 2, {"head": state})
    assert names(run) == ["step_00000001"]


def test_loading_one_head(run: RunFolder) -> None:
    both = {"a": make_state(1.0), "b": make_state(2.0)}
    for step in (1, 2, 3):
        save(run, step, both)
    assert load_head(run.path, "a").state.step == 3  # nothing was evaluated yet
    run.best.write_text(json.dumps({"a": {"step": 2, "metric": "bbox/AP", "value": 0.5}}))
    best = load_head(run.path, "a")
    assert best.state.step == 2
    assert list(best.heads) == ["a"]
    assert load_head(run.path, "a", "latest").state.step == 3
    assert load_head(run.path / "checkpoints/step_00000001", "b").state.step == 1
    with pytest.raises(CheckpointError, match="holds the heads a, b"):
        load_head(run.path)
    with pytest.raises(CheckpointError, match="no head 'c': it holds a, b"):
        load_head(run.path, "c")
    with pytest.raises(CheckpointError, match="best or latest"):
        load_head(run.path, "a", "newest")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_head(run.path / "elsewhere", "a")
    (run.checkpoints / "step_00000002/a/head.safetensors").write_bytes(b"")
    with pytest.warns(CheckpointWarning, match=r"step_00000002/a/head.safetensors"):
        assert load_head(run.path, "a").state.step == 3
    assert load_head(run.path, "b").state.step == 3  # its own files are sound


@pytest.mark.parametrize("content", ["[]", "{", '{"head": 3}', '{"head": {"step": "x"}}'])
def test_a_spoilt_best_file_means_the_newest(run: RunFolder, content: str) -> None:
    save(run, 1)
    save(run, 2)
    run.best.write_text(content)
    assert load_head(run.path, "head").state.step == 2


def test_a_foreign_backbone_or_head_is_refused_by_name(run: RunFolder) -> None:
    save(run, 1)
    checkpoint, _ = load_newest(run)
    checkpoint.require_backbone(name="swinv2_nano", fingerprint="abc")
    with pytest.raises(CheckpointError, match=r"swinv2_nano with fingerprint abc.*swinv2_tiny with fingerprint def"):
        checkpoint.require_backbone(name="swinv2_tiny", fingerprint="def")
    checkpoint.require_data("d1")
    with pytest.raises(CheckpointError, match=r"other training annotations or images \(fingerprint d1, now d2\)"):
        checkpoint.require_data("d2")
    checkpoint.require_fit({"head": make_model()})
    with pytest.raises(CheckpointError, match="'head', but the recipe has only other"):
        checkpoint.require_fit({"other": make_model()})
    wider = make_model()
    wider[2] = nn.Conv2d(40, 31, 3)
    with pytest.raises(CheckpointError, match=r"2\.weight has shape \(30, 40, 3, 3\), the head's is \(31, 40, 3, 3\)"):
        checkpoint.require_fit({"head": wider})
    with pytest.raises(CheckpointError, match=r"3\.weight is missing"):
        checkpoint.require_fit({"head": nn.Sequential(*make_model(), nn.Conv2d(30, 2, 1))})
    without_buffers = dataclasses.replace(checkpoint.heads["head"], buffers={})
    checkpoint.heads["head"] = without_buffers
    with pytest.raises(CheckpointError, match="buffers"):
        checkpoint.require_fit({"head": make_model()})
