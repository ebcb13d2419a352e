"""What the recipes of the paper's tables are varied with."""

from __future__ import annotations

from permafrost.configs.coco import swinv2_base_fpn
from permafrost.heads import MaskRCNNConfig, NeckConfig
from permafrost.launcher import Experiment
from permafrost.model import BackboneConfig

FULL_DROP_PATH = {"swinv2_tiny": 0.2, "swinv2_base": 0.3, "swinv2_large": 0.3}
"""Of the Swin papers' detection recipes; the large size takes the base's, a choice of ours."""


def row(
    name: str, base: Experiment, *, model: MaskRCNNConfig | None = None, neck: NeckConfig | None = None
) -> Experiment:
    """A variant of a recipe under another name, with another head or neck."""
    base.name = f"paper_{name}"
    head = base.heads["detection"]
    head.model = model or head.model
    head.model.neck = neck or head.model.neck
    return base


def full(name: str, base: Experiment) -> Experiment:
    """The full fine-tuning twin: the backbone learns at the head's rate."""
    base.backbone = fine_tuned(base.backbone)
    return row(name, base)


def fine_tuned(frozen: BackboneConfig, *, learning_rate_factor: float = 1.0) -> BackboneConfig:
    """The same network, learning, with the drop path of its size and activations computed again."""
    return BackboneConfig(
        name=frozen.name,
        weights=frozen.weights,
        window_size=frozen.window_size,
        weights_key=frozen.weights_key,
        frozen=False,
        drop_path_rate=FULL_DROP_PATH[frozen.name],
        learning_rate_factor=learning_rate_factor,
        checkpoint_activations=True,
    )


def pretrained(name: str, weights: str, *, backbone: str = "swinv2_base", window: int = 7) -> Experiment:
    """Mask R-CNN with FPN on other weights."""
    experiment = row(name, swinv2_base_fpn())
    experiment.backbone = BackboneConfig(name=backbone, weights=weights, window_size=window)
    return experiment


def share(name: str, base: Experiment, part: float) -> Experiment:
    """Trained on an exact share of the images, as often through each of them. The paper's schedule here is not published."""
    base.data.train_share = part
    images = base.loop.num_steps * base.loop.global_batch
    base.loop.num_steps = max(1, round(images * part / base.loop.global_batch))
    base.loop.evaluate_every = max(1, base.loop.num_steps // 6)
    base.loop.checkpoint_every = min(base.loop.checkpoint_every, base.loop.evaluate_every)
    schedule = base.heads["detection"].schedule
    schedule.warmup_steps = min(schedule.warmup_steps, base.loop.num_steps // 10)
    return row(name, base)
