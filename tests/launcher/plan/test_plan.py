"""`permafrost plan`: its counts against arithmetic, against torch's own trackers, and its answers as a user meets them.

What engines really hold and send is in tests/distributed/test_plan.py.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from permafrost.data.detection.types import DetectionTarget
from permafrost.heads.build import build_head
from permafrost.heads.detection.config import BoxHeadConfig, MaskHeadConfig, MaskRCNNConfig, RPNConfig
from permafrost.heads.necks.config import FPNConfig
from permafrost.launcher.cli import main
from permafrost.launcher.plan import head as plan_head_module
from permafrost.launcher.plan.advice import recommend, remedies
from permafrost.launcher.plan.backbone import BackbonePlan, plan_backbone, settle_windows
from permafrost.launcher.plan.batches import PlannedData
from permafrost.launcher.plan.engines import EnginePlan
from permafrost.launcher.plan.head import HeadRun, plan_head
from permafrost.launcher.plan.planner import Layout, Machines, Planner
from permafrost.launcher.recipes.overrides import parse_experiment
from permafrost.launcher.run.offload import ActivationOffload
from permafrost.model.config import BackboneConfig
from permafrost.model.spec import SWINV2_SIZES
from permafrost.model.split.tensor_parallel import is_split
from permafrost.model.swin.v2 import SwinV2

RECIPE = f"{Path(__file__).parents[1] / 'tiny_recipe.py'}:tiny"
NANO = SWINV2_SIZES["swinv2_nano"].spec
# Wide enough that activations outweigh what is small.
HEAD = MaskRCNNConfig(
    neck=FPNConfig(channels=32),
    rpn=RPNConfig(num_pre_nms_train=200, num_proposals_train=100, num_samples=64),
    box=BoxHeadConfig(num_samples=64, fc_channels=64),
    mask=MaskHeadConfig(num_convs=1, channels=32, resolution=7),
)


def plan(
    name: str, *, tensor: int = 1, size: int = 1024, window: int = 16, batch: int = 1, dtype=torch.bfloat16
) -> BackbonePlan:
    config = BackboneConfig(name, "random", window_size=window)
    config, notes = settle_windows(config)
    assert not notes
    return plan_backbone(config, dtype=dtype, tensor=tensor, images=(batch, 3, size, size))


# GMAC of a forward, GiB of bfloat16 weights and MiB of feature maps, calculated by hand from the published sizes.
@pytest.mark.parametrize(
    ("name", "window", "size", "gmac", "weights", "maps"),
    [
        ("swinv2_tiny", 16, 1024, 106, 0.05, 22.5),
        ("swinv2_base", 16, 1024, 349, 0.16, 30),
        ("swinv2_base", 8, 256, 20.3, 0.16, 30 / 16),
        ("swinv2_giant", 16, 1024, 10_650, 5.58, 120),
    ],
)
def test_frozen_networks_cost_what_arithmetic_says(name, window, size, gmac, weights, maps) -> None:
    found = plan(name, window=window, size=size)
    assert found.flops / 2e9 == pytest.approx(gmac, rel=0.01)
    # Position bias and logit scales, folded in float32, come on top.
    assert weights - 0.01 < found.frozen_bytes / 2**30 < 1.04 * weights + 0.01
    assert found.map_bytes / 2**20 == pytest.approx(maps, rel=0.001)
    assert found.sent == {}


@pytest.mark.parametrize("degree", [2, 4])
def test_a_split_network_holds_its_parts_and_sends_its_partial_sums(degree: int) -> None:
    size, channels = 256, SWINV2_SIZES["swinv2_tiny"].channels
    whole, part = (
        plan("swinv2_tiny", tensor=t, size=size, window=8, batch=2, dtype=torch.float32) for t in (1, degree)
    )
    with torch.device("meta"):
        network = SwinV2("swinv2_tiny", window_size=8)
    weights = sum(p.numel() / (degree if is_split(name) else 1) for name, p in network.named_parameters()) * 4
    assert weights < part.frozen_bytes < 1.06 * weights
    assert part.map_bytes == whole.map_bytes
    # Each member computes 1 / degree of the split stages for the images of all, which is as much as it would alone.
    assert part.flops == pytest.approx(whole.flops, rel=0.01)
    # proj and fc2 of 6 blocks on 16 x 16 and 2 on 8 x 8 tokens, over all members' images; the map that enters stage 3,
    # and its channels after the step to stage 4.
    images = 2 * degree
    sums = 4 * images * 2 * (6 * 16**2 * channels[2] + 2 * 8**2 * channels[3])
    assert part.sent["all-reduce"] == pytest.approx(2 * (degree - 1) / degree * sums, rel=0.001)
    entry, step = 4 * 2 * 16**2 * channels[2], 4 * images * 8**2 * channels[3] / degree
    assert part.sent["all-gather"] == pytest.approx((degree - 1) * (entry + step), rel=0.001)


@pytest.fixture(scope="module")
def head_run() -> HeadRun:
    torch.manual_seed(0)
    head = build_head(HEAD, spec=NANO, classes=[str(i) for i in range(8)]).train()
    return HeadRun(
        head, NANO, torch.float32, "float32", PlannedData(DetectionTarget, 8, 6), offload="off", device_type="cpu"
    )


def really(run: HeadRun, batch: int, side: int) -> tuple[int, int]:
    """(peak, FLOPs) of a real forward and backward, by torch's MemTracker and FlopCounterMode."""
    head = copy.deepcopy(run.head)
    data = run.data.batch(batch, side)
    maps = [
        torch.randn(batch, c, side // s, side // s).contiguous(memory_format=torch.channels_last)
        for c, s in zip(run.spec.channels, run.spec.strides)
    ]
    tracker = MemTracker()
    tracker.track_external(head, *maps, data.images, *(target.masks for target in data.targets))
    there = sum(one.nbytes for one in (*head.parameters(), *maps, data.images, *(t.masks for t in data.targets)))
    with FlopCounterMode(display=False) as counter, tracker:
        losses = head(maps, data)
        torch.stack(list(losses.values())).sum().backward()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - there, counter.get_total_flops()


@pytest.mark.parametrize(("batch", "side"), [(1, 256), (2, 192)])
def test_a_heads_peak_and_flops_are_those_of_a_real_step(head_run: HeadRun, batch: int, side: int) -> None:
    found = plan_head(head_run, batch=batch, side=side)
    peak, flops = really(head_run, batch, side)
    gathered, most = 0, found.forward_peak
    for own, numel in zip(found.backward_peaks, (*found.numels, 0)):
        most = max(most, own + gathered)
        gathered += 4 * numel
    assert gathered == 4 * sum(p.numel() for p in head_run.head.parameters())
    assert most == pytest.approx(peak, rel=0.15)
    # How many regions are positive is the data's.
    assert found.flops == pytest.approx(flops, rel=0.1)
    assert found.forward_flops < 0.5 * found.flops


def test_extrapolation_agrees_with_the_true_size(head_run: HeadRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(head_run, map_dtype=torch.bfloat16, precision="bfloat16")
    direct = plan_head(run, batch=3, side=384)
    monkeypatch.setattr(plan_head_module, "MAX_PIXELS", 0)
    monkeypatch.setattr(plan_head_module, "SMALL_SIDES", (192, 288))
    found = plan_head(run, batch=3, side=384)
    assert found.is_extrapolated
    assert not direct.is_extrapolated
    assert found.saved_bytes == pytest.approx(direct.saved_bytes, rel=0.05)
    # In smaller images fewer regions are positive.
    assert found.flops == pytest.approx(direct.flops, rel=0.1)
    assert max(found.backward_peaks) == pytest.approx(max(direct.backward_peaks), rel=0.1)
    assert found.forward_peak == pytest.approx(direct.forward_peak, rel=0.15)


def test_offload_moves_what_a_head_saves_to_the_host(head_run: HeadRun) -> None:
    off, features, everything = (
        plan_head(replace(head_run, offload=mode), batch=1, side=256) for mode in ("off", "features", "all")
    )
    maps = 4 * sum(c * (256 // s) ** 2 for c, s in zip(NANO.channels, NANO.strides))
    assert off.host_bytes == 0
    # Buffers are whole multiples of 64 KiB.
    assert maps <= features.host_bytes < maps + 4 * 2**16
    assert everything.host_bytes > 0.8 * off.saved_bytes
    assert everything.saved_bytes < 0.1 * off.saved_bytes
    assert everything.flops == off.flops


@pytest.mark.parametrize("mode", ["features", "all"])
def test_planned_host_memory_is_what_a_real_step_holds(head_run: HeadRun, mode: str) -> None:
    planned = plan_head(replace(head_run, offload=mode), batch=2, side=192)
    head, batch = copy.deepcopy(head_run.head), head_run.data.batch(2, 192)
    maps = [torch.randn(2, c, 192 // s, 192 // s) for c, s in zip(NANO.channels, NANO.strides)]
    offload = ActivationOffload(mode, torch.device("cpu"))
    kept = offload.forward(Maps(maps), batch.images)
    taken = kept.take()
    with offload.saving(head, kept, taken):
        losses = head(taken, batch)
    del taken
    torch.stack(list(losses.values())).sum().backward()
    # How many regions are positive is the data's.
    assert planned.host_bytes == pytest.approx(offload.buffers.held_bytes, rel=0.1)


class Maps:
    """A backbone that gives maps which are there."""

    stages = ()

    def __init__(self, maps: list[torch.Tensor]) -> None:
        self.maps = tuple(maps)

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.maps


def test_engines_hold_less_the_more_they_partition() -> None:
    groups = [[10_000_000, 2_000_000], [512, 64]]
    whole = 4 * sum(map(sum, groups))
    small = {"reduce_bucket_size": 1_000}
    one = {stage: EnginePlan(stage, 4, zero=small).memory(groups) for stage in (0, 1, 2, 3)}
    assert (one[0].weights, one[0].optimizer, one[0].gradients) == (whole, 2 * whole, 2 * whole)
    assert one[2].weights == pytest.approx(whole, rel=1e-4)
    assert one[2].optimizer == pytest.approx(3 * whole / 4, rel=1e-4), "moments, and masters although all is float32"
    assert one[3].weights == pytest.approx(whole / 4, rel=0.01)
    assert one[3].optimizer == pytest.approx(2 * whole / 4, rel=0.01), "the parts are the masters"
    # A bucket is there however small the head is.
    assert EnginePlan(3, 4, zero={"reduce_bucket_size": 50_000_000}).memory([[8]]).resident > 4 * 50_000_000
    on_host = EnginePlan(2, 4, zero={**small, "offload_optimizer": {"device": "cpu"}}).memory(groups)
    assert on_host.optimizer == 0
    assert on_host.host > one[2].optimizer


def test_the_command_answers_for_coco_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.process_time()  # whatever else the machine does
    assert main(["plan", "coco:swinv2_base_fpn", "--gpus", "8", "--gpu-memory", "80", "--json"]) == 0
    assert time.process_time() - start < 60
    told = json.loads(capsys.readouterr().out)
    assert {(row["layout"]["tensor"], row["layout"]["stage"]) for row in told["rows"]} == {
        (tensor, stage) for tensor in (1, 2, 4, 8) for stage in (0, 1, 2, 3)
    }
    assert all(row["fits"] for row in told["rows"])
    assert told["recommended"]["layout"] == told["own"]["layout"], "what is simplest, where all fits"
    own = told["own"]
    assert own["micro_batch"] == 2
    assert own["memory"]["feature maps"] == 2 * 30 * 2**20
    assert own["memory"]["peak"] > own["memory"]["frozen weights"] + own["memory"]["head activations"]
    assert 1 < own["flops"] / 1e12 < 10
    assert any("extrapolated" in note for note in told["notes"])


def test_what_does_not_fit_is_said_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    fields = ["--loop.global-batch", "16", "--data.image-size", "256"]
    planner = Planner(parse_experiment(RECIPE, fields), Machines(gpus=2))
    rows = planner.table()
    own = next(row for row in rows if row.layout == planner.own)
    least = planner.row(replace(own.layout, accumulation=2))
    assert least.peak < own.peak
    memory = (least.peak + own.peak) / 2 / 0.92
    assert main(["plan", RECIPE, "--gpus", "2", "--gpu-memory", f"{memory / 2**30:.6f}", *fields]) == 0
    out = capsys.readouterr().out
    assert f"the recipe's layout needs {own.peak / 2**30:.1f} GiB" in out
    assert "it fits with --engine.accumulation 2:" in out
    tight = Planner(parse_experiment(RECIPE, fields), Machines(gpus=2, memory=round(memory)))
    found = remedies(tight, own, tight.table())
    assert found
    assert all(tight.fits(row) for _, row in found)
    best = recommend(tight, tight.table())
    assert best is None or tight.fits(best)
    # Weights alone are larger.
    assert main(["plan", RECIPE, "--gpus", "2", "--gpu-memory", "0.001", *fields]) == 1
    assert "nothing makes it fit" in capsys.readouterr().out


def test_several_nodes_are_given_to_deepspeed() -> None:
    planner = Planner(parse_experiment(RECIPE, ["--loop.global-batch", "8"]), Machines(gpus=2, nodes=4))
    best = recommend(planner, planner.table())
    assert best is not None
    assert best.layout.stage in (1, 2, 3)
    assert best.layout.tensor == 1


def test_the_recipes_own_layout_is_in_the_table() -> None:
    fields = ["--mesh.tensor", "2", "--engine.kind", "deepspeed", "--engine.zero-stage", "3", "--engine.offload", "all"]
    fields += ["--engine.accumulation", "2", "--loop.global-batch", "8"]
    planner = Planner(parse_experiment(RECIPE, fields), Machines(gpus=2))
    assert planner.own == Layout(2, 3, 2, "all")
    assert planner.own in [row.layout for row in planner.table()]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([RECIPE, "--gpus", "0"], "'0' is not a number of GPUs"),
        ([RECIPE, "--gpu-memory", "-4"], "'-4' is not an amount of GB of memory"),
        ([RECIPE, "--gpus", "3"], "loop.global_batch 2 does not divide over 3 process(es)"),
        ([RECIPE, "--mesh.tensor", "2"], "do not divide into groups of 2"),
        (["coco:swinv2_bas_fpn"], "swinv2_base_fpn"),
        ([RECIPE, "--gpu", "8"], "there is no option --gpu"),
        (["pretrain:nano_glyphs"], "it is for `permafrost pretrain`"),
        (["--gpus", "8"], "permafrost plan needs a recipe"),
    ],
)
def test_mistakes_exit_with_2(args: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *args]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err
