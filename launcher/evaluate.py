"""Scoring heads: one frozen forward per batch for all of them, each rank its share of the images, one result."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from permafrost.data.loader import val_loader
from permafrost.heads.base import LossCounts, world_mean_counts
from permafrost.launcher.build import main_first, on_main
from permafrost.launcher.errors import CheckpointError
from permafrost.launcher.mesh import init_world
from permafrost.launcher.run_folder import write_atomically
from permafrost.launcher.trained import load_trained

if TYPE_CHECKING:
    from torch import Tensor

    from permafrost.data.coco import CocoDetection
    from permafrost.data.types import Batch
    from permafrost.launcher.experiment import LoopConfig
    from permafrost.launcher.mesh import World
    from permafrost.model.frozen import FrozenBackbone

Metrics = dict[str, dict[str, float]]
"""Of each head, by name: the evaluator's values."""

REPORT_EVERY = 30.0
"""Seconds between two signs of life of a long evaluation."""

KINDS = {"bbox": "box", "segm": "mask"}


class RunsHead(Protocol):
    """What is evaluated: an engine, or a HeadRunner."""

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""

    def __call__(self, features: Sequence[Tensor], batch: Batch, counts: LossCounts) -> Any:
        """One result per image."""


def evaluate_heads(
    engines: Mapping[str, RunsHead],
    backbone: FrozenBackbone,
    dataset: CocoDetection,
    world: World,
    loop: LoopConfig,
    *,
    results_folder: Path | None = None,
    say: Callable[[str], None] | None = None,
    is_interrupted: Callable[[], bool] | None = None,
    show: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> Metrics | None:
    """Score several heads on a validation set. Collective; every rank gets the same metrics.

    Args:
        engines: by name of the head. They are left in training mode.
        backbone: its features are shared by all heads.
        dataset: the validation set.
        world: which share of the images is this rank's.
        loop: batch size and workers.
        results_folder: where the main rank writes results_<head>.json, the detections in COCO's format; None writes
            none.
        say: prints a line; called now and then while a long evaluation runs.
        is_interrupted: whether this rank has been asked to end; None never asks.
        show: on the main rank, called with each head's name and the evaluator's pictures, (H, W, 3) uint8 by title; None draws
            none.

    Returns:
        of each head, the evaluator's values; None if any rank was asked to end.
    """
    evaluators = {name: dataset.evaluator() for name in engines}
    reported, interrupted = time.monotonic(), False
    for engine in engines.values():
        engine.train(False)
    with torch.no_grad():
        loader = val_loader(
            dataset,
            batch_size=loop.evaluation_batch,
            rank=world.rank,
            world_size=world.world_size,
            num_workers=loop.num_workers,
            timeout=loop.worker_timeout,
            groups=dataset.groups,
        )
        for done, batch in enumerate(loader, start=1):
            # Every rank has as many batches.
            interrupted = is_interrupted is not None and world.any_true(is_interrupted())
            if interrupted:
                break
            batch = batch.to(world.device)
            features = backbone(batch.images)
            for name, engine in engines.items():
                results = engine(features, batch, world_mean_counts)
                # A padding batch keeps the ranks' collectives in step; its images belong to another rank.
                if not batch.is_padding:
                    evaluators[name].update([result.cpu() for result in results])
            if say is not None and time.monotonic() - reported > REPORT_EVERY:
                reported = time.monotonic()
                say(f"evaluation: {done} of {len(loader)} batches")
    for engine in engines.values():
        engine.train(True)
    if interrupted:
        return None
    metrics: Metrics = {}
    for name, evaluator in evaluators.items():
        states = world.gather_objects(evaluator.state())
        metrics[name] = on_main(world, lambda: _score(dataset, states, name, results_folder, show))  # noqa: B023 - called at once
    return metrics


def evaluate_run(
    run: str | os.PathLike[str],
    *,
    which: str = "best",
    device: str = "auto",
    num_workers: int | None = None,
    evaluation: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Metrics:
    """`permafrost evaluate RUN`: rebuild what a run folder describes and score its heads.

    Writes evaluation.json and results_<head>.json into it.

    Args:
        run: the run folder.
        which: "best" (of each head, by its metric) or "latest".
        device: as for training.
        num_workers: data workers; None takes the recipe's.
        evaluation: fields of the recipe's `data.evaluation` that are other ones here (sizes and flip of the views).
        say: prints a line.

    Raises:
        RunFolderError: the folder holds no run.
        CheckpointError: no valid checkpoint, or one of another backbone, head or data set.
    """
    world = init_world(device)
    say = say if world.is_main else _silent
    try:
        trained = load_trained(run, world, which=which)
        data = trained.experiment.data
        if evaluation:
            data = dataclasses.replace(data, evaluation=dataclasses.replace(data.evaluation, **evaluation))
        dataset = main_first(world, data.build_val)
        if list(dataset.classes) != trained.classes:
            raise CheckpointError(
                f"{trained.folder} was trained on the classes {', '.join(trained.classes)}, the validation annotations "
                f"now have {', '.join(dataset.classes)}: restore the annotation file of that run"
            )
        for name, path in trained.checkpoints.items():
            say(f"head {name}: {path}")
        views = f", {dataset.num_views} views of each" if dataset.num_views > 1 else ""
        say(f"{len(dataset.records)} validation images{views}, on {world.device}, {world.world_size} process(es)")
        loop = trained.experiment.loop
        loop = loop if num_workers is None else dataclasses.replace(loop, num_workers=num_workers)
        folder = trained.folder.path
        metrics = evaluate_heads(trained.heads, trained.backbone, dataset, world, loop, results_folder=folder, say=say)
        if world.is_main:
            content = {
                "checkpoint": which,
                "steps": trained.steps,
                "num_images": len(dataset.records),
                "metrics": metrics,
            }
            content |= {"views": dataset.num_views} if dataset.num_views > 1 else {}
            write_atomically(folder / "evaluation.json", json.dumps(content, indent=2) + "\n")
        say(metrics_table(metrics))
        if classes := class_table(metrics):
            say(f"\nAP of each class\n{classes}\n")
        say(f"written to {folder}: evaluation.json, {', '.join(f'results_{name}.json' for name in metrics)}")
        return metrics
    finally:
        world.close()


def class_table(metrics: Metrics) -> str:
    """A plain table of the AP of every class that occurs, the best boxes first; "" where there is none."""
    blocks = []
    for head, values in metrics.items():
        found: dict[str, dict[str, float]] = {}
        for tag, value in values.items():
            kind, _, rest = tag.partition("/AP-")
            if rest:
                found.setdefault(rest, {})[KINDS.get(kind, kind)] = value
        if not found:
            continue
        kinds = list(dict.fromkeys(kind for columns in found.values() for kind in columns))
        rows = sorted(found.items(), key=lambda row: -row[1].get(kinds[0], 0.0))
        width = max(map(len, (head, *found)))
        lines = [f"{head.ljust(width)}  {'  '.join(kind.rjust(5) for kind in kinds)}"]
        for name, columns in rows:
            cells = (f"{columns[kind]:5.3f}" if kind in columns else " " * 5 for kind in kinds)
            lines.append(f"{name.ljust(width)}  {'  '.join(cells)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def metrics_table(metrics: Metrics) -> str:
    """A plain table of what evaluators found: a row for each head's boxes and masks, a column for each kind of AP."""
    rows: list[tuple[str, str, dict[str, float]]] = []
    for head, values in metrics.items():
        kinds: dict[str, dict[str, float]] = {}
        for tag, value in values.items():
            kind, _, column = tag.partition("/")
            # Recalls ("AR100") and single classes ("AP-circle") are in the JSON.
            if column and "-" not in column and not column.startswith("AR"):
                kinds.setdefault(kind, {})[column] = value
        rows += [(head, KINDS.get(kind, kind), columns) for kind, columns in kinds.items()]
    names = list(dict.fromkeys(column for _, _, columns in rows for column in columns))
    lines = [("head", "", *names)]
    lines += [
        (head, kind, *(f"{found[name]:.3f}" if name in found else "" for name in names)) for head, kind, found in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = 2
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def _score(
    dataset: CocoDetection,
    states: list[Any],
    name: str,
    results_folder: Path | None,
    show: Callable[[str, Mapping[str, Any]], None] | None,
) -> dict[str, float]:
    evaluator = dataset.evaluator()
    evaluator.merge(states)
    if results_folder is not None:
        write_atomically(results_folder / f"results_{name}.json", json.dumps(evaluator.results_json()))
    metrics = evaluator.compute()
    if show is not None:
        show(name, evaluator.pictures())
    return metrics


def _silent(text: str) -> None:
    pass
