"""Try action recognition: minutes on two CPU cores, nothing downloaded."""

from __future__ import annotations

from permafrost.data import MotionDataConfig
from permafrost.heads import GlobalVideoConfig
from permafrost.launcher import Experiment, HeadExperiment, LoopConfig, OptimizerConfig, ScheduleConfig
from permafrost.model import BackboneConfig


def quickstart_video() -> Experiment:
    """Two global blocks on the frozen, pretrained nano SwinV2, over the built-in world `motion`: ten classes of short videos.

        permafrost train quickstart_video

    Hardware: two CPU cores, 4 GB of memory. docs/evidence.md has the measured time and accuracy, and the random twin beside it.
    """
    return Experiment(
        name="quickstart_video",
        backbone=BackboneConfig(name="swinv2_nano", weights="swinv2_nano_glyphs"),
        data=MotionDataConfig(),
        heads={
            "video": HeadExperiment(
                # Fixed waves: learned tables begin small and tell the order of frames later than this run is long.
                model=GlobalVideoConfig(
                    position="sincos", num_blocks=2, width=128, head_channels=32, num_frames=8, map_side=2, dropout=0.1
                ),
                optimizer=OptimizerConfig(learning_rate=1e-3, reference_batch=16, weight_decay=0.05, clip_norm=1.0),
                schedule=ScheduleConfig(kind="cosine", warmup_steps=20),
            )
        },
        loop=LoopConfig(
            num_steps=500,
            global_batch=16,
            num_workers=1,
            log_every=20,
            checkpoint_every=250,
            image_every=250,
            evaluation_batch=16,
        ),
    )


def random_weights() -> Experiment:
    """The quickstart's twin on the same network frozen at random weights.

        permafrost train quickstart_video:random_weights

    Hardware: as the quickstart. What the head alone can learn; docs/evidence.md has the measured accuracy.
    """
    experiment = quickstart_video()
    experiment.name = "quickstart_video_random"
    experiment.backbone = BackboneConfig(name="swinv2_nano", weights="random")
    return experiment
