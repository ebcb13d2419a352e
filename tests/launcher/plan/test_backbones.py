"""`permafrost plan` for Swin V1 and timm backbones, against real forwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from permafrost.launcher.cli import main
from permafrost.launcher.plan.backbone import degrees_of, plan_backbone, settle_windows, spec_of
from permafrost.launcher.plan.planner import Machines, Planner
from permafrost.launcher.recipes.overrides import parse_experiment
from permafrost.model import build_backbone
from permafrost.model.config import BackboneConfig

RECIPE = f"{Path(__file__).parents[1] / 'tiny_recipe.py'}:tiny"


def peak_of(events) -> int:
    """Most bytes that were allocated and not released since the profile began."""
    live = peak = 0
    for event in sorted((one for one in events if one.name() == "[memory]"), key=lambda one: one.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny",
        "timm/convnextv2_atto",
        "timm/vit_small_patch16_dinov3",
        "timm/vit_small_patch14_dinov2",
        "timm/eva02_tiny_patch14_224",
        "timm/hiera_tiny_224",
    ],
)
def test_a_real_forward_holds_and_computes_what_was_planned(name: str) -> None:
    config = BackboneConfig(name, "random")
    settled, notes = settle_windows(config)
    assert not notes
    found = plan_backbone(settled, dtype=torch.float32, tensor=1, images=(2, 3, 96, 128))
    backbone = build_backbone(config)
    assert found.num_parameters == backbone.num_parameters
    assert spec_of(config) == backbone.spec
    assert degrees_of(config) == [1]
    images = torch.zeros(2, 3, 96, 128, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        backbone(images)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        maps = backbone(images)
    kept = [
        one for module in backbone.modules() for row in (getattr(module, "folded", None) or {}).values() for one in row
    ]
    tensors = [one for one in (*backbone.parameters(), *backbone.buffers(), *kept) if isinstance(one, torch.Tensor)]
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    assert found.frozen_bytes == pytest.approx(sum(held.values()), rel=0.01)
    assert found.map_bytes == sum(one.nbytes for one in maps)
    # Hiera's attention on a CPU spreads a bias or copies, which a fused kernel does not.
    tolerance = 0.2 if "hiera" in name else 0.05
    assert found.peak_bytes == pytest.approx(peak_of(profiled.profiler.kineto_results.events()), rel=tolerance)
    # A CPU's attention is not among what torch counts.
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_command_plans_any_network(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", RECIPE, "--gpus", "2", "--gpu-memory", "16", "--json", "--backbone.name"]
    for name in ("swin_tiny", "timm/convnextv2_atto"):
        assert main([*command, name]) == 0
        told = json.loads(capsys.readouterr().out)
        assert {row["layout"]["tensor"] for row in told["rows"]} == {1}
        assert told["own"]["fits"]
    assert main([*command, "timm/vit_small_patch16_dinov3"]) == 2
    assert "use SimplePyramidConfig as neck" in capsys.readouterr().err
    assert main([*command, "timm/no_such_model"]) == 2
    assert "has no model" in capsys.readouterr().err


def test_a_swin_v1_that_learns_is_planned_and_a_timm_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    fields = ["--backbone.frozen", "False", "--backbone.name"]
    planner = Planner(parse_experiment(RECIPE, [*fields, "swin_tiny"]), Machines(device_type="cpu"))
    row = planner.row(planner.own)
    assert row.memory["frozen weights"] == 0
    assert row.memory["gradients"] == row.memory["head weights"] > 4 * 27e6
    assert main(["plan", RECIPE, *fields, "timm/convnextv2_atto"]) == 2
    assert "plan can predict the training of a Swin only" in capsys.readouterr().err


def test_a_compiled_forward_is_said_not_to_be_counted() -> None:
    planner = Planner(parse_experiment(RECIPE, ["--backbone.compile", "True"]), Machines(device_type="cpu"))
    assert any("backbone.compile" in note for note in planner.notes)


def test_a_tensor_group_across_nodes_is_slower_and_said() -> None:
    experiment = parse_experiment(RECIPE, ["--mesh.tensor", "4", "--loop.global-batch", "8"])
    together = Planner(experiment, Machines(gpus=4, nodes=2))
    apart = Planner(experiment, Machines(gpus=2, nodes=4))
    assert not any("on several nodes" in note for note in together.notes)
    assert any(
        "mesh.tensor 4 with 2 GPUs a node: tensor groups have ranks on several nodes" in one for one in apart.notes
    )
    one, other = (planner.row(planner.own) for planner in (together, apart))
    assert one.sent == other.sent
    sent = sum(num_bytes for name, num_bytes in one.sent.items() if name.startswith("tensor"))
    assert other.seconds - one.seconds == pytest.approx(sent * (1 / 40e9 - 1 / 300e9), rel=1e-6)
