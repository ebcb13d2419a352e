"""Build live objects from an Experiment's values: data, backbone, heads, so that a user's mistake shows up soonest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from permafrost.data.build import train_set, val_set
from permafrost.heads.build import build_head
from permafrost.launcher.errors import RecipeError
from permafrost.launcher.experiment import Experiment
from permafrost.launcher.ranks.agreement import require_agreement
from permafrost.launcher.ranks.process_group import ProcessGroup
from permafrost.launcher.run.fine_tune import ImagesOn, join
from permafrost.model.build import build_backbone as build_network
from permafrost.model.trainable import TrainableBackbone

if TYPE_CHECKING:
    from permafrost.data.task import TaskDataset
    from permafrost.heads.base import Head
    from permafrost.model.frozen import FrozenBackbone
    from permafrost.model.spec import FeatureSpec


@dataclass
class TrainingParts:
    """Parts of a training, before engines take the heads over.

    In full fine-tuning the one head owns the backbone too, and `backbone` hands it the images.
    """

    train_set: TaskDataset
    val_set: TaskDataset
    backbone: FrozenBackbone | ImagesOn
    heads: dict[str, Head]


def build_parts(experiment: Experiment, group: ProcessGroup) -> TrainingParts:
    """Build data sets, backbone and freshly initialised heads; collective, and the same on every rank.

    Raises:
        DataError, WeightsError, BackboneError, HeadError: what cannot be built, on every rank.
        RecipeError: the two splits have different classes.
        LaunchError: the ranks do not see the same data or weights.
    """
    # A built-in world is written by the main rank; the others find it there.
    training = group.main_first(lambda: train_set(experiment.data))
    validation = group.main_first(lambda: val_set(experiment.data))
    if list(training.classes) != list(validation.classes):
        raise RecipeError(
            f"data: the training annotations have the classes {', '.join(training.classes)}, the validation "
            f"annotations {', '.join(validation.classes)}: they must be the same, in the same order of category ids"
        )
    backbone = build_backbone(experiment, group, experiment.mesh.tensor)
    require_agreement(
        group,
        {
            "training set": training.fingerprint,
            "validation set": validation.fingerprint,
            "backbone": backbone.fingerprint,
        },
    )
    return TrainingParts(training, validation, *join_heads(experiment, backbone, training.classes))


def build_backbone(experiment: Experiment, group: ProcessGroup, tensor: int) -> FrozenBackbone | TrainableBackbone:
    """Build the network, split over tensor groups of this many ranks; 1: whole on every rank. Collective.

    Raises:
        WeightsError, BackboneError: what cannot be loaded on any rank, on every rank.
        LaunchError: the world does not divide into tensor groups.
    """
    tensor_group = group.tensor_group(tensor)
    return group.on_all(lambda: build_network(experiment.backbone, group.device, tensor_group=tensor_group))


def join_heads(
    experiment: Experiment, backbone: FrozenBackbone | TrainableBackbone, classes: Sequence[str]
) -> tuple[FrozenBackbone | ImagesOn, dict[str, Head]]:
    """Return what gives the features, the backbone if it is frozen (else run/fine_tune.py's), and every head with its initial weights."""
    heads = build_heads(experiment, backbone.spec, classes)
    if isinstance(backbone, TrainableBackbone):
        return join(backbone, heads, learning_rate_factor=experiment.backbone.learning_rate_factor)
    return backbone, heads


def build_heads(experiment: Experiment, spec: FeatureSpec, classes: Sequence[str]) -> dict[str, Head]:
    """Build every head of the experiment with its initial weights.

    These are a function of the run's seed and the head's name alone: a head that trains beside others starts as it
    would by itself.
    """
    heads = {}
    for name, config in experiment.heads.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(experiment.loop.seed, name))
            heads[name] = build_head(config.model, spec=spec, classes=list(classes))
    return heads


def seed_of(seed: int, purpose: str) -> int:
    """Return a seed of its own for a named purpose."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") & (2**63 - 1)
