"""Weights and settings of a backbone that cannot be used: the command says so before any training, and exits with 2."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from permafrost.launcher.cli import main
from permafrost.model.swin.v2 import SwinV2
from permafrost.model.swin.weights import draw_weights, save_weights

RECIPE = f"{Path(__file__).with_name('tiny_recipe.py')}:tiny"
WINDOWS = ["--backbone.window-size", "8", "--backbone.pretrained-window-size", "8"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano SwinV2 as a file of ours, which knows its window."""
    network = SwinV2("swinv2_nano", window_size=8)
    network.load_state_dict(dict(draw_weights(network, seed=0)))
    path = tmp_path_factory.mktemp("weights") / "nano.safetensors"
    save_weights(network, path, {})
    return path


@pytest.fixture(scope="module")
def sharded(good: Path) -> Path:
    """The same, as `permafrost convert` writes it."""
    folder = good.with_name("sharded")
    assert main(["convert", str(good), str(folder), "--max-shard-size", "2MB"]) == 0
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def indexed(folder: Path, good: Path) -> Path:
    """A file as Hugging Face splits it: an index, and two shards."""
    tensors = sorted(load_file(good).items())
    half = len(tensors) // 2
    folder.mkdir()
    names = {}
    for number, part in enumerate((tensors[:half], tensors[half:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(dict(part), folder / file)
        names |= dict.fromkeys((key for key, _ in part), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def truncate_shard(folder: Path, good: Path, sharded: Path) -> Path:
    folder.mkdir()
    for file in sharded.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    return folder


def truncate_indexed_shard(folder: Path, good: Path, sharded: Path) -> Path:
    shard = indexed(folder, good) / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    return folder


def lose_file(folder: Path, good: Path, sharded: Path) -> Path:
    (indexed(folder, good) / "model-00002-of-00002.safetensors").unlink()
    return folder


def spoil(folder: Path, good: Path, sharded: Path) -> Path:
    tensors = load_file(good)
    tensors["layers.2.blocks.1.mlp.fc1.weight"][3, 5] = float("nan")
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def keep(folder: Path, good: Path, sharded: Path) -> Path:
    return good


@pytest.mark.parametrize(
    ("make", "fields", "told"),
    [
        (keep, ["--backbone.window-size", "12"], r"window.*8.*12|window.*12.*8"),
        (keep, ["--backbone.pretrained-window-size", "12"], r"pretrained_window_size"),
        (
            keep,
            ["--mesh.tensor", "3"],
            r"mesh\.tensor is 3: .* heads in stages 3 and 4, which a tensor degree of 3 does not divide",
        ),
        (truncate_shard, [], r"\.safetensors has \d+ bytes, but manifest\.json says \d+: it is truncated"),
        (truncate_indexed_shard, [], r"model-00002-of-00002\.safetensors"),
        (lose_file, [], r"model-00002-of-00002\.safetensors"),
        (spoil, WINDOWS, r"layers\.2\.blocks\.1\.mlp\.fc1\.weight"),
        (keep, ["--data.image-size", "3"], r"data\.image_size is 3: give at least 32 pixels"),
        (keep, ["--backbone.dtype", "float8"], r"dtype"),
        (
            keep,
            ["--backbone.compile", "True", "--mesh.tensor", "2"],
            r"backbone\.compile is True and mesh\.tensor is 2",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_clear_error_before_any_training(
    make: Callable[[Path, Path, Path], Path],
    fields: list[str],
    told: str,
    good: Path,
    sharded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights, run = make(tmp_path / "made", good, sharded), tmp_path / "run"
    capsys.readouterr()
    command = ["train", RECIPE, "--output", str(run), "--device", "cpu", "--backbone.weights", str(weights)]
    assert main([*command, *fields]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error

    assert re.search(told, error, re.DOTALL), error
    assert not (run / "metrics.jsonl").exists()


def test_the_files_that_were_damaged_are_good_otherwise(good: Path, sharded: Path, tmp_path: Path) -> None:
    for number, weights in enumerate((good, sharded, indexed(tmp_path / "made", good))):
        fields = ["--backbone.weights", str(weights), "--loop.num-steps", "1", "--data.max-val-images", "1"]
        if number == 2:
            # Such files do not say which window they belong to.
            fields += WINDOWS
        assert main(["train", RECIPE, "--output", str(tmp_path / f"run{number}"), "--device", "cpu", *fields]) == 0
