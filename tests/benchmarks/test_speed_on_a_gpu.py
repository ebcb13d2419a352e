"""The frozen forward must reach this speed on a GPU. Times depend on the card and on what else it does: run it alone.

pytest -m gpu tests/benchmarks
"""

from __future__ import annotations

import importlib

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

gpu_all = importlib.import_module("gpu_all")


@pytest.mark.parametrize("window", [8, 12, 16])
def test_attention_is_within_twice_the_floor_and_three_times_eager(window: int) -> None:
    benchmark = importlib.import_module("window_attention")
    problem = benchmark.Problem(
        window=window, dtype=torch.bfloat16, device=torch.device("cuda", 0), **benchmark.GPU_SIZE
    )
    rows = benchmark.measure(problem, repeats=50, flex=False, is_right=True)
    found = list(gpu_all.check_attention([{key: str(value) for key, value in row.items()} for row in rows]))
    assert found
    assert all(is_met for _, is_met in found), found


@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 75e9, reason="needs 80 GB"
)
def test_the_giants_forward() -> None:
    benchmark = importlib.import_module("backbone")
    rows = benchmark.measure(
        "swinv2_giant",
        1024,
        window=16,
        batch=4,
        device=torch.device("cuda", 0),
        compiled=True,
        repeats=20,
        is_right=True,
    )
    found = list(gpu_all.check_giant([{key: str(value) for key, value in row.items()} for row in rows]))
    assert len(found) == (4 if torch.cuda.get_device_capability() >= (9, 0) else 3)
    assert all(is_met for _, is_met in found), found
