"""Under ZeRO 3 a gathered weight is no activation: it does not leave for host memory, nor stay for the backward."""

from __future__ import annotations

import pytest
import torch

ZERO3 = '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'


@pytest.mark.parametrize("size", [1, 2])
def test_gathered_weights_do_not_leave(run_ranks, tmp_path, size) -> None:
    (tmp_path / "zero3.json").write_text(ZERO3)
    found = run_ranks("offload_worker.py", size, {"zero3": str(tmp_path / "zero3.json")})
    assert found["accelerate"]["offloaded"] == found["zero3"]["offloaded"] == (64 * 64 + 64 * 256 + 64 * 128) * 4
    for kind in ("accelerate", "zero3"):
        assert found[kind]["loss"] == pytest.approx(found["plain"]["loss"], rel=1e-6)
        for name, weight in found["plain"]["weights"].items():
            torch.testing.assert_close(found[kind]["weights"][name], weight, rtol=1e-5, atol=1e-7)
