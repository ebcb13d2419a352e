"""Put a trained run back together from its folder: backbone, heads with their weights, nothing that trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from permafrost.data.build import input_reader
from permafrost.data.errors import DataError
from permafrost.data.stream.loader import collate
from permafrost.heads.base import LossCounts, world_mean_counts
from permafrost.launcher.engines.base import autocast, resolve_precision
from permafrost.launcher.errors import CheckpointError
from permafrost.launcher.ranks.process_group import join_process_group
from permafrost.launcher.run.checkpoint import Checkpoint, load_head
from permafrost.launcher.run.folder import RunFolder
from permafrost.launcher.run.parts import build_backbone, join_heads

if TYPE_CHECKING:
    from permafrost.data.task import InputReader
    from permafrost.data.types import Batch, Sample
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
        """Stay in evaluation: there is nothing to train it with."""

    @torch.no_grad()
    def __call__(self, features: Sequence[Tensor], batch: Batch, counts: LossCounts = world_mean_counts) -> list[Any]:
        """Return one result per image."""
        with autocast(self.precision, self._device_type):
            return self.head(features, batch, counts)


@dataclass
class TrainedRun:
    """Trained run, as `load_trained` found it.

    Attributes:
        folder: where it was read from.
        experiment: what was trained.
        backbone: verified to be the one the heads were trained on, or, if it was fine-tuned, started from.
        heads: by name, ready to be called.
        checkpoints: the folder each head's weights came from, by name.
        steps: after how many steps they were saved.
        classes: in the order of the heads' labels.
        category_ids: the data set's own numbers of those classes.
        device: where backbone and heads are.
    """

    folder: RunFolder
    experiment: Experiment
    backbone: FrozenBackbone | ImagesOn
    heads: dict[str, HeadRunner]
    checkpoints: dict[str, str]
    steps: dict[str, int]
    classes: list[str]
    category_ids: list[int]
    device: torch.device

    @cached_property
    def reader(self) -> InputReader:
        """Return what reads inputs without labels for these heads."""
        return input_reader(self.experiment.data, self.classes, self.category_ids)

    def predict(
        self,
        images: Any,
        *,
        head: str | None = None,
        score_threshold: float | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """Return what a head finds in images (of a video run: in videos), seen as in evaluation.

        Args:
            images: a path, a PIL image, an (H, W, 3) RGB uint8 array or a (3, H, W) RGB uint8 tensor; or a list of them. A video is a
                path, a (T, H, W, 3) array or a (T, 3, H, W) tensor.
            head: which head; None when the run has one.
            score_threshold: what has a lower score is left out; None is the task's own.
            batch_size: images, views or clips in one forward; None is the recipe's `loop.evaluation_batch`. In a batch with larger
                ones an image is padded, which moves results by rounding.

        Returns:
            a typed result with class names in the input's own pixels, `data.Detections`, `data.ClassMap` or `data.VideoClass`; of a
            list a list, in its order.

        Raises:
            DataError: an input cannot be read; it is named by its file or its place in the list.
            CheckpointError: no such head, or the run has several and none is named.
        """
        several = isinstance(images, (list, tuple))
        found = [result for result, _ in self.look(images if several else [images], head, score_threshold, batch_size)]
        return found if several else found[0]

    def features(self, images: Any, *, batch_size: int | None = None) -> Any:
        """Return the frozen backbone's feature maps of images, as the run's heads see them.

        Args:
            images: as of `predict`.
            batch_size: as of `predict`.

        Returns:
            of an image a list of maps on the CPU, finest first, (V, C_i, H_i, W_i) in the backbone's dtype: V views, 1 unless the run's
            evaluation has several; of a clip (V, T, C_i, H_i, W_i). Of a list a list of such lists.

        Raises:
            DataError: as of `predict`.
        """

        def compute(batch: Batch) -> list[Any]:
            return list(zip(*(one.cpu() for one in self.backbone(batch.images))))

        several = isinstance(images, (list, tuple))
        computed = self._each(images if several else [images], compute, batch_size)
        found = [[torch.stack(maps) for maps in zip(*views)] for views, _ in computed]
        return found if several else found[0]

    def look(
        self,
        inputs: Sequence[Any],
        head: str | None = None,
        score_threshold: float | None = None,
        batch_size: int | None = None,
        *,
        first: int = 0,
    ) -> Iterator[tuple[Any, Any]]:
        """Yield what a head finds in each input, and what `reader.write` draws it on; arguments and errors as of `predict`.

        Args:
            inputs: a list of what `predict` takes.
            head: as of `predict`.
            score_threshold: as of `predict`.
            batch_size: as of `predict`.
            first: number of the first input, in results' ids.
        """
        runner = self._one_head(head)
        threshold = self.reader.threshold if score_threshold is None else score_threshold

        def compute(batch: Batch) -> list[Any]:
            return [result.cpu() for result in runner(self.backbone(batch.images), batch)]

        for results, source in self._each(inputs, compute, batch_size, first):
            yield self.reader.keep(results, threshold), source

    def _one_head(self, head: str | None) -> HeadRunner:
        if head is None and len(self.heads) > 1:
            raise CheckpointError(f"{self.folder} has the heads {', '.join(self.heads)}: name one")
        if head is not None and head not in self.heads:
            raise CheckpointError(f"{self.folder} has no head {head}: it has {', '.join(self.heads)}")
        return self.heads[next(iter(self.heads)) if head is None else head]

    def _each(
        self, inputs: Sequence[Any], compute: Callable[[Batch], list[Any]], batch_size: int | None, first: int = 0
    ) -> Iterator[tuple[list[Any], Any]]:
        """Yield the results of each input's samples, which are computed in batches, and what `reader.write` draws on."""
        size = self.experiment.loop.evaluation_batch if batch_size is None else batch_size
        if size < 1:
            raise DataError(f"batch_size is {size}: give at least 1")
        waiting: list[tuple[Any, int]] = []
        samples: list[Sample] = []
        results: list[Any] = []
        for position, given in enumerate(inputs):
            try:
                own, source = self.reader.read(given, first + position)
            except DataError as error:
                if isinstance(given, (str, os.PathLike)):
                    raise
                raise DataError(f"{f'images[{position}]' if len(inputs) > 1 else 'the image'}: {error}") from error
            waiting.append((source, len(own)))
            samples += own
            while len(samples) >= size or (samples and position == len(inputs) - 1):
                with torch.no_grad():
                    results += compute(collate(samples[:size]).to(self.device))
                del samples[:size]
            while waiting and len(results) >= waiting[0][1]:
                source, count = waiting.pop(0)
                yield results[:count], source
                del results[:count]


def load_run(
    folder: str | os.PathLike[str], *, head: str | None = None, which: str = "best", device: str = "auto"
) -> TrainedRun:
    """Load a trained run for predictions: backbone and heads are built once and kept.

    Args:
        folder: the run folder, as `permafrost train` printed it.
        head: one head; None takes all of them.
        which: "best" (of each head, by its metric) or "latest" checkpoint.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        RunFolderError: the folder holds no run.
        CheckpointError: no such head, no valid checkpoint, or one of another backbone or head.
        WeightsError: the backbone's weights cannot be found or read.
    """
    return load_trained(folder, join_process_group(device), heads=None if head is None else [head], which=which)


def load_trained(
    run: str | os.PathLike[str] | RunFolder,
    group: ProcessGroup,
    *,
    heads: Sequence[str] | None = None,
    which: str = "best",
) -> TrainedRun:
    """Rebuild a run from its folder. Collective.

    Several processes split the backbone over tensor groups as the run did; a single process has all of it, whatever the
    run had.

    Args:
        run: the run folder; of a RunFolder that has read its recipe it is not read again.
        group: whose device the heads and the backbone go to.
        heads: names; None takes all of the recipe.
        which: "best" (of each head, by its metric) or "latest".

    Raises:
        RunFolderError: the folder holds no run.
        CheckpointError: no such head, no valid checkpoint, or one of another backbone or head.
        LaunchError: the processes do not divide into the run's tensor groups.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
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
        device=group.device,
    )


def _restore(
    head: Head, name: str, checkpoint: Checkpoint, backbone: FrozenBackbone | ImagesOn, experiment: Experiment
) -> None:
    checkpoint.require_backbone(name=experiment.backbone.name, fingerprint=backbone.fingerprint)
    checkpoint.require_fit({name: head})
    state = checkpoint.heads[name]
    head.load_state_dict(state.weights | state.buffers)
