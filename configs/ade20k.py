"""Train on ADE20K: the SceneParsing release (ADEChallengeData2016.zip) under data/ADEChallengeData2016."""

from __future__ import annotations

from permafrost.data import ADE20KDataConfig
from permafrost.heads import Mask2FormerConfig, PixelDecoderConfig, TransformerDecoderConfig
from permafrost.launcher import Experiment, HeadExperiment, LoopConfig, OptimizerConfig, ScheduleConfig
from permafrost.model import BackboneConfig


def swinv2_base_mask2former() -> Experiment:
    """Mask2Former, one pixel-decoder block and (3 + 1) predictions, on frozen SwinV2-B (ImageNet-22K): Table 3, first row, 51.0 mIoU.

        deepspeed --num_gpus 8 --module permafrost.launcher.train ade20k:swinv2_base_mask2former --data.root /path/to/ADEChallengeData2016

    Hardware: planned for 8 GPUs of 40 GB or more, 2 images each; not measured. 160,000 steps, 127 epochs of 20,210 images.
    Weights: swinv2_base_patch4_window12_192_22k.pth of the Swin Transformer release, in the current folder (a field).
    Published: on the validation split, probably multi-scale (Figure 1 says so of ADE20K). The run is scored at one scale;
    `permafrost evaluate RUN --scales 0.5 0.75 1 1.25 1.5 1.75 --flip` scores it as the public multi-scale test does. The paper
    gives neither learning rate nor image size nor schedule: those are the public Mask2Former recipe's (AdamW 1e-4 at 16 images,
    weight decay 0.05, poly without warm-up, gradients clipped at 0.01, crops of 640 pixels). The window stays the checkpoint's 12
    (section 3.3).
    """
    batch = 16
    return Experiment(
        name="ade20k_swinv2_base_mask2former",
        backbone=BackboneConfig(name="swinv2_base", weights="swinv2_base_patch4_window12_192_22k.pth", window_size=12),
        data=ADE20KDataConfig(root="data/ADEChallengeData2016", image_size=640),
        heads={
            "segmentation": HeadExperiment(
                model=Mask2FormerConfig(
                    pixel_decoder=PixelDecoderConfig(num_blocks=1),
                    transformer_decoder=TransformerDecoderConfig(num_blocks=3),
                ),
                optimizer=OptimizerConfig(
                    learning_rate=1e-4,
                    reference_batch=batch,
                    weight_decay=0.05,
                    no_decay=("norm", "bias", "query_feat", "query_embed", "level_embed"),
                    clip_norm=0.01,
                ),
                schedule=ScheduleConfig(kind="poly", warmup_steps=0),
            )
        },
        loop=LoopConfig(num_steps=160_000, global_batch=batch, evaluate_every=20_000),
    )
