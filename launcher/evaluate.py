"""Scoring heads: one frozen forward per batch for all of them, each rank its share of the images, one result."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from permafrost.data.stream.loader import val_loader
from permafrost.heads.base import LossCounts, world_mean_counts
from permafrost.launcher.errors import CheckpointError, RecipeError, RunFolderError
from permafrost.launcher.files import write_atomically
from permafrost.launcher.ranks.process_group import join_process_group
from permafrost.launcher.run.restore import load_trained

if TYPE_CHECKING:
    from torch import Tensor

    from permafrost.data.task import TaskDataConfig, TaskDataset
    from permafrost.data.types import Batch
    from permafrost.launcher.experiment import LoopConfig
    from permafrost.launcher.ranks.process_group import ProcessGroup
    from permafrost.model.frozen import FrozenBackbone

Metrics = dict[str, dict[str, float]]
"""Of each head, by name: the evaluator's values."""

REPORT_EVERY = 30.0
"""Seconds between two signs of life of a long evaluation."""

UNREADABLE = "unreadable.json"
"""In a results folder: the validation files that could not be read, each with the reason."""

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
    dataset: TaskDataset,
    group: ProcessGroup,
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
        group: which share of the images is this rank's.
        loop: batch size and workers.
        results_folder: where the main rank writes the evaluators' files (results_<head>.json and others), and unreadable.json where
            files could not be read; made if it is missing; None writes none.
        say: prints a line; called now and then while a long evaluation runs.
        is_interrupted: whether this rank has been asked to end; None never asks.
        show: on the main rank, called with each head's name and the evaluator's pictures, (H, W, 3) uint8 by title; None draws
            none.

    Returns:
        of each head, the evaluator's values; None if any rank was asked to end.
    """
    evaluators = {name: dataset.evaluator() for name in engines}
    reported, interrupted = time.monotonic(), False
    unreadable: dict[str, str] = {}
    for engine in engines.values():
        engine.train(False)
    with torch.no_grad():
        loader = val_loader(
            dataset,
            batch_size=loop.evaluation_batch,
            rank=group.rank,
            world_size=group.world_size,
            num_workers=loop.num_workers,
            timeout=loop.worker_timeout,
            groups=getattr(dataset, "groups", None),
        )
        for done, batch in enumerate(loader, start=1):
            # Every rank has as many batches.
            interrupted = is_interrupted is not None and group.any_true(is_interrupted())
            if interrupted:
                break
            unreadable |= {} if batch.is_padding else dict(batch.replaced)
            batch = batch.to(group.device)
            features = backbone(batch.images)
            for name, engine in engines.items():
                results = engine(features, batch, world_mean_counts)
                # A padding batch keeps the ranks' collectives in step; its images belong to another rank.
                if not batch.is_padding:
                    # On the device: what is large is reduced there.
                    evaluators[name].update(results)
            if say is not None and time.monotonic() - reported > REPORT_EVERY:
                reported = time.monotonic()
                say(f"evaluation: {done} of {len(loader)} batches")
    for engine in engines.values():
        engine.train(True)
    if interrupted:
        return None
    # Before anything is scored: too many of them may be why there is no score.
    reasons = group.gather_objects(unreadable)
    group.on_main(lambda: _report_unreadable(reasons or [], results_folder, say))
    metrics: Metrics = {}
    for name, evaluator in evaluators.items():
        states = group.gather_objects(evaluator.state())
        metrics[name] = group.on_main(lambda: _score(dataset, states, name, results_folder, say, show))  # noqa: B023 - called at once
    return metrics


def evaluate_run(
    run: str | os.PathLike[str],
    *,
    which: str = "best",
    device: str = "auto",
    num_workers: int | None = None,
    evaluation: Mapping[str, Any] | None = None,
    submission: str | os.PathLike[str] | None = None,
    head: str | None = None,
    say: Callable[[str], None] = print,
) -> Metrics:
    """`permafrost evaluate RUN`: rebuild what a run folder describes and score its heads.

    Writes evaluation.json and results_<head>.json into it; of a submission only its files, and those elsewhere.

    Args:
        run: the run folder.
        which: "best" (of each head, by its metric) or "latest".
        device: as for training.
        num_workers: data workers; None takes the recipe's.
        evaluation: fields of the recipe's `data.evaluation` that are other ones here (sizes or scales, and flip of the views).
        submission: folder for a benchmark server's files on the data's test images, which have no labels; None scores the
            validation split.
        head: which head; None is all of them, or, for a submission, the only one.
        say: prints a line.

    Raises:
        RecipeError: the data knows no several scales, or no submission.
        RunFolderError: the folder holds no run.
        CheckpointError: no valid checkpoint, or one of another backbone, head or data set.
    """
    group = join_process_group(device)
    say = say if group.is_main else _silent
    try:
        trained = load_trained(run, group, heads=None if head is None else [head], which=which)
        if submission is not None and len(trained.heads) > 1:
            raise CheckpointError(f"{trained.folder} has the heads {', '.join(trained.heads)}: say which with --head")
        dataset = group.main_first(_builder(trained.experiment.data, evaluation or {}, submission))
        where = "validation annotations" if submission is None else "test images"
        if list(dataset.classes) != trained.classes:
            raise CheckpointError(
                f"{trained.folder} was trained on the classes {', '.join(trained.classes)}, the {where} "
                f"now have {', '.join(dataset.classes)}: restore the annotation file of that run"
            )
        if submission is not None and list(dataset.category_ids) != trained.category_ids:
            raise CheckpointError(
                f"{trained.folder} was trained on classes with the ids {trained.category_ids}, the {where} have "
                f"{list(dataset.category_ids)}: the server would take one for another"
            )
        for name, path in trained.checkpoints.items():
            say(f"head {name}: {path}")
        purpose = "validation" if submission is None else "a submission"
        say(f"{dataset.extent} for {purpose} on {group.device}, {group.world_size} process(es)")
        loop = trained.experiment.loop
        loop = loop if num_workers is None else dataclasses.replace(loop, num_workers=num_workers)
        folder = trained.folder.path
        results_folder = folder if submission is None else Path(submission)
        metrics = evaluate_heads(
            trained.heads, trained.backbone, dataset, group, loop, results_folder=results_folder, say=say
        )
        if submission is not None:
            say(f"{dataset.extent}: files for the benchmark server in {submission}")
            return metrics
        if group.is_main:
            content = {"checkpoint": which, "steps": trained.steps, "num_samples": len(dataset), "metrics": metrics}
            content |= {"evaluation": dict(evaluation)} if evaluation else {}
            write_atomically(folder / "evaluation.json", json.dumps(content, indent=2) + "\n")
        say(metrics_table(metrics))
        if classes := class_table(metrics):
            say(f"\n{dataset.headline.rpartition('/')[2]} of each class\n{classes}\n")
        say(f"written to {folder}: evaluation.json")
        return metrics
    finally:
        group.close()


def _builder(
    data: TaskDataConfig, evaluation: Mapping[str, Any], submission: str | os.PathLike[str] | None
) -> Callable[[], TaskDataset]:
    """What makes the data set that is evaluated.

    Raises:
        RecipeError: the data knows no such field of its evaluation, or no submission.
    """
    kind = f"a {type(data).__name__}, for {data.task}"
    known = {field.name for field in dataclasses.fields(data.evaluation)} if hasattr(data, "evaluation") else set()
    if unknown := sorted(evaluation.keys() - known):
        raise RecipeError(
            f"evaluation with other {', '.join(unknown)}: the run's data is {kind}, which has no such field"
        )
    if evaluation:
        data = dataclasses.replace(data, evaluation=dataclasses.replace(data.evaluation, **evaluation))
    if submission is None:
        return data.build_val
    if not hasattr(data, "build_test"):
        raise RecipeError(f"--submission is for detection and segmentation; the run's data is {kind}")
    return functools.partial(data.build_test, Path(submission))


def class_table(metrics: Metrics) -> str:
    """A plain table of what every class that occurs reached, the best first; "" where there is none."""
    blocks = []
    for head, values in metrics.items():
        found: dict[str, dict[str, float]] = {}
        for tag, value in values.items():
            measure, _, name = tag.partition("-")
            if name:
                kind, _, column = measure.rpartition("/")
                found.setdefault(name, {})[KINDS.get(kind, column)] = value
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
    """A plain table of what evaluators found: a row for each kind of a head's results (its boxes, its masks), a column for
    each measure."""
    rows: list[tuple[str, str, dict[str, float]]] = []
    for head, values in metrics.items():
        kinds: dict[str, dict[str, float]] = {}
        for tag, value in values.items():
            measure, _, name = tag.partition("-")
            kind, _, column = measure.rpartition("/")
            # Recalls ("AR100") and single classes ("AP-circle") are in the JSON.
            if not name and not column.startswith("AR"):
                kinds.setdefault(kind, {})[column] = value
        rows += [(head, KINDS.get(kind, kind), columns) for kind, columns in kinds.items()]
    names = list(dict.fromkeys(column for _, _, columns in rows for column in columns))
    lines = [("head", "", *names)]
    lines += [(head, kind, *(_cell(name, found.get(name)) for name in names)) for head, kind, found in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = 2
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def _cell(name: str, value: float | None) -> str:
    """A measure as text: counts ("num_videos") are whole numbers."""
    if value is None:
        return ""
    return f"{value:.0f}" if name.startswith("num_") else f"{value:.3f}"


def _score(
    dataset: TaskDataset,
    states: list[Any],
    name: str,
    results_folder: Path | None,
    say: Callable[[str], None] | None,
    show: Callable[[str, Mapping[str, Any]], None] | None,
) -> dict[str, float]:
    evaluator = dataset.evaluator()
    evaluator.merge(states)
    if results_folder is not None:
        files = evaluator.result_files(name)
        for file, content in files.items():
            _write(results_folder / file, content)
        if files and say is not None:
            say(f"head {name}: {', '.join(files)} in {results_folder}")
    metrics = evaluator.compute()
    if show is not None:
        show(name, evaluator.pictures())
    return metrics


def _write(file: Path, content: str | bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
    except OSError as error:
        raise RunFolderError(f"{file} cannot be written: {error.strerror or error}") from error


def _report_unreadable(
    found: Sequence[dict[str, str]], results_folder: Path | None, say: Callable[[str], None] | None
) -> None:
    """Name the files that were left out, from every rank's {path: reason}."""
    reasons = {path: reason for own in found for path, reason in sorted(own.items())}
    listing = None if results_folder is None else results_folder / UNREADABLE
    if listing is not None and reasons:
        _write(listing, json.dumps(reasons, indent=2) + "\n")
    elif listing is not None and listing.is_file():
        # Of an evaluation before this one.
        listing.unlink()
    if say is not None and reasons:
        path, reason = next(iter(reasons.items()))
        where = "" if listing is None else f" (all of them: {listing})"
        say(f"{len(reasons)} file(s) cannot be read and are left out{where}, the first: {path}: {reason}")


def _silent(text: str) -> None:
    pass
