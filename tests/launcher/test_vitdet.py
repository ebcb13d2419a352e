"""The recipe vitdet:debug from training to prediction: a timm backbone and a simple pyramid through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from permafrost.launcher.cli import main


def test_vitdet_debug_trains_and_predicts_and_knows_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    train = ["train", "vitdet:debug", "--output", "run", "--loop.num-steps", "2", "--loop.checkpoint-every", "1"]
    small = ["--backbone.taps", "3", "--data.max-val-images", "2", "--loop.image-every", "0"]
    assert main([*train, *small]) == 0
    out = capsys.readouterr().out
    assert "taps: [3]" in out
    assert "images_padded_to_multiples_of: 14" in out
    recipe = json.loads(Path("run/recipe.json").read_text())
    assert json.dumps(recipe).count("heads.SimplePyramidConfig") == 1
    assert main([*train, *small]) == 0
    assert "run has ended after 2 steps" in capsys.readouterr().out
    picture = next(Path(recipe_root(out)).glob("val2017/*.jpg"))
    assert main(["predict", "run", str(picture), "--output", "found"]) == 0
    assert any(Path("found").iterdir())
    # Another layer is another backbone: the run is not continued with it.
    assert main([*train, *small, "--backbone.taps", "5"]) == 2
    assert "taps" in capsys.readouterr().err


def recipe_root(out: str) -> str:
    """The folder of the world, from the line that says it was written."""
    line = next(line for line in out.splitlines() if "shapes world" in line)
    return line.partition(" images to ")[2].partition(" in ")[0]
