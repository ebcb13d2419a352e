"""Scoring: shares of ranks make one result, a run folder alone suffices, and the numbers are those of plain
pycocotools."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from permafrost.data.build import located, val_set
from permafrost.data.detection.config import CocoDataConfig, JitterConfig
from permafrost.data.worlds.config import ShapesDataConfig, ShapesWorld
from permafrost.heads.necks.config import FPNConfig
from permafrost.launcher.cli import main
from permafrost.launcher.errors import CheckpointError, RunFolderError
from permafrost.launcher.evaluate import evaluate_run
from permafrost.launcher.experiment import Experiment, HeadExperiment, LoopConfig, ScheduleConfig
from permafrost.launcher.ranks.process_group import ProcessGroup
from permafrost.launcher.run.checkpoint import CheckpointWarning
from permafrost.launcher.run.restore import load_trained
from permafrost.launcher.run.scoring import class_table, evaluate_heads, metrics_table
from permafrost.launcher.train import train


class ThreadGroup(ProcessGroup):
    """Ranks that are threads of one process: the real collectives need processes."""

    def __init__(self, rank: int, world_size: int, shared: dict[str, Any]) -> None:
        super().__init__(rank, world_size, rank, torch.device("cpu"))
        self._shared = shared

    def gather_objects(self, value: Any) -> list[Any] | None:
        self._shared["slots"][self.rank] = value
        self._shared["barrier"].wait()
        gathered = list(self._shared["slots"])
        self._shared["barrier"].wait()
        return gathered if self.is_main else None

    def broadcast_object(self, value: Any, *, patient: bool = False) -> Any:
        if self.is_main:
            self._shared["value"] = value
        self._shared["barrier"].wait()
        value = self._shared["value"]
        self._shared["barrier"].wait()
        return value


def on_ranks(world_size: int, work: Callable[[ThreadGroup], Any]) -> list[Any]:
    """The results of `work` on every rank, by rank."""
    shared = {"slots": [None] * world_size, "barrier": threading.Barrier(world_size, timeout=60)}
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(rank, world_size, shared))
        except BaseException as error:
            results[rank] = error
            shared["barrier"].abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def trained_run(
    tiny: Callable[..., Experiment], make_head: Callable[..., HeadExperiment]
) -> tuple[Experiment, dict[str, dict[str, float]]]:
    """A run that finds something: 50 steps on seven images with large objects, scored on the same."""
    world = ShapesWorld(num_train=7, num_val=1, image_side=64, objects=(1, 2), object_size=(0.5, 0.7), crowd_share=0.3)
    data = ShapesDataConfig(
        image_size=64,
        world=world,
        jitter=JitterConfig(scale_range=(1.0, 1.0), flip=0.0),
        val_annotations="annotations/instances_train2017.json",
        val_images="train2017",
    )
    head = make_head(learning_rate=3e-3)
    model = head.model
    head.model = dataclasses.replace(
        model,
        neck=FPNConfig(channels=32),
        box=dataclasses.replace(model.box, fc_channels=64, num_detections=20),
        mask=dataclasses.replace(model.mask, channels=16),
    )
    head.schedule = ScheduleConfig(kind="cosine", warmup_steps=5)
    experiment = tiny(
        heads={"detection": head}, data=data, num_steps=50, global_batch=4, checkpoint_every=50, log_every=50
    )
    return experiment, train(experiment)


def plain_pycocotools(experiment: Experiment, results: list[dict], kind: str) -> dict[str, float]:
    """AP by pycocotools' own documented calls on the files on disk."""
    root = Path(located(experiment.data).root)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(root / experiment.data.val_annotations))
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75"), evaluation.stats.tolist()))


def test_a_run_folder_is_all_that_is_needed(
    trained_run: tuple[Experiment, dict[str, dict[str, float]]], capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, expected = trained_run
    run = Path(experiment.output)
    capsys.readouterr()
    assert evaluate_run(run) == expected
    assert "detection  box" in capsys.readouterr().out
    content = json.loads((run / "evaluation.json").read_text())
    assert content == {"checkpoint": "best", "steps": {"detection": 50}, "num_samples": 7, "metrics": expected}
    # What is listed is what was scored, in the data set's own category ids.
    results = json.loads((run / "results_detection.json").read_text())
    assert results
    for kind in ("bbox", "segm"):
        for name, value in plain_pycocotools(experiment, results, kind).items():
            assert expected["detection"][f"{kind}/{name}"] == pytest.approx(value, abs=2e-3), (kind, name)
    assert expected["detection"]["bbox/AP"] > 0.2  # else 0 would equal 0
    assert expected["detection"]["segm/AP"] > 0.1


@pytest.mark.parametrize("image_every", [0, 1])
def test_an_evaluation_in_training_shows_its_pictures(tiny: Callable[..., Experiment], image_every: int) -> None:
    experiment = tiny(num_steps=1, image_every=image_every)
    train(experiment)
    events = EventAccumulator(str(Path(experiment.output) / "tensorboard"), size_guidance={"images": 0}).Reload()
    names = ("predicted_and_true", "precision_recall", "confusion") if image_every else ()
    assert set(events.Tags()["images"]) == {f"detection/{name}" for name in names}


def test_several_views_of_an_image_are_one_result(
    trained_run: tuple[Experiment, dict[str, dict[str, float]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """At the one size that a run is scored at, "several" views are that one; mirrored and enlarged ones change what is found."""
    experiment, expected = trained_run
    run = Path(experiment.output)
    alone = evaluate_run(run, evaluation={"sizes": (64,)})
    assert alone == expected
    capsys.readouterr()
    assert main(["evaluate", str(run), "--sizes", "64", "96", "--flip"]) == 0
    assert "7 images (28 views) for validation" in capsys.readouterr().out
    content = json.loads((run / "evaluation.json").read_text())
    assert content["num_samples"] == 28
    results = json.loads((run / "results_detection.json").read_text())
    assert content["metrics"] != expected
    for kind in ("bbox", "segm"):
        for name, value in plain_pycocotools(experiment, results, kind).items():
            assert content["metrics"]["detection"][f"{kind}/{name}"] == pytest.approx(value, abs=2e-3), (kind, name)
    assert content["metrics"]["detection"]["bbox/AP"] > 0.1
    # Views of an image stay on one rank, so ranks agree with one process.
    dataset = val_set(
        dataclasses.replace(
            experiment.data, evaluation=dataclasses.replace(experiment.data.evaluation, sizes=(64, 96), flip=True)
        )
    )
    loop = LoopConfig(evaluation_batch=3, num_workers=0)

    parts = [load_trained(run, ProcessGroup(0, 1, 0, torch.device("cpu"))) for _ in range(2)]

    def share(group: ThreadGroup) -> Any:
        own = parts[group.rank]
        return evaluate_heads(own.heads, own.backbone, dataset, group, loop)

    for metrics in on_ranks(2, share):
        assert metrics["detection"]["bbox/AP"] == pytest.approx(content["metrics"]["detection"]["bbox/AP"], abs=1e-6)


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 1), (3, 2), (4, 4)])
def test_shares_of_ranks_make_the_same_result(
    trained_run: tuple[Experiment, dict[str, dict[str, float]]], world_size: int, batch_size: int, tmp_path: Path
) -> None:
    experiment, expected = trained_run
    loop = LoopConfig(evaluation_batch=batch_size, num_workers=0)
    dataset = val_set(experiment.data)
    single = ProcessGroup(0, 1, 0, torch.device("cpu"))
    parts = [load_trained(experiment.output, single) for _ in range(world_size)]

    def work(group: ThreadGroup) -> Any:
        own = parts[group.rank]
        return evaluate_heads(own.heads, own.backbone, dataset, group, loop, results_folder=tmp_path)

    results = on_ranks(world_size, work)
    for result in results:
        assert result["detection"] == pytest.approx(expected["detection"], abs=1e-6)
    found = json.loads((tmp_path / "results_detection.json").read_text())
    assert len({entry["image_id"] for entry in found}) <= 7
    evaluate_heads(parts[0].heads, parts[0].backbone, dataset, single, loop, results_folder=tmp_path)
    alone = json.loads((tmp_path / "results_detection.json").read_text())
    assert [e["image_id"] for e in found] == [e["image_id"] for e in alone]
    assert [e["score"] for e in found] == pytest.approx([e["score"] for e in alone], abs=1e-5)


def test_the_best_checkpoint_of_each_head_is_scored(
    tiny: Callable[..., Experiment], make_head: Callable[..., HeadExperiment]
) -> None:
    experiment = tiny(
        heads={"a": make_head(), "b": make_head(learning_rate=1e-3)}, evaluate_every=4, checkpoint_every=4
    )
    train(experiment)
    run = Path(experiment.output)
    (run / "best").write_text(json.dumps({"a": {"step": 4, "metric": "bbox/AP", "value": 1.0}}))
    evaluate_run(run, say=lambda text: None)
    assert json.loads((run / "evaluation.json").read_text())["steps"] == {"a": 4, "b": 8}
    evaluate_run(run, which="latest", say=lambda text: None)
    assert json.loads((run / "evaluation.json").read_text())["steps"] == {"a": 8, "b": 8}
    history = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert evaluate_run(run, which="latest", say=lambda text: None) == history[-1]["metrics"]
    damaged = run / "checkpoints/step_00000004/a/head.safetensors"
    damaged.write_bytes(b"")
    with pytest.warns(CheckpointWarning, match="step_00000004"):
        evaluate_run(run, say=lambda text: None)
    assert json.loads((run / "evaluation.json").read_text())["steps"] == {"a": 8, "b": 8}


def test_what_cannot_be_scored_is_named(tiny: Callable[..., Experiment], tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        evaluate_run(tmp_path / "nothing")
    experiment = tiny(num_steps=2)
    train(experiment)
    run = Path(experiment.output)
    with pytest.raises(CheckpointError, match="no head other: it trains detection"):
        load_trained(run, ProcessGroup(0, 1, 0, torch.device("cpu")), heads=["other"])
    recipe = json.loads((run / "recipe.json").read_text())
    # Other weights behind the same run folder.
    recipe["experiment"]["backbone"]["weights"] = "random:5"
    (run / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(
        CheckpointError, match=r"trained on the backbone swinv2_nano with fingerprint \w{64}, but this one"
    ):
        evaluate_run(run)
    # Another number of channels than the head was saved with.
    recipe["experiment"]["backbone"]["weights"] = "random"
    recipe["experiment"]["heads"]["detection"]["model"]["neck"]["channels"] = 24
    (run / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(CheckpointError, match=r"has shape .* the head's is"):
        evaluate_run(run)


def test_evaluation_changes_no_weight_and_no_mode(tiny: Callable[..., Experiment]) -> None:
    experiment = tiny(num_steps=2)
    train(experiment)
    trained = load_trained(experiment.output, ProcessGroup(0, 1, 0, torch.device("cpu")))
    head = trained.heads["detection"].head
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    evaluate_heads(
        trained.heads,
        trained.backbone,
        val_set(experiment.data),
        ProcessGroup(0, 1, 0, torch.device("cpu")),
        experiment.loop,
    )
    assert not head.training
    assert all(torch.equal(before[name], tensor) for name, tensor in head.state_dict().items())


def test_the_table_has_a_row_for_boxes_and_masks_of_each_head() -> None:
    metrics = {
        "one": {"bbox/AP": 0.12345, "bbox/AP50": 0.3, "bbox/AR100": 0.9, "bbox/AP-ring": 0.5, "segm/AP": 0.1},
        "second": {"bbox/AP": 1.0},
    }
    assert metrics_table(metrics, CocoDataConfig.result_names).splitlines() == [
        "head             AP   AP50",
        "one     box   0.123  0.300",
        "one     mask  0.100       ",
        "second  box   1.000       ",
    ]


def test_the_table_of_classes_has_each_that_occurs_the_best_first() -> None:
    values = {"bbox/AP": 0.5, "bbox/AP-cat": 0.25, "segm/AP-cat": 0.5, "bbox/AP-a dog": 0.75, "bbox/AR100": 1.0}
    assert class_table({"found": values, "other": {"bbox/AP": 0.0}}, CocoDataConfig.result_names).splitlines() == [
        "found    box   mask",
        "a dog  0.750       ",
        "cat    0.250  0.500",
    ]
    assert class_table({"other": {"bbox/AP": 0.0}}, CocoDataConfig.result_names) == ""
