"""Recipes of the fault tests, and the faults: the variable FAULT says which one happens, on which rank and when.

    {"do": "kill", "rank": 1, "at": "step", "number": 5}

Faults are put into the running program at named places, since a signal from outside comes at a time of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from permafrost.data.detection.config import CocoDataConfig, JitterConfig
from permafrost.data.detection.types import DetectionResult
from permafrost.data.worlds.config import ShapesDataConfig, ShapesWorld
from permafrost.heads.base import Head, world_mean_counts
from permafrost.heads.detection.config import BoxHeadConfig, MaskHeadConfig, MaskRCNNConfig, PoolingConfig, RPNConfig
from permafrost.heads.necks.config import FPNConfig
from permafrost.launcher.experiment import Experiment, HeadExperiment, LoopConfig, OptimizerConfig, ScheduleConfig
from permafrost.model.config import BackboneConfig

NUM_TRAIN = 12


@dataclasses.dataclass
class ProbeConfig(MaskRCNNConfig):
    """A small smooth head: rounding is not amplified, so that runs on other layouts can be compared."""

    def build(self, *, spec: Any, classes: Any) -> ProbeHead:
        return ProbeHead(spec.channels[-1])


class ProbeHead(Head):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 1)
        self.out = nn.Linear(8, 1)

    def forward(self, features, batch, counts=world_mean_counts) -> dict[str, torch.Tensor] | list[DetectionResult]:
        output = self.out(torch.tanh(self.conv(features[-1].float())).mean((2, 3)))[:, 0]
        if not self.training:
            none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
            empty = {**none, "masks": torch.zeros(0, 4, 4)}
            return [
                DetectionResult(t.image_id, **empty, size=t.size, original_size=t.original_size) for t in batch.targets
            ]
        wanted = torch.tensor([float(len(target.boxes)) for target in batch.targets])
        return {"loss_probe": (wanted * (output - wanted) ** 2).sum() / counts("objects", wanted.sum())}


def tiny() -> Experiment:
    """Mask R-CNN of 35 thousand parameters on a random nano SwinV2, images of 64 pixels."""
    head = MaskRCNNConfig(
        neck=FPNConfig(channels=16),
        rpn=RPNConfig(
            num_samples=32, num_pre_nms_train=60, num_pre_nms_test=30, num_proposals_train=30, num_proposals_test=15
        ),
        pooling=PoolingConfig(sampling_ratio=1, canonical_size=64),
        box=BoxHeadConfig(num_samples=32, fc_channels=16, num_detections=8, score_threshold=0.02),
        mask=MaskHeadConfig(num_convs=1, channels=8, resolution=7),
    )
    return Experiment(
        name="tiny",
        backbone=BackboneConfig(name="swinv2_nano", weights="random"),
        data=ShapesDataConfig(
            image_size=64,
            world=ShapesWorld(num_train=NUM_TRAIN, num_val=5, image_side=64, objects=(1, 4)),
            jitter=JitterConfig(scale_range=(0.7, 1.3)),
        ),
        heads={
            "detection": HeadExperiment(
                model=head,
                optimizer=OptimizerConfig(learning_rate=2e-3, reference_batch=4, clip_norm=10.0),
                schedule=ScheduleConfig(warmup_steps=2),
            )
        },
        loop=LoopConfig(
            num_steps=8,
            global_batch=4,
            num_workers=0,
            log_every=1,
            checkpoint_every=2,
            image_every=0,
            keep_checkpoints=20,
            process_group_timeout=60.0,
        ),
    )


def smooth() -> Experiment:
    """The smooth head alone."""
    experiment = tiny()
    head = HeadExperiment(
        model=ProbeConfig(),
        optimizer=OptimizerConfig(learning_rate=2e-3, reference_batch=4),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0),
    )
    return dataclasses.replace(experiment, name="smooth", heads={"probe": head})


def on_disk() -> Experiment:
    """The smooth head on files of the user's own, below the current folder."""
    experiment = smooth()
    data = CocoDataConfig(root="world", image_size=64, jitter=JitterConfig(scale_range=(1.0, 1.0)))
    return dataclasses.replace(experiment, name="on_disk", data=data)


def endless() -> Experiment:
    """So many steps that something has to end it."""
    experiment = smooth()
    experiment.loop = dataclasses.replace(experiment.loop, num_steps=1_000_000, checkpoint_every=100_000, log_every=10)
    return experiment


def deed(fault: dict[str, Any]) -> Callable[[], None]:
    """Return what happens when the moment has come."""

    def act() -> None:
        if fault["do"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault["do"] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault["do"] == "signal":
            os.kill(os.getpid(), getattr(signal, fault["name"]))
            time.sleep(0.2)  # until the thread that notes it has done so
        elif fault["do"] == "raise":
            raise KeyError("the odd one")
        elif fault["do"] == "remove":
            os.remove(fault["path"])
        elif fault["do"] == "sleep":
            time.sleep(fault["seconds"])
        else:
            raise AssertionError(fault)

    return act


def hook(owner: Any, name: str, act: Callable[[], None], number: int, *, after: bool = False) -> None:
    """Act before the number-th call of a function, or after it."""
    original, calls = getattr(owner, name), []

    def wrapped(*arguments: Any, **fields: Any) -> Any:
        calls.append(None)
        if len(calls) == number and not after:
            act()
        result = original(*arguments, **fields)
        if len(calls) == number and after:
            act()
        return result

    setattr(owner, name, wrapped)


def prepare(fault: dict[str, Any]) -> None:
    """Put a fault into this process."""
    if fault.get("rank", 0) != int(os.environ.get("RANK", 0)):
        return
    import permafrost.launcher.run.checkpoint as checkpoint
    import permafrost.launcher.run.scoring as scoring
    import permafrost.launcher.run.session as session
    import permafrost.launcher.train as loop

    places = {
        # The heads' step of the number-th step, before anything is reduced.
        "step": (loop, "head_losses"),
        # The main rank has every rank's results and scores them, which the others wait for.
        "score": (scoring, "_score"),
        "evaluate": (session, "evaluate_heads"),
        # Points of a save: nothing written, the tensors' files written, the folder complete under its other name, the
        # folder in its place but `latest` at the one before.
        "save_begins": (checkpoint, "_write_folder"),
        "save_tensors": (checkpoint, "_digest"),
        "save_complete": (checkpoint, "_write_folder"),
        # Called for state.json and then, with the folder in its place, for `latest`.
        "save_renamed": (checkpoint, "write_atomically"),
    }
    hook(*places[fault["at"]], deed(fault), fault.get("number", 1), after=fault["at"] == "save_complete")


def record_samples(folder: Path) -> None:
    """Write down the keys of every step's samples: rank_0, rank_1, ... in a folder."""
    import permafrost.launcher.train as loop

    original, file = loop.head_losses, folder / f"rank_{os.environ.get('RANK', '0')}"

    def wrapped(engine: Any, features: Any, micro_batches: Any, *more: Any) -> Any:
        keys = [[key.epoch, key.index] for batch in micro_batches for key in batch.keys]
        with file.open("a") as lines:
            lines.write(json.dumps(keys) + "\n")
        return original(engine, features, micro_batches, *more)

    loop.head_losses = wrapped


def forget() -> None:
    """Let this start pass over its checkpoints, as if there were none."""
    import permafrost.launcher.train as loop

    loop.load_newest = lambda run: (None, [])


if os.environ.get("FORGET"):
    forget()
if os.environ.get("SAMPLES"):
    record_samples(Path(os.environ["SAMPLES"]))
if os.environ.get("FAULT"):
    prepare(json.loads(os.environ["FAULT"]))
