"""`permafrost plan` of a backbone that learns, where no run here can confirm it: on GPUs. On CPUs: tests/distributed/test_plan.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from permafrost.launcher.errors import RecipeError
from permafrost.launcher.plan.advice import remedies
from permafrost.launcher.plan.backbone import plan_backbone
from permafrost.launcher.plan.engines import EnginePlan
from permafrost.launcher.plan.fine_tune import TrainedPlan, plan_trained
from permafrost.launcher.plan.planner import Machines, Planner
from permafrost.launcher.recipes.overrides import parse_experiment
from permafrost.model.config import BackboneConfig
from permafrost.model.spec import SWINV2_SIZES

RECIPE = f"{Path(__file__).parents[1] / 'tiny_recipe.py'}:tiny"
SIDE, BATCH = 256, 2


def trained(*, precision: str = "bfloat16", device_type: str = "cuda", again: bool = False) -> TrainedPlan:
    config = BackboneConfig("swinv2_tiny", "random", frozen=False, checkpoint_activations=again)
    return plan_trained(config, batch=BATCH, size=(SIDE, SIDE), precision=precision, device_type=device_type)


def test_a_backward_costs_twice_a_forward_and_recomputing_costs_another() -> None:
    found, again = trained(), trained(again=True)
    frozen = plan_backbone(
        BackboneConfig("swinv2_tiny", "random"),
        dtype=torch.bfloat16,
        tensor=1,
        images=(BATCH, 3, SIDE, SIDE),
    )
    # The frozen network has its position biases already.
    assert found.forward_flops == pytest.approx(frozen.flops, rel=0.02)
    assert found.flops == pytest.approx(3 * frozen.flops, rel=0.05)
    assert again.flops == pytest.approx(4 * frozen.flops, rel=0.05)
    assert sum(found.numels) == sum(again.numels) == frozen.num_parameters
    assert again.saved_bytes < 0.3 * found.saved_bytes
    assert max(again.backward_peaks) < 0.5 * max(found.backward_peaks)


def test_what_is_saved_is_what_each_block_needs() -> None:
    """By hand: tokens times channels of what a block's backward reads, in float32 where autocast leaves it."""
    size = SWINV2_SIZES["swinv2_tiny"]
    low, high = 0, 0
    for depth, channels, stride in zip(size.depths, size.channels, (4, 8, 16, 32)):
        tokens = BATCH * (SIDE // stride) ** 2
        # bfloat16: input, q, k, v, attention's output, input of the MLP, 4 + 4 around the GELU.
        low += depth * tokens * channels * 2 * 13
        # And casts, rolled and normalised copies, the residual stream and the norms in float32.
        high += depth * tokens * channels * 4 * 30
    found = trained()
    assert low < found.saved_bytes < high
    assert found.map_dtype == torch.float32
    # Without a fused attention the scores stay as well.
    assert trained(device_type="cpu", precision="float32").saved_bytes > 1.1 * found.saved_bytes


def test_a_plan_of_a_trained_backbone_has_one_tensor_degree_and_no_offload() -> None:
    experiment = parse_experiment(RECIPE, ["--backbone.frozen", "False"])
    planner = Planner(experiment, Machines(gpus=2, memory=2**20))
    rows = planner.table()
    assert [(row.layout.tensor, row.layout.stage) for row in rows] == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert all(row.memory["frozen weights"] == 0 for row in rows)
    assert rows[0].memory["head weights"] > 4 * 2_700_000
    assert not remedies(planner, rows[0], rows)
    with pytest.raises(RecipeError, match=r"plan can predict that only with engine\.offload 'off'"):
        Planner(parse_experiment(RECIPE, ["--backbone.frozen", "False", "--engine.offload", "all"]), Machines(gpus=1))


def test_zero_3_gathers_only_so_much_of_a_giant() -> None:
    groups = [[2_000_000] * 1_500]
    found = EnginePlan(3, 8).memory(groups)
    assert found.gathered == 4 * 10**9
    assert found.weights == 4 * 1_500 * 2_000_000 // 8
