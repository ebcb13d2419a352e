"""The recipe of the run in run/, which was written at commit e418ddf: the smallest that trains."""

from __future__ import annotations

from permafrost.data import JitterConfig, ShapesDataConfig, ShapesWorld
from permafrost.heads import BoxHeadConfig, FPNConfig, MaskHeadConfig, MaskRCNNConfig, PoolingConfig, RPNConfig
from permafrost.launcher import Experiment, HeadExperiment, LoopConfig, OptimizerConfig, ScheduleConfig
from permafrost.model import BackboneConfig


def before() -> Experiment:
    """Mask R-CNN of 9,312 parameters on the nano SwinV2, images of 64 pixels."""
    head = MaskRCNNConfig(
        neck=FPNConfig(channels=8),
        rpn=RPNConfig(num_pre_nms_train=60, num_pre_nms_test=30, num_proposals_train=30, num_proposals_test=15),
        pooling=PoolingConfig(sampling_ratio=1, canonical_size=64),
        box=BoxHeadConfig(resolution=3, num_samples=32, fc_channels=8, num_detections=8, score_threshold=0.02),
        mask=MaskHeadConfig(num_convs=1, channels=4, resolution=7),
    )
    return Experiment(
        name="before",
        backbone=BackboneConfig(name="swinv2_nano", weights="swinv2_nano_glyphs"),
        data=ShapesDataConfig(
            image_size=64,
            world=ShapesWorld(num_train=12, num_val=5, image_side=96, objects=(1, 4)),
            jitter=JitterConfig(scale_range=(0.7, 1.3)),
        ),
        heads={
            "detection": HeadExperiment(
                model=head,
                optimizer=OptimizerConfig(learning_rate=2e-3, reference_batch=4, clip_norm=10.0),
                schedule=ScheduleConfig(warmup_steps=2),
            )
        },
        loop=LoopConfig(num_steps=4, global_batch=2, num_workers=0, log_every=1, checkpoint_every=2, image_every=0),
    )
