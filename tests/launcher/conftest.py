"""A tiny run for the tests of the launcher: random nano backbone, a world of 64-pixel images, a Mask R-CNN of 35
thousand parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from permafrost.data.detection.config import JitterConfig
from permafrost.data.worlds.config import ShapesDataConfig, ShapesWorld
from permafrost.heads.detection.config import BoxHeadConfig, MaskHeadConfig, MaskRCNNConfig, PoolingConfig, RPNConfig
from permafrost.heads.necks.config import FPNConfig
from permafrost.launcher.experiment import Experiment, HeadExperiment, LoopConfig, OptimizerConfig, ScheduleConfig
from permafrost.model.config import BackboneConfig

TINY_HEAD = MaskRCNNConfig(
    neck=FPNConfig(channels=16),
    rpn=RPNConfig(
        num_samples=32, num_pre_nms_train=60, num_pre_nms_test=30, num_proposals_train=30, num_proposals_test=15
    ),
    pooling=PoolingConfig(sampling_ratio=1, canonical_size=64),
    box=BoxHeadConfig(num_samples=32, fc_channels=16, num_detections=8, score_threshold=0.02),
    mask=MaskHeadConfig(num_convs=1, channels=8, resolution=7),
)
NUM_TRAIN = 12


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Experiment]:
    """tiny(output="run", num_steps=..., heads=..., **loop fields): a complete experiment; it trains in well under a
    second."""

    def build(
        output: str | None = "run",
        *,
        heads: dict[str, HeadExperiment] | None = None,
        data: ShapesDataConfig | None = None,
        backbone: BackboneConfig | None = None,
        **loop: object,
    ) -> Experiment:
        defaults = {
            "num_steps": 8,
            "global_batch": 2,
            "num_workers": 0,
            "log_every": 1,
            "checkpoint_every": 4,
            "image_every": 0,
            "evaluation_batch": 2,
        }
        return Experiment(
            name="tiny",
            backbone=backbone or BackboneConfig(name="swinv2_nano", weights="random"),
            data=data or tiny_data(),
            heads=heads or {"detection": tiny_head()},
            loop=LoopConfig(**{**defaults, **loop}),
            output=None if output is None else str(tmp_path / output),
        )

    return build


def tiny_data(**fields: object) -> ShapesDataConfig:
    world = ShapesWorld(num_train=NUM_TRAIN, num_val=5, image_side=64, objects=(1, 4))
    return ShapesDataConfig(
        **{"image_size": 64, "world": world, "jitter": JitterConfig(scale_range=(0.7, 1.3)), **fields}
    )


def tiny_head(model: MaskRCNNConfig | None = None, **optimizer: object) -> HeadExperiment:
    return HeadExperiment(
        model=model or dataclasses.replace(TINY_HEAD),
        optimizer=OptimizerConfig(**{"learning_rate": 2e-3, "reference_batch": 4, "clip_norm": 10.0, **optimizer}),
        schedule=ScheduleConfig(warmup_steps=2, milestones=(0.5, 0.75)),
    )


@pytest.fixture
def make_head() -> Callable[..., HeadExperiment]:
    """make_head(model=None, **optimizer fields)."""
    return tiny_head


@pytest.fixture
def make_data() -> Callable[..., ShapesDataConfig]:
    """make_data(**fields of ShapesDataConfig)."""
    return tiny_data
