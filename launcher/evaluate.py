"""Score a trained run anew from its folder, on its validation split or, for a benchmark server, on its test images."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.data.build import submission_set, val_set
from permafrost.launcher.errors import CheckpointError
from permafrost.launcher.files import write_atomically
from permafrost.launcher.ranks.process_group import join_process_group
from permafrost.launcher.run.restore import load_trained
from permafrost.launcher.run.scoring import Metrics, class_table, evaluate_heads, metrics_table

if TYPE_CHECKING:
    from permafrost.data.task import TaskDataConfig, TaskDataset


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
    """Rebuild what a run folder describes and score its heads: `permafrost evaluate RUN`.

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
        DataError: the data knows no several scales, or no submission.
        RunFolderError: the folder holds no run.
        CheckpointError: no valid checkpoint, or one of another backbone, head or data set.
    """
    group = join_process_group(device)
    say = say if group.is_main else lambda text: None
    try:
        trained = load_trained(run, group, heads=None if head is None else [head], which=which)
        if submission is not None and len(trained.heads) > 1:
            raise CheckpointError(f"{trained.folder} has the heads {', '.join(trained.heads)}: choose one with --head")
        dataset = group.main_first(lambda: _dataset(trained.experiment.data, evaluation or {}, submission))
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
        assert metrics is not None  # nothing interrupts it
        if submission is not None:
            say(f"{dataset.extent}: files for the benchmark server in {submission}")
            return metrics
        if group.is_main:
            content = {"checkpoint": which, "steps": trained.steps, "num_samples": len(dataset), "metrics": metrics}
            content |= {"evaluation": dict(evaluation)} if evaluation else {}
            write_atomically(folder / "evaluation.json", json.dumps(content, indent=2) + "\n")
        names = trained.experiment.data.result_names
        say(metrics_table(metrics, names))
        if classes := class_table(metrics, names):
            say(f"\n{dataset.headline.rpartition('/')[2]} of each class\n{classes}\n")
        say(f"written to {folder}: evaluation.json")
        return metrics
    finally:
        group.close()


def _dataset(
    data: TaskDataConfig, evaluation: Mapping[str, Any], submission: str | os.PathLike[str] | None
) -> TaskDataset:
    """Build the data set that is evaluated.

    Raises:
        DataError: the data knows no such field of its evaluation, or no submission.
    """
    data = data.seen_with(**evaluation)
    return val_set(data) if submission is None else submission_set(data, Path(submission))
