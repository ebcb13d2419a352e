"""The real head: the same first step on one rank and two, under DDP and ZeRO 1, 2 and 3, and no rank left waiting.

Detection amplifies rounding (a box that crosses a threshold changes the samples): 20 steps are compared in float64, in
test_equality.py.
"""

from __future__ import annotations

from typing import Any

import pytest

KINDS = ("accelerate", "zero1", "zero2", "zero3")
LOSSES = {"loss_rpn_objectness", "loss_rpn_box", "loss_classifier", "loss_box", "loss_mask"}


@pytest.fixture(scope="module")
def results(run_ranks) -> dict[int, dict[str, Any]]:
    return {size: run_ranks("mask_rcnn_worker.py", size) for size in (1, 2)}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_first_step(results, kind, size) -> None:
    found, wanted = results[size][kind], results[1]["accelerate"]
    assert found["steps"][0].keys() == LOSSES | {"grad_norm"}
    for name, value in wanted["steps"][0].items():
        assert value > 0
        assert found["steps"][0][name] == pytest.approx(value, rel=1e-5), name
    assert found["exp_avg"].keys() == wanted["exp_avg"].keys()
    for name, gradient in wanted["exp_avg"].items():
        assert gradient.any(), name
        assert (found["exp_avg"][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_without_objects(results, kind, size) -> None:
    """Objects on one rank only, on none, and then again: every rank has gone through them all."""
    steps = results[size][kind]["steps"]
    assert len(steps) == 4
    assert steps[1]["loss_mask"] > 0
    assert steps[2]["loss_mask"] == 0
    assert steps[2]["loss_classifier"] > 0
    assert steps[3]["loss_mask"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_with_uneven_counts(results, kind) -> None:
    first, last = results[2][kind]["num_detections"]
    assert all(count > 0 for count in first)
    assert last == [0, 0]


def test_deepspeed_finds_all_tensors(results) -> None:
    """ZeRO 3 says so when a module's output hides tensors from it, and might then free parameters too early."""
    for result in results.values():
        assert "unknown inputs or outputs" not in result["output"]


@pytest.fixture(scope="module")
def htc(run_ranks) -> dict[int, dict[str, Any]]:
    return {size: run_ranks("mask_rcnn_worker.py", size, {"htc": True}) for size in (1, 2)}


def test_htc_takes_the_same_first_step_everywhere(htc) -> None:
    """A cascade with features handed on and a semantic branch, on BiFPN: the same losses and gradients on two ranks and under
    ZeRO 3, no rank left waiting when objects are missing on one of them, or detections in evaluation."""
    wanted = htc[1]["accelerate"]
    assert len(wanted["steps"][0]) == 2 + 1 + 9 + 1
    for size in (1, 2):
        for kind in ("accelerate", "zero3"):
            found = htc[size][kind]
            for name, value in wanted["steps"][0].items():
                assert found["steps"][0][name] == pytest.approx(value, rel=1e-5), (size, kind, name)
            for name, gradient in wanted["exp_avg"].items():
                assert gradient.any(), name
                assert (found["exp_avg"][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, (size, kind, name)
            masks = [step["loss_mask_3"] for step in found["steps"]]
            assert [value > 0 for value in masks] == [True, True, False, True]
    for kind in ("accelerate", "zero3"):
        assert htc[2][kind]["num_detections"][1] == [0, 0]
