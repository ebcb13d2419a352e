"""Train on the 3 B SwinV2."""

from __future__ import annotations

from permafrost.configs.quickstart import quickstart
from permafrost.heads import FPNConfig, MaskRCNNConfig
from permafrost.launcher import EngineConfig, Experiment, LoopConfig, MeshConfig
from permafrost.model import BackboneConfig


def smoke() -> Experiment:
    """Everything at once on two processes: the 3 B SwinV2 in bfloat16, split in two, offload, a ZeRO 2 head; one step.

        python benchmarks/giant.py FOLDER
        deepspeed --num_gpus 2 --module permafrost.launcher.train giant:smoke --backbone.weights FOLDER

    Hardware: two CPU cores and 16 GB of memory, a minute and a half (or two GPUs of 12 GB, not tried). On the built-in
    world `shapes` at 192 pixels; its weights are random, so the detections are of no use.
    """
    experiment = quickstart()
    experiment.name = "giant_smoke"
    experiment.backbone = BackboneConfig(name="swinv2_giant", weights="random", dtype="bfloat16")
    experiment.data.image_size = 192
    experiment.data.max_val_images = 2
    experiment.heads["detection"].model = MaskRCNNConfig(neck=FPNConfig())
    experiment.engine = EngineConfig(kind="deepspeed", zero_stage=2, offload="all")
    experiment.mesh = MeshConfig(tensor=2)
    experiment.loop = LoopConfig(
        num_steps=1, global_batch=2, num_workers=0, log_every=1, checkpoint_every=1, image_every=0
    )
    return experiment
