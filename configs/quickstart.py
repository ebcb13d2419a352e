"""Try Permafrost: minutes on two CPU cores, nothing downloaded."""

from __future__ import annotations

from permafrost.data import JitterConfig, ShapesDataConfig, ShapesWorld
from permafrost.heads import BoxHeadConfig, FPNConfig, MaskHeadConfig, MaskRCNNConfig, PoolingConfig, RPNConfig
from permafrost.launcher import Experiment, HeadExperiment, LoopConfig, OptimizerConfig, ScheduleConfig
from permafrost.model import BackboneConfig


def quickstart() -> Experiment:
    """Mask R-CNN with FPN on the frozen, pretrained nano SwinV2, over the built-in world `shapes`.

        permafrost train quickstart

    Hardware: two CPU cores, 4 GB of memory. docs/evidence.md has the measured time, box and mask AP, and the random twin beside them.
    """
    # Objects of 24 to 72 pixels: anchors of 16 to 128 on strides 4 to 32, boxes of 48 to 96 pixels pooled at stride 8.
    head = MaskRCNNConfig(
        neck=FPNConfig(channels=64, num_extra_levels=0),
        rpn=RPNConfig(
            anchor_scale=4.0,
            num_samples=64,
            num_pre_nms_train=200,
            num_pre_nms_test=100,
            num_proposals_train=100,
            num_proposals_test=60,
        ),
        pooling=PoolingConfig(sampling_ratio=2, canonical_size=128.0),
        box=BoxHeadConfig(fc_channels=256, num_samples=64, num_detections=30),
        mask=MaskHeadConfig(num_convs=2, channels=64),
    )
    return Experiment(
        name="quickstart",
        backbone=BackboneConfig(name="swinv2_nano", weights="swinv2_nano_glyphs"),
        data=ShapesDataConfig(
            image_size=160,
            jitter=JitterConfig(scale_range=(0.7, 1.4), flip=0.5),
            world=ShapesWorld(num_train=2000, num_val=300, image_side=160),
        ),
        heads={
            "detection": HeadExperiment(
                model=head,
                optimizer=OptimizerConfig(learning_rate=1e-3, reference_batch=8, weight_decay=0.05, clip_norm=5.0),
                schedule=ScheduleConfig(kind="cosine", warmup_steps=40),
            )
        },
        loop=LoopConfig(
            num_steps=900,
            global_batch=8,
            num_workers=1,
            log_every=20,
            checkpoint_every=300,
            image_every=300,
            evaluation_batch=10,
        ),
    )
