"""Try semantic segmentation: minutes on two CPU cores, nothing downloaded."""

from __future__ import annotations

from permafrost.data import SceneryDataConfig, SceneryWorld, SegmentationJitterConfig
from permafrost.heads import Mask2FormerConfig, PixelDecoderConfig, SegmentationLossConfig, TransformerDecoderConfig
from permafrost.launcher import Experiment, HeadExperiment, LoopConfig, OptimizerConfig, ScheduleConfig
from permafrost.model import BackboneConfig


def quickstart_segmentation() -> Experiment:
    """Mask2Former on the frozen, pretrained nano SwinV2, over the built-in world `scenery`.

        permafrost train quickstart_segmentation

    Hardware: two CPU cores, 4 GB of memory. docs/evidence.md has the measured time and mIoU, and the random twin beside it.
    """
    # The backbone was pretrained to name outlines whatever their fill: objects and textures are large and clear, so that this short
    # a run tells them apart.
    world = SceneryWorld(
        num_train=2000,
        num_val=200,
        image_side=128,
        objects=(1, 2),
        object_size=(0.35, 0.6),
        min_visible=0.8,
        stretch=1.0,
        rotation=0.0,
        contrast=0.5,
        background_contrast=1.0,
        textured_share=0.0,
        clutter=0,
        crowd_share=0.0,
        regions=(1, 2),
    )
    head = Mask2FormerConfig(
        pixel_decoder=PixelDecoderConfig(num_blocks=1, channels=64, num_heads=4, ffn_channels=128),
        transformer_decoder=TransformerDecoderConfig(num_blocks=3, num_queries=16, num_heads=4, ffn_channels=256),
        loss=SegmentationLossConfig(class_weight=4.0, num_points=512),
    )
    return Experiment(
        name="quickstart_segmentation",
        backbone=BackboneConfig(name="swinv2_nano", weights="swinv2_nano_glyphs"),
        data=SceneryDataConfig(
            image_size=128,
            jitter=SegmentationJitterConfig(scale_range=(1.0, 1.25), color_probability=0.0),
            world=world,
        ),
        heads={
            "segmentation": HeadExperiment(
                model=head,
                optimizer=OptimizerConfig(learning_rate=1e-3, reference_batch=8, weight_decay=0.05, clip_norm=1.0),
                schedule=ScheduleConfig(kind="poly", warmup_steps=20),
            )
        },
        loop=LoopConfig(
            num_steps=1500,
            global_batch=8,
            num_workers=1,
            log_every=20,
            checkpoint_every=500,
            image_every=500,
            evaluation_batch=8,
        ),
    )


def random_weights() -> Experiment:
    """The quickstart's twin on the same network frozen at random weights.

        permafrost train quickstart_segmentation:random_weights

    Hardware: as the quickstart. What the head alone can learn; docs/evidence.md has the measured mIoU.
    """
    experiment = quickstart_segmentation()
    experiment.name = "quickstart_segmentation_random"
    experiment.backbone = BackboneConfig(name="swinv2_nano", weights="random")
    return experiment
