"""Train on COCO 2017: images under data/coco in the official layout, annotations/instances_{train,val}2017.json beside them."""

from __future__ import annotations

from permafrost.data import CocoDataConfig, JitterConfig
from permafrost.heads import MaskRCNNConfig
from permafrost.launcher import Experiment, HeadExperiment, LoopConfig, OptimizerConfig, ScheduleConfig
from permafrost.model import BackboneConfig


def swinv2_base_fpn() -> Experiment:
    """Mask R-CNN with FPN on frozen SwinV2-B (ImageNet-22K): Table 2, first row, 45.0 box AP and 41.1 mask AP.

        deepspeed --num_gpus 8 --module permafrost.launcher.train coco:swinv2_base_fpn --data.root /path/to/coco

    Hardware: planned for 8 GPUs of 40 GB or more, 2 images each; not measured. 36 epochs of 118,287 images.
    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release, in the current folder (a field).
    Published: single scale, COCO val2017. The paper gives neither learning rate nor image size nor window; those here are the public
    Mask R-CNN recipe of the Swin papers (AdamW 1e-4 at 16 images, weight decay 0.05, 36 epochs, x0.1 at 27 and 33) with the paper's
    square crop of large-scale jitter at 1024 pixels. The window stays the checkpoint's 12 (section 3.3: larger images, same window).
    """
    num_images, num_epochs, batch = 118_287, 36, 16
    return Experiment(
        name="coco_swinv2_base_fpn",
        backbone=BackboneConfig(name="swinv2_base", weights="swinv2_base_patch4_window12_192_22k.pth", window_size=12),
        data=CocoDataConfig(
            root="data/coco",
            image_size=1024,
            # Two boxes of the official train2017 have no height.
            bad_annotations="drop",
            jitter=JitterConfig(scale_range=(0.1, 2.0)),
        ),
        heads={
            "detection": HeadExperiment(
                model=MaskRCNNConfig(),
                optimizer=OptimizerConfig(learning_rate=1e-4, reference_batch=batch, weight_decay=0.05),
                schedule=ScheduleConfig(kind="multistep", warmup_steps=500, milestones=(27 / 36, 33 / 36)),
            )
        },
        loop=LoopConfig(
            num_steps=num_images * num_epochs // batch, global_batch=batch, evaluate_every=num_images * 6 // batch
        ),
    )
