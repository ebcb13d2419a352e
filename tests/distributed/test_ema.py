"""The running average under every engine is that of one process, and moves from one to another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

pytestmark = pytest.mark.slow  # five layouts on two ranks

ENGINES = {"ddp": {}} | {f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)}
FIELDS = {"heads": ["probe"], "ema": 0.9, "checkpoint_every": 2}


def tensors(run: Path, file: str, step: int = 6) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / f"checkpoints/step_{step:08d}/probe/{file}.safetensors")


@pytest.fixture(scope="module")
def folder(run_ranks: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ema")
    run_ranks("train_worker.py", 1, {"runs": [{"output": str(folder / "alone"), **FIELDS}]})
    runs = [{"output": str(folder / name), "engine": engine, **FIELDS} for name, engine in ENGINES.items()]
    # Killed in step 5 under ZeRO 3, then resumed under ZeRO 1.
    runs.append({"output": str(folder / "moved"), "engine": ENGINES["zero3"], "kill_after": 5, **FIELDS})
    runs.append({"output": str(folder / "moved"), "engine": ENGINES["zero1"], **FIELDS})
    outcomes = run_ranks("train_worker.py", 2, {"runs": runs})["outcomes"]
    assert outcomes[4] == [{"killed": True}] * 2
    assert all("metrics" in own for ranks in (*outcomes[:4], outcomes[5]) for own in ranks), outcomes
    starts = [json.loads(line) for line in (folder / "moved/provenance.jsonl").read_text().splitlines()]
    assert [start["start_step"] for start in starts] == [0, 4]
    return folder


@pytest.mark.parametrize("layout", [*ENGINES, "moved"])
def test_it_is_that_of_one_process(folder: Path, layout: str) -> None:
    expected, weights = tensors(folder / "alone", "ema"), tensors(folder / "alone", "head")
    found = tensors(folder / layout, "ema")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-6), name
    # An average that had not been kept up, or were the weights, would be further off.
    start = tensors(folder / "alone", "ema", 2)
    for other in (weights, start):
        assert any(not torch.allclose(other[name], tensor, rtol=1e-4, atol=1e-6) for name, tensor in expected.items())
    # And the heads themselves have trained on undisturbed by what was put in and out for saves and evaluations.
    found = tensors(folder / layout, "head")
    assert all(torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-6) for name, tensor in weights.items())
