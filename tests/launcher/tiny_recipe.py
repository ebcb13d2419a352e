"""A user's own recipe file, of seconds: what the tests of the command line train, evaluate and predict with."""

from __future__ import annotations

from permafrost.data import JitterConfig, ShapesDataConfig, ShapesWorld
from permafrost.heads import BoxHeadConfig, FPNConfig, MaskHeadConfig, MaskRCNNConfig, PoolingConfig, RPNConfig
from permafrost.launcher import Experiment, HeadExperiment, LoopConfig, OptimizerConfig, ScheduleConfig
from permafrost.model import BackboneConfig


def tiny() -> Experiment:
    """Mask R-CNN of 35 thousand parameters on a random nano SwinV2, images of 64 pixels."""
    head = MaskRCNNConfig(
        neck=FPNConfig(channels=16),
        rpn=RPNConfig(num_pre_nms_train=60, num_pre_nms_test=30, num_proposals_train=30, num_proposals_test=15),
        pooling=PoolingConfig(sampling_ratio=1, canonical_size=64),
        box=BoxHeadConfig(num_samples=32, fc_channels=16, num_detections=8, score_threshold=0.02),
        mask=MaskHeadConfig(num_convs=1, channels=8, resolution=7),
    )
    detection = HeadExperiment(
        model=head,
        optimizer=OptimizerConfig(learning_rate=2e-3, reference_batch=4, clip_norm=10.0),
        schedule=ScheduleConfig(warmup_steps=2),
    )
    return Experiment(
        name="tiny",
        backbone=BackboneConfig(name="swinv2_nano", weights="random"),
        data=ShapesDataConfig(
            image_size=64,
            world=ShapesWorld(num_train=12, num_val=5, image_side=96, objects=(1, 4)),
            jitter=JitterConfig(scale_range=(0.7, 1.3)),
        ),
        heads={"detection": detection},
        loop=LoopConfig(num_steps=4, global_batch=2, num_workers=0, log_every=1, checkpoint_every=2, image_every=2),
    )


def two_heads() -> Experiment:
    """The same with a second head on the same forward."""
    experiment = tiny()
    experiment.name = "two_heads"
    experiment.heads["second"] = tiny().heads["detection"]
    return experiment
