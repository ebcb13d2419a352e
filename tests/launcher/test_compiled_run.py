"""A recipe with backbone.compile, from the command line: it trains to the same loss, and says what it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from permafrost.launcher.cli import main

RECIPE = f"{Path(__file__).with_name('tiny_recipe.py')}:tiny"


@pytest.mark.slow
def test_a_compiled_run_trains_as_one_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = ["--backbone.name", "timm/convnextv2_atto", "--loop.num-steps", "1"]
    # One size of images in all.
    fields += ["--loop.evaluation-batch", "2", "--data.max-val-images", "2"]
    losses, told = {}, {}
    for flag in ("False", "True"):
        run = tmp_path / flag
        command = ["train", RECIPE, *fields, "--backbone.compile", flag, "--device", "cpu", "--output", str(run)]
        assert main(command) == 0
        told[flag] = capsys.readouterr()
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[flag] = next(value for line in lines for key, value in line.items() if key == "detection/loss")
    assert losses["True"] == pytest.approx(losses["False"], rel=1e-4)
    assert "compile: torch.compile, for each size of images" in "".join(told["True"])
    assert "torch.compile" not in "".join(told["False"])
    # Written to the run's recipe, so it is evaluated as it was trained.
    assert main(["evaluate", str(tmp_path / "True"), "--device", "cpu"]) == 0
