"""`permafrost plan` of segmentation and video: against real steps under torch's trackers, and as a user meets it."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from permafrost.data.segmentation.config import ADE20KDataConfig
from permafrost.data.segmentation.types import SegmentationTarget
from permafrost.data.task import SampleExtent
from permafrost.data.video.types import ClipTarget
from permafrost.heads.build import build_head
from permafrost.heads.config import HeadConfig
from permafrost.heads.segmentation.config import (
    Mask2FormerConfig,
    PixelDecoderConfig,
    SegmentationLossConfig,
    TransformerDecoderConfig,
)
from permafrost.heads.video.config import GlobalVideoConfig, LinearVideoConfig, TemporalVideoConfig
from permafrost.launcher.cli import main
from permafrost.launcher.plan.backbone import BackbonePlan, plan_backbone, settle_windows
from permafrost.launcher.plan.batches import PlannedData
from permafrost.launcher.plan.fine_tune import plan_trained
from permafrost.launcher.plan.head import HeadRun, plan_head
from permafrost.launcher.plan.planner import Machines, Planner
from permafrost.launcher.recipes.overrides import parse_experiment
from permafrost.model.config import BackboneConfig
from permafrost.model.spec import SWINV2_SIZES

NANO = SWINV2_SIZES["swinv2_nano"].spec
SCENES = PlannedData(SegmentationTarget, num_classes=12, objects=5)
CLIPS = PlannedData(ClipTarget, num_classes=10, objects=1, num_frames=8, maps=8)
MASK2FORMER = Mask2FormerConfig(
    pixel_decoder=PixelDecoderConfig(channels=32, num_heads=4, ffn_channels=64),
    transformer_decoder=TransformerDecoderConfig(num_queries=20, num_heads=4, ffn_channels=64),
    loss=SegmentationLossConfig(num_points=512),
)


def run_of(config: HeadConfig, data: PlannedData) -> HeadRun:
    torch.manual_seed(0)
    head = build_head(config, spec=NANO, classes=[str(index) for index in range(data.num_classes)]).train()
    return HeadRun(head, NANO, torch.float32, "float32", data, offload="off", device_type="cpu")


@pytest.mark.parametrize(
    ("config", "data", "batch", "side"),
    [
        (MASK2FORMER, SCENES, 2, 160),
        (LinearVideoConfig(), CLIPS, 2, 64),
        (TemporalVideoConfig(num_blocks=2, width=64), CLIPS, 2, 64),
        (GlobalVideoConfig(num_blocks=2, width=64), CLIPS, 2, 64),
    ],
    ids=["mask2former", "linear", "temporal", "global"],
)
def test_a_heads_peak_and_flops_are_those_of_a_real_step(config, data: PlannedData, batch: int, side: int) -> None:
    run = run_of(config, data)
    found = plan_head(run, batch=batch, side=side)
    head, samples, lead = copy.deepcopy(run.head), data.batch(batch, side), data.lead(batch)
    maps = [
        torch.randn(math.prod(lead), c, side // s, side // s)
        .contiguous(memory_format=torch.channels_last)
        .unflatten(0, lead)
        for c, s in zip(NANO.channels, NANO.strides)
    ]
    known = [value for target in samples.targets for value in vars(target).values() if isinstance(value, torch.Tensor)]
    tracker = MemTracker()
    tracker.track_external(head, *maps, samples.images, *known)
    there = sum(one.nbytes for one in (*head.parameters(), *head.buffers(), *maps, samples.images, *known))
    with FlopCounterMode(display=False) as counter, tracker:
        torch.stack(list(head(maps, samples).values())).sum().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - there
    gathered, most = 0, found.forward_peak
    for own, numel in zip(found.backward_peaks, (*found.numels, 0)):
        most = max(most, own + gathered)
        gathered += 4 * numel
    assert gathered == 4 * sum(p.numel() for p in head.parameters())
    assert most == pytest.approx(peak, rel=0.15)
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_more_clips_are_extrapolated_from_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(GlobalVideoConfig(num_blocks=1, width=64), CLIPS)
    direct = plan_head(run, batch=5, side=64)
    monkeypatch.setattr("permafrost.launcher.plan.head.MAX_PIXELS", 0)
    found = plan_head(run, batch=5, side=64)
    assert found.is_extrapolated
    assert not direct.is_extrapolated
    assert found.flops == pytest.approx(direct.flops, rel=0.01)
    assert found.saved_bytes == pytest.approx(direct.saved_bytes, rel=0.02)
    assert max(found.backward_peaks) == pytest.approx(max(direct.backward_peaks), rel=0.1)


def backbone_of(images: tuple[int, ...], tensor: int = 1, **fields) -> BackbonePlan:
    config = BackboneConfig("swinv2_nano", "random", **fields)
    config, _ = settle_windows(config)
    return plan_backbone(config, dtype=torch.float32, tensor=tensor, images=images)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_clip_costs_what_its_frames_cost(tensor: int) -> None:
    frames, clips = backbone_of((6, 3, 64, 64), tensor), backbone_of((2, 3, 3, 64, 64), tensor)
    assert clips == frames


def test_passes_of_fewer_images_hold_less() -> None:
    whole, parts = backbone_of((8, 3, 64, 64)), backbone_of((8, 3, 64, 64), max_images=2)
    assert parts.map_bytes == whole.map_bytes
    assert parts.flops == pytest.approx(whole.flops, rel=1e-6)
    assert parts.peak_bytes - parts.map_bytes < 0.5 * whole.peak_bytes


def test_frames_that_are_embedded_together_give_half_as_many_maps() -> None:
    each, pairs = backbone_of((2, 4, 3, 64, 64)), backbone_of((2, 4, 3, 64, 64), patch_frames=2)
    assert pairs.map_bytes == each.map_bytes / 2
    # Of the patch embedding, 4 x 4 x 3 weights a channel more.
    assert pairs.frozen_bytes - each.frozen_bytes == 4 * 48 * NANO.channels[0]


def test_a_trained_network_takes_clips() -> None:
    config = BackboneConfig("swinv2_nano", "random", frozen=False, patch_frames=2)
    found = plan_trained(config, batch=4, size=(64, 64), precision="float32", device_type="cpu")
    assert found.flops == pytest.approx(3 * backbone_of((4, 2, 3, 64, 64), patch_frames=2).flops, rel=0.05)


def test_stripes_are_all_classes_there_are_to_be() -> None:
    batch = PlannedData(SegmentationTarget, num_classes=3, objects=7).batch(2, 32)
    assert batch.targets[0].labels.tolist() == batch.targets[0].semantic.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("recipe", "fields", "unit", "note"),
    [
        ("quickstart_segmentation", ["--data.image-size", "96"], "images", None),
        ("quickstart_video", [], "clips", None),
        (
            "kinetics:swinv2_base_linear",
            ["--backbone.name", "swinv2_nano", "--backbone.weights", "random"],
            "clips",
            "400 classes are assumed",
        ),
    ],
)
def test_the_command_answers_for_every_task(recipe, fields, unit, note, capsys) -> None:
    assert main(["plan", recipe, "--gpu-memory", "80", *fields]) == 0
    out = capsys.readouterr().out
    assert f" {unit} = " in out
    assert "recommended" in out
    assert note is None or note in out
    assert main(["plan", recipe, "--gpu-memory", "80", "--json", *fields]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["own"]["memory"]["feature maps"] > 0


def test_a_clips_maps_and_bytes_are_those_of_its_frames() -> None:
    experiment = parse_experiment("quickstart_video", ["--loop.global-batch", "4"])
    own = Planner(experiment, Machines(device_type="cpu")).table()[0]
    clip = experiment.data.clip
    frames = 4 * clip.num_frames
    assert own.memory["batch"] == frames * 3 * clip.crop_size**2
    assert own.memory["feature maps"] == 4 * frames * sum(
        c * (clip.crop_size // s) ** 2 for c, s in zip(NANO.channels, NANO.strides)
    )


def test_what_the_data_does_not_say_is_said() -> None:
    assert ADE20KDataConfig(image_size=96).extent() == SampleExtent(96)
    experiment = parse_experiment("ade20k:swinv2_base_mask2former", [])
    planner = Planner(experiment, Machines(gpus=8))
    assert (planner.num_classes, planner.objects) == (150, 30)
    assert any("30 classes in every image are assumed" in note for note in planner.notes)
