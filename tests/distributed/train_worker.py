"""Whole runs of the loop on the ranks this was started on: `runs` of the arguments, one after the other."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from common import arguments, save_result
from torch import nn

import permafrost.launcher.run.session as session
import permafrost.launcher.train as loop
from permafrost.data.detection.config import CocoDataConfig, JitterConfig
from permafrost.data.detection.types import DetectionResult
from permafrost.data.worlds.config import ShapesDataConfig, ShapesWorld
from permafrost.heads.base import Head, world_mean_counts
from permafrost.heads.detection.config import BoxHeadConfig, MaskHeadConfig, MaskRCNNConfig, PoolingConfig, RPNConfig
from permafrost.heads.necks.config import FPNConfig
from permafrost.launcher.errors import USER_ERRORS, TrainingStopped
from permafrost.launcher.evaluate import evaluate_run
from permafrost.launcher.experiment import (
    EngineConfig,
    Experiment,
    HeadExperiment,
    LoopConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from permafrost.launcher.ranks.exit import run_and_leave
from permafrost.launcher.ranks.process_group import join_process_group
from permafrost.model.config import BackboneConfig


@dataclass
class ProbeConfig(MaskRCNNConfig):
    """A smooth head, whose loss is NaN for chosen samples."""

    bad: tuple[int, ...] = ()
    """Indices of samples, in the first epoch."""

    def build(self, *, spec, classes) -> ProbeHead:
        return ProbeHead(spec.channels[-1], self.bad)


class ProbeHead(Head):
    def __init__(self, channels: int, bad: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 1)
        self.out = nn.Linear(8, 1)
        self.bad = bad

    def forward(self, features, batch, counts=world_mean_counts) -> dict[str, torch.Tensor] | list[DetectionResult]:
        output = self.out(torch.tanh(self.conv(features[-1].float())).mean((2, 3)))[:, 0]
        if not self.training:
            none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
            empty = {**none, "masks": torch.zeros(0, 4, 4)}
            return [
                DetectionResult(t.image_id, **empty, size=t.size, original_size=t.original_size) for t in batch.targets
            ]
        wanted = torch.tensor([float(len(target.boxes)) for target in batch.targets])
        # Weighted by the number of objects: micro-batches and ranks have different shares of the count.
        loss = (wanted * (output - wanted) ** 2).sum() / counts("objects", wanted.sum())
        if any(key.epoch == 0 and key.index in self.bad for key in batch.keys):
            loss = loss * math.nan
        return {"loss_probe": loss}


def head(model: MaskRCNNConfig, learning_rate: float = 2e-3) -> HeadExperiment:
    return HeadExperiment(
        model=model,
        optimizer=OptimizerConfig(learning_rate=learning_rate, reference_batch=4, clip_norm=None),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0),
    )


def mask_rcnn() -> MaskRCNNConfig:
    return MaskRCNNConfig(
        neck=FPNConfig(channels=16),
        rpn=RPNConfig(
            num_samples=32, num_pre_nms_train=60, num_pre_nms_test=30, num_proposals_train=30, num_proposals_test=15
        ),
        pooling=PoolingConfig(sampling_ratio=1, canonical_size=64),
        box=BoxHeadConfig(num_samples=32, fc_channels=16, num_detections=8, score_threshold=0.02),
        mask=MaskHeadConfig(num_convs=1, channels=8, resolution=7),
    )


def experiment(
    output: str,
    *,
    heads: list[str],
    bad: list[int] = (),
    engine: dict | None = None,
    tensor: int = 1,
    root: str = "",
    backbone: dict | None = None,
    coco: str = "",
    ema: float | None = None,
    **fields,
) -> Experiment:
    configs = {"probe": ProbeConfig(bad=tuple(bad)), "detection": mask_rcnn()}
    world = ShapesWorld(num_train=12, num_val=5, image_side=64, objects=(1, 4))
    defaults = {
        "num_steps": 6,
        "global_batch": 4,
        "num_workers": 0,
        "log_every": 1,
        "checkpoint_every": 3,
        "image_every": 0,
    }
    data = ShapesDataConfig(root=root, image_size=64, world=world, jitter=JitterConfig(scale_range=(0.7, 1.3)))
    if coco:
        # As it is on disk: nothing is cropped away, images without objects are trained on.
        as_is = JitterConfig(scale_range=(1.0, 1.0))
        data = CocoDataConfig(root=coco, image_size=64, jitter=as_is, train_empty_images=True)
    return Experiment(
        name="ranks",
        backbone=BackboneConfig(name="swinv2_nano", weights="random", **(backbone or {})),
        data=data,
        heads={name: dataclasses.replace(head(configs[name]), ema_decay=ema) for name in heads},
        loop=LoopConfig(**{**defaults, **fields}),
        engine=EngineConfig(**(engine or {})),
        mesh=MeshConfig(tensor=tensor),
        output=output,
    )


class Killed(BaseException):
    pass


def run(kill_after: int | None = None, resume: str = "auto", detections: str = "", **fields) -> dict:
    """One run: its metrics, or the error it ended with on this rank. `detections` is a folder for those of its evaluations."""
    original, calls = loop.track_replaced, []
    evaluate = session.evaluate_heads
    if detections:
        Path(detections).mkdir(parents=True, exist_ok=True)
        session.evaluate_heads = functools.partial(evaluate, results_folder=Path(detections))

    def counted(*given) -> None:
        original(*given)
        calls.append(None)
        if len(calls) == kill_after:
            raise Killed

    loop.track_replaced = counted
    try:
        return {"metrics": loop.train(experiment(**fields), resume=resume, device="cpu")}
    except (*USER_ERRORS, TrainingStopped) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    except Killed:
        return {"killed": True}
    finally:
        loop.track_replaced = original
        session.evaluate_heads = evaluate


def main() -> None:
    """The runs that the test asked for, one after the other."""
    given = arguments()
    group = join_process_group("cpu")  # outlives the runs, which find it there and leave it
    outcomes = []
    for one in given["runs"]:
        own = dict(one)
        if "wrong_rank" in own and own.pop("wrong_rank") == group.rank:
            own["num_steps"] = 7
        if own.get("root"):
            Path(own["root"]).parent.mkdir(parents=True, exist_ok=True)
        outcomes.append(group.gather_objects(run(**own)))
    metrics = []
    for evaluated in given.get("evaluate", []):
        # Another layout for a run that has ended: only what its recipe says of the mesh is changed.
        if group.is_main and "copy" in evaluated:
            shutil.copytree(evaluated["copy"], evaluated["run"])
            recipe = Path(evaluated["run"]) / "recipe.json"
            content = json.loads(recipe.read_text())
            content["experiment"]["mesh"]["tensor"] = evaluated["tensor"]
            recipe.write_text(json.dumps(content))
        group.barrier()
        metrics.append(group.gather_objects(evaluate_run(evaluated["run"], device="cpu")))
    save_result(group, given["result"], {"outcomes": outcomes, "metrics": metrics, "pid": os.getpid()})
    group.close()


if __name__ == "__main__":
    run_and_leave(main)
