"""Steps of a small Mask R-CNN on random features, under every engine, on however many ranks this was started."""

from __future__ import annotations

import dataclasses

import torch
from common import arguments, save_result
from engines_worker import KINDS

from permafrost.data.detection.types import DetectionTarget
from permafrost.data.types import Batch, SampleKey
from permafrost.heads.base import Head, world_mean_counts
from permafrost.heads.build import build_head
from permafrost.heads.detection.config import (
    BoxHeadConfig,
    HTCConfig,
    MaskHeadConfig,
    MaskRCNNConfig,
    PoolingConfig,
    RPNConfig,
    SemanticBranchConfig,
)
from permafrost.heads.necks.config import BiFPNConfig, FPNConfig
from permafrost.launcher.engines.choose import build_engine
from permafrost.launcher.experiment import EngineConfig, OptimizerConfig
from permafrost.launcher.ranks.exit import run_and_leave
from permafrost.launcher.ranks.process_group import join_process_group
from permafrost.model.spec import FeatureSpec

GLOBAL_BATCH = 4
SIDE = 64
SPEC = FeatureSpec(channels=(6, 8, 10, 12), strides=(4, 8, 16, 32))
CONFIG = MaskRCNNConfig(
    neck=FPNConfig(channels=16),
    rpn=RPNConfig(
        num_samples=32, num_pre_nms_train=60, num_pre_nms_test=30, num_proposals_train=30, num_proposals_test=15
    ),
    pooling=PoolingConfig(sampling_ratio=1, canonical_size=64),
    box=BoxHeadConfig(num_samples=32, fc_channels=16, num_detections=8, score_threshold=0.02),
    mask=MaskHeadConfig(num_convs=1, channels=8, resolution=7),
)


# Every part at once: a bidirectional pyramid, three stages that hand features on, a semantic branch.
HTC = HTCConfig(
    **{
        **vars(CONFIG),
        "neck": BiFPNConfig(channels=16, num_layers=2),
        "box": dataclasses.replace(CONFIG.box, class_agnostic=True),
        "semantic": SemanticBranchConfig(num_classes=4, num_convs=1),
    }
)


def make_head(config: MaskRCNNConfig) -> Head:
    torch.manual_seed(0)
    return build_head(config, spec=SPEC, classes=["circle", "square", "star"])


def image(step: int, index: int, num_boxes: int) -> tuple[list[torch.Tensor], DetectionTarget]:
    """Random feature maps, and boxes with rectangular masks, of one image of one step."""
    draw = SampleKey(11, step, index).generator("image")
    maps = [
        torch.randn(channels, SIDE // stride, SIDE // stride, generator=draw)
        for channels, stride in zip(SPEC.channels, SPEC.strides)
    ]
    corners = torch.rand(num_boxes, 2, generator=draw) * 30
    boxes = torch.cat([corners, corners + 8 + torch.rand(num_boxes, 2, generator=draw) * 20], dim=1)
    rows = torch.arange(SIDE) + 0.5
    inside = [(rows >= boxes[:, low, None]) & (rows < boxes[:, low + 2, None]) for low in (0, 1)]
    target = DetectionTarget(
        image_id=index,
        boxes=boxes,
        labels=torch.randint(3, (num_boxes,), generator=draw),
        masks=inside[1][:, :, None] & inside[0][:, None, :],
        ignore_boxes=torch.zeros(0, 4),
        size=(SIDE, SIDE),
        original_size=(SIDE, SIDE),
        semantic=torch.randint(4, (SIDE, SIDE), generator=draw, dtype=torch.uint8),
    )
    return maps, target


def local_batch(group, step: int, num_boxes: tuple[int, ...]) -> tuple[tuple[torch.Tensor, ...], Batch]:
    """This rank's contiguous share of a step's images; `num_boxes` of each image of the global batch."""
    size = GLOBAL_BATCH // group.world_size
    chosen = range(group.rank * size, (group.rank + 1) * size)
    images = [image(step, index, num_boxes[index]) for index in chosen]
    features = tuple(torch.stack([maps[level] for maps, _ in images]) for level in range(len(SPEC.channels)))
    keys = [SampleKey(11, step, index) for index in chosen]
    return features, Batch(torch.zeros(size, 3, SIDE, SIDE, dtype=torch.uint8), [t for _, t in images], keys)


def take_steps(group, kind: str, steps: list[tuple[int, ...]], config: MaskRCNNConfig = CONFIG) -> dict:
    engine = build_engine(
        make_head(config),
        optimizer=OptimizerConfig(),
        engine=EngineConfig() if kind == "accelerate" else EngineConfig(deepspeed_config=kind),
        group=group,
        global_batch=GLOBAL_BATCH,
    )
    engine.train()
    result = {"steps": []}
    for step, num_boxes in enumerate(steps):
        features, batch = local_batch(group, step, num_boxes)
        losses = engine(features, batch, world_mean_counts)
        engine.backward(sum(losses.values()))
        report = engine.step(1e-3)
        assert not report.skipped
        means = group.all_reduce_mean({name: loss.item() for name, loss in losses.items()})
        result["steps"].append({**means, "grad_norm": report.grad_norm})
        if step == 0:
            # A tenth of each parameter's gradient.
            result["exp_avg"] = engine.export_state().exp_avg
    engine.train(False)
    # Different numbers of detections on each rank, none on the last one: ZeRO 3 gathers parameters here.
    features, batch = local_batch(group, 99, (2, 2, 2, 2))
    if group.rank == group.world_size - 1:
        last = engine.head.box if config is CONFIG else engine.head.boxes[-1]
        last.config = dataclasses.replace(last.config, score_threshold=0.999)
    detections = engine(features, batch, world_mean_counts)
    result["num_detections"] = group.gather_objects([len(found.boxes) for found in detections])
    return result


def main() -> None:
    args = arguments()
    group = join_process_group("cpu", timeout=180)
    # The second step has objects on the first rank only, the third on none.
    steps = [(3, 1, 2, 4), (2, 1, 0, 0), (0, 0, 0, 0), (1, 1, 1, 1)]
    if args.get("htc"):
        save_result(
            group, args["result"], {kind: take_steps(group, kind, steps, HTC) for kind in ("accelerate", "zero3")}
        )
        group.close()
        return
    save_result(group, args["result"], {kind: take_steps(group, kind, steps) for kind in KINDS})
    group.close()


if __name__ == "__main__":
    run_and_leave(main)
