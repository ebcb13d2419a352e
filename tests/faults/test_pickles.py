"""Row 26: nothing in a file that is read as data is ever executed."""

from __future__ import annotations

import io
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from permafrost.launcher.cli import main

RECIPE = f"{Path(__file__).with_name('recipe.py')}:tiny"
COMMAND = ("train", RECIPE, "--device", "cpu", "--loop.num-steps", "4", "--output")


class Payload:
    """Leaves a canary behind where its pickle is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def as_pickle(payload: Payload) -> bytes:
    return pickle.dumps({"model": payload, "state_dict": payload})


def as_torch_file(payload: Payload) -> bytes:
    stream = io.BytesIO()
    torch.save({"model": {"weight": torch.zeros(2)}, "rng_state": payload}, stream)
    return stream.getvalue()


FORMS = {"pickle": as_pickle, "torch file": as_torch_file}


def test_the_payload_is_live(canary: Path) -> None:
    for make in FORMS.values():
        data = make(Payload(canary))
        if zipfile.is_zipfile(io.BytesIO(data)):
            torch.load(io.BytesIO(data), weights_only=False)
        else:
            pickle.loads(data)
        assert canary.exists()
        canary.unlink()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("ended") / "run"
    assert main([*COMMAND, str(run)]) == 0
    return run


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint(ended: Path, tmp_path: Path, canary: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In place of any of its files, or beside them under the names that other systems unpickle."""
    data = FORMS[form](Payload(canary))
    for file in ("state.json", "detection/head.safetensors", "detection/optimizer.safetensors"):
        run = tmp_path / file.replace("/", "_")
        shutil.copytree(ended, run)
        (run / "final.json").unlink()
        newest = run / "checkpoints/step_00000004"
        (newest / file).write_bytes(data)
        for name in ("rng.pt", "rng_state_0.pth", ".metadata", "__0_0.distcp", "mp_rank_00_model_states.pt"):
            (newest / name).write_bytes(data)
        assert main([*COMMAND, str(run)]) == 0
        assert f"{newest / file}" in capsys.readouterr().err
        assert not canary.exists()
    for file in ("latest", "best", "recipe.json", "evaluations.jsonl", "metrics.jsonl"):
        run = tmp_path / f"run_{file}"
        shutil.copytree(ended, run)
        (run / "final.json").unlink()
        (run / file).write_bytes(data)
        assert main([*COMMAND, str(run)]) == (2 if file == "recipe.json" else 0), file
        assert not canary.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("field", ["--backbone.weights", "--init-head"])
def test_weights(tmp_path: Path, canary: Path, form: str, field: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.pth").write_bytes(FORMS[form](Payload(canary)))
    assert main([*COMMAND, str(tmp_path / "run"), field, str(tmp_path / "file.pth")]) == 2
    assert "file.pth" in capsys.readouterr().err
    assert not canary.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", ["checkpoint.pth", "folder/.metadata", "folder/mp_rank_00_model_states.pt", "folder/pytorch_model.bin"]
)
def test_files_to_convert(
    tmp_path: Path, canary: Path, form: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of PyTorch, folders of its distributed checkpoints, of DeepSpeed's and of Hugging Face's."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(FORMS[form](Payload(canary)))
    given = path if path.parent == tmp_path else path.parent
    assert main(["convert", str(given), str(tmp_path / "out")]) == 2
    assert "error: " in capsys.readouterr().err
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", FORMS)
def test_class_names(tmp_path: Path, canary: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The list of classes comes from the annotation file."""
    annotations = tmp_path / "world/annotations"
    annotations.mkdir(parents=True)
    for split in ("train", "val"):
        (annotations / f"instances_{split}2017.json").write_bytes(FORMS[form](Payload(canary)))
        (tmp_path / f"world/{split}2017").mkdir()
    command = [*COMMAND, str(tmp_path / "run"), "--data.root", str(tmp_path / "world")]
    command[1] = command[1].replace(":tiny", ":on_disk")
    assert main(command) == 2
    assert "instances_train2017.json" in capsys.readouterr().err
    assert not canary.exists()
