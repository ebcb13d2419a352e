"""Score heads: one frozen forward per batch for all of them, each rank its share of the images, one result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from permafrost.data.stream.loader import val_loader
from permafrost.heads.base import LossCounts, world_mean_counts
from permafrost.launcher.errors import RunFolderError
from permafrost.launcher.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from permafrost.data.task import TaskDataset
    from permafrost.data.types import Batch
    from permafrost.launcher.experiment import LoopConfig
    from permafrost.launcher.ranks.process_group import ProcessGroup
    from permafrost.launcher.run.fine_tune import ImagesOn
    from permafrost.model.frozen import FrozenBackbone

Metrics = dict[str, dict[str, float]]
"""Of each head, by name: the evaluator's values."""

REPORT_EVERY = 30.0
"""Seconds between two signs of life of a long evaluation."""

UNREADABLE = "unreadable.json"
"""In a results folder: the validation files that could not be read, each with the reason."""


class RunsHead(Protocol):
    """Callable that is evaluated: an engine, or a HeadRunner."""

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""

    def __call__(self, features: Sequence[Tensor], batch: Batch, counts: LossCounts) -> Any:
        """Return one result per image."""


def evaluate_heads(
    engines: Mapping[str, RunsHead],
    backbone: FrozenBackbone | ImagesOn,
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
            groups=dataset.groups,
            max_batch=dataset.max_batch,
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
        metrics[name] = group.on_main(lambda: _score(dataset, states or [], name, results_folder, say, show))  # noqa: B023 - called at once
    return metrics


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


def class_table(metrics: Metrics, names: Mapping[str, str]) -> str:
    """Return a plain table of what every class that occurs reached, the best first; "" where there is none.

    Args:
        metrics: of each head.
        names: what kinds of results are called; see TaskDataConfig.result_names.
    """
    blocks = []
    for head, values in metrics.items():
        found: dict[str, dict[str, float]] = {}
        for tag, value in values.items():
            measure, _, name = tag.partition("-")
            if name:
                kind, _, column = measure.rpartition("/")
                found.setdefault(name, {})[names.get(kind, column)] = value
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


def metrics_table(metrics: Metrics, names: Mapping[str, str]) -> str:
    """Return a plain table of metrics: a row for each kind of a head's results, a column for each measure; see `class_table`."""
    rows: list[tuple[str, str, dict[str, float]]] = []
    for head, values in metrics.items():
        kinds: dict[str, dict[str, float]] = {}
        for tag, value in values.items():
            measure, _, name = tag.partition("-")
            kind, _, column = measure.rpartition("/")
            # Recalls ("AR100") and single classes ("AP-circle") are in the JSON.
            if not name and not column.startswith("AR"):
                kinds.setdefault(kind, {})[column] = value
        rows += [(head, names.get(kind, kind), columns) for kind, columns in kinds.items()]
    measures = list(dict.fromkeys(column for _, _, columns in rows for column in columns))
    lines = [("head", "", *measures)]
    lines += [(head, kind, *(_cell(name, found.get(name)) for name in measures)) for head, kind, found in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = 2
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def _cell(name: str, value: float | None) -> str:
    """Return a measure as text: counts ("num_videos") are whole numbers."""
    if value is None:
        return ""
    return f"{value:.0f}" if name.startswith("num_") else f"{value:.3f}"
