"""Train on Kinetics-400: lists, official CSVs or one folder per class under data/kinetics400 (see data/video/lists.py)."""

from __future__ import annotations

from permafrost.data import ClipConfig, KineticsDataConfig
from permafrost.heads import GlobalVideoConfig, LinearVideoConfig, TemporalVideoConfig
from permafrost.launcher import EngineConfig, Experiment, HeadExperiment, LoopConfig, OptimizerConfig, ScheduleConfig
from permafrost.model import BackboneConfig

NUM_VIDEOS = 240_000
"""Training videos, about (the paper, section 3.3); how many are still online differs."""


def swinv2_base_linear() -> Experiment:
    """A linear classifier on frozen SwinV2-B (ImageNet-22K), frame by frame: Table 4 and Table 1, 70.3 top-1.

        deepspeed --num_gpus 8 --module permafrost.launcher.train kinetics:swinv2_base_linear --data.root /path/to/kinetics400

    Hardware: planned for 8 GPUs of 40 GB or more, 8 clips each, 8 micro-batches a step; not measured. 30 epochs.
    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release, in the current folder (a field).
    The paper gives neither learning rate nor schedule nor clip length ("e.g., 16 frames per clip"): 16 frames, every fourth, each
    embedded by itself, are this project's choice (backbone.patch_frames 2 with data.clip.num_frames 32 and frame_stride 2 is
    Video-Swin's embedding of pairs, as many maps for twice the frames); the rest is the public Video-Swin recipe's (AdamW 3e-4, weight
    decay 0.05, 2.5 epochs of warm-up, cosine to 0, dropout 0.5, tests of 4 x 3 views at 224 pixels). Videos should be resized once
    (`permafrost resize-videos`).
    """
    batch = 512
    num_steps = 30 * NUM_VIDEOS // batch
    return Experiment(
        name="kinetics_swinv2_base_linear",
        backbone=BackboneConfig(
            name="swinv2_base",
            weights="swinv2_base_patch4_window12_192_22k.pth",
            window_size=12,
            max_images=64,
        ),
        data=KineticsDataConfig(clip=ClipConfig(num_frames=16, frame_stride=4)),
        heads={
            "video": HeadExperiment(
                model=LinearVideoConfig(),
                optimizer=OptimizerConfig(learning_rate=3e-4, reference_batch=batch, weight_decay=0.05),
                schedule=ScheduleConfig(kind="cosine", warmup_steps=num_steps // 12),
            )
        },
        engine=EngineConfig(accumulation=8),
        loop=LoopConfig(num_steps=num_steps, global_batch=batch, num_workers=12, evaluate_every=num_steps // 6),
    )


def swinv2_base_temporal() -> Experiment:
    """Four temporal blocks in place of the linear classifier alone: Table 4, 74.7 top-1.

        deepspeed --num_gpus 8 --module permafrost.launcher.train kinetics:swinv2_base_temporal --data.root /path/to/kinetics400

    Hardware and weights: as `kinetics:swinv2_base_linear`.
    """
    experiment = swinv2_base_linear()
    experiment.name = "kinetics_swinv2_base_temporal"
    experiment.heads["video"].model = TemporalVideoConfig()
    return experiment


def swinv2_base_global() -> Experiment:
    """Four global blocks in place of the linear classifier alone: Table 4, 77.5 top-1.

        deepspeed --num_gpus 8 --module permafrost.launcher.train kinetics:swinv2_base_global --data.root /path/to/kinetics400

    Hardware and weights: as `kinetics:swinv2_base_linear`.
    """
    experiment = swinv2_base_linear()
    experiment.name = "kinetics_swinv2_base_global"
    experiment.heads["video"].model = GlobalVideoConfig()
    return experiment
