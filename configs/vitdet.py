"""Train on frozen plain ViTs: one map of the last block, and a simple feature pyramid that is trained on it, as in ViTDet."""

from __future__ import annotations

from permafrost.configs.coco import swinv2_base_fpn
from permafrost.configs.quickstart import quickstart
from permafrost.data import ShapesWorld
from permafrost.heads import BoxHeadConfig, MaskHeadConfig, MaskRCNNConfig, RPNConfig, SimplePyramidConfig
from permafrost.launcher import Experiment, LoopConfig
from permafrost.model import BackboneConfig


def dinov2_small() -> Experiment:
    """Mask R-CNN with a simple feature pyramid on frozen DINOv2 ViT-S/14, COCO.

        deepspeed --num_gpus 8 --module permafrost.launcher.train vitdet:dinov2_small --data.root /path/to/coco

    Hardware: planned for 8 GPUs of 24 GB or more, 2 images each; not measured. 36 epochs of 118,287 images.
    Weights: timm's, fetched from its hub at the first run; `--backbone.weights FILE` reads them from a file instead.
    Not published: neither paper freezes this backbone under this head. Optimizer, schedule and augmentation are those of
    `coco:swinv2_base_fpn`; the proposal network has ViTDet's two convolutions; images are 1022 pixels, 73 whole patches.
    Others of the kind: `--backbone.name timm/vit_7b_patch16_dinov3 --data.image-size 1024`.
    """
    experiment = swinv2_base_fpn()
    experiment.name = "vitdet_dinov2_small"
    experiment.backbone = BackboneConfig(name="timm/vit_small_patch14_dinov2.lvd142m", weights="pretrained")
    experiment.data.image_size = 1022
    experiment.heads["detection"].model = MaskRCNNConfig(neck=SimplePyramidConfig(), rpn=RPNConfig(num_convs=2))
    return experiment


def debug() -> Experiment:
    """The code path of `vitdet:dinov2_small` on the built-in world `shapes`, random weights: nothing is downloaded.

        permafrost train vitdet:debug

    Hardware: one CPU core and 2 GB of memory, about ten seconds. The detections are of no use.
    """
    experiment = quickstart()
    experiment.name = "vitdet_debug"
    experiment.backbone = BackboneConfig(name="timm/vit_small_patch14_dinov2", weights="random")
    experiment.data.image_size = 140
    experiment.data.world = ShapesWorld(num_train=32, num_val=8, image_side=140)
    head = experiment.heads["detection"].model
    head.neck = SimplePyramidConfig(channels=32)
    head.box = BoxHeadConfig(fc_channels=64, num_samples=32, num_detections=10)
    head.mask = MaskHeadConfig(num_convs=1, channels=32)
    experiment.heads["detection"].optimizer.reference_batch = 4
    experiment.heads["detection"].schedule.warmup_steps = 5
    experiment.loop = LoopConfig(
        num_steps=10,
        global_batch=4,
        num_workers=0,
        log_every=2,
        checkpoint_every=10,
        image_every=10,
        evaluation_batch=4,
    )
    return experiment
