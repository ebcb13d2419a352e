"""A trained run put back together from its folder: backbone, heads with their weights, nothing that trains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from permafrost.heads.base import LossCounts, world_mean_counts
from permafrost.launcher.engines.base import autocast, resolve_precision
from permafrost.launcher.errors import CheckpointError
from permafrost.launcher.run.checkpoint import Checkpoint, load_head
from permafrost.launcher.run.folder import RunFolder
from permafrost.launcher.run.parts import build_backbone, join_heads

if TYPE_CHECKING:
    from permafrost.data.types import Batch
    from permafrost.heads.base import Head
    from permafrost.launcher.experiment import Experiment
    from permafrost.launcher.ranks.process_group import ProcessGroup
    from permafrost.launcher.run.fine_tune import ImagesOn
    from permafrost.model.frozen import FrozenBackbone


class HeadRunner:
    """A head in evaluation, called as an engine is: same autocast, no optimizer, no collectives."""

    def __init__(self, head: Head, *, precision: str, device: torch.device) -> None:
        self.head = head.to(device).eval()
        self.precision = resolve_precision(precision, device.type)
        self._device_type = device.type

    def train(self, mode: bool = True) -> None:
        """It stays in evaluation: there is nothing to train it with."""

    @torch.no_grad()
    def __call__(self, features: Sequence[Tensor], batch: Batch, counts: LossCounts = world_mean_counts) -> list[Any]:
        """One result per image."""
        with autocast(self.precision, self._device_type):
            return self.head(features, batch, counts)


@dataclass
class TrainedRun:
    """What `load_trained` found.

    Attributes:
        folder: where it was read from.
        experiment: what was trained.
        backbone: verified to be the one the heads were trained on, or, if it was fine-tuned, started from.
        heads: by name, ready to be called.
        checkpoints: the folder each head's weights came from, by name.
        steps: after how many steps they were saved.
        classes: in the order of the heads' labels.
        category_ids: the data set's own numbers of those classes.
    """

    folder: RunFolder
    experiment: Experiment
    backbone: FrozenBackbone | ImagesOn
    heads: dict[str, HeadRunner]
    checkpoints: dict[str, str]
    steps: dict[str, int]
    classes: list[str]
    category_ids: list[int]


def load_trained(
    run: str | os.PathLike[str], group: ProcessGroup, *, heads: Sequence[str] | None = None, which: str = "best"
) -> TrainedRun:
    """Rebuild a run from its folder. Collective.

    Several processes split the backbone over tensor groups as the run did; a single process has all of it, whatever the
    run had.

    Args:
        run: the run folder.
        group: whose device the heads and the backbone go to.
        heads: names; None takes all of the recipe.
        which: "best" (of each head, by its metric) or "latest".

    Raises:
        RunFolderError: the folder holds no run.
        CheckpointError: no such head, no valid checkpoint, or one of another backbone or head.
        LaunchError: the processes do not divide into the run's tensor groups.
    """
    folder = RunFolder(run)
    experiment = group.on_main(folder.experiment)
    names = list(experiment.heads) if heads is None else list(heads)
    unknown = [name for name in names if name not in experiment.heads]
    if unknown:
        raise CheckpointError(f"{folder} has no head {', '.join(unknown)}: it trains {', '.join(experiment.heads)}")
    tensor = experiment.mesh.tensor if group.world_size > 1 else 1
    group.require_mesh(tensor)
    # Read before the backbone is built: what is missing here shows at once.
    found = group.on_main(lambda: {name: load_head(folder.path, name, which) for name in names})
    first = next(iter(found.values()))
    backbone, built = join_heads(experiment, build_backbone(experiment, group, tensor), first.state.classes)
    for name, checkpoint in found.items():
        _restore(built[name], name, checkpoint, backbone, experiment)
    precision = experiment.engine.precision
    return TrainedRun(
        folder=folder,
        experiment=experiment,
        backbone=backbone,
        heads={name: HeadRunner(built[name], precision=precision, device=group.device) for name in names},
        checkpoints={name: str(checkpoint.path) for name, checkpoint in found.items()},
        steps={name: checkpoint.state.step for name, checkpoint in found.items()},
        classes=first.state.classes,
        category_ids=first.state.category_ids,
    )


def _restore(
    head: Head, name: str, checkpoint: Checkpoint, backbone: FrozenBackbone | ImagesOn, experiment: Experiment
) -> None:
    checkpoint.require_backbone(name=experiment.backbone.name, fingerprint=backbone.fingerprint)
    checkpoint.require_fit({name: head})
    state = checkpoint.heads[name]
    head.load_state_dict(state.weights | state.buffers)
