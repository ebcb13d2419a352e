"""Row 28: a device that is too small. There is none to fill here, so the error is put where CUDA would raise it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import permafrost.launcher.train as loop
from permafrost.launcher.cli import main

RECIPE = f"{Path(__file__).with_name('recipe.py')}:tiny"
CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 11.90 GiB of which 1.10 GiB is free. "
    "If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True"
)


def test_a_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr(loop, "head_losses", fail)
    command = ["train", RECIPE, "--device", "cpu", "--output", str(tmp_path / "run")]
    assert main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "rank 0, on cpu: CUDA out of memory. Tried to allocate 2.00 GiB" in line
    estimate = re.search(r"estimated to need (\d+\.\d+) GiB on each rank, most in the \w+", line)
    options = re.findall(r"(--engine\.[\w-]+) \w+ \((\d+\.\d+) GiB\)", line)
    assert estimate
    assert len(options) >= 2
    assert all(float(need) <= float(estimate[1]) for _, need in options)
    assert "expandable_segments" not in line
    # The mended command may go on in the same folder.
    monkeypatch.undo()
    assert main([*command, "--engine.accumulation", "2", "--loop.num-steps", "1"]) == 0


def test_a_head_that_cannot_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The advice is general then; what has happened is said all the same."""

    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr(loop, "head_losses", fail)
    monkeypatch.setattr("permafrost.launcher.plan.planner.Planner.row", fail)
    assert main(["train", RECIPE, "--device", "cpu", "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "Tried to allocate 2.00 GiB" in error
    assert error.count("--engine.") >= 2
