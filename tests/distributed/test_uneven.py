"""Images without objects on one rank, on all, crowds alone, and uneven shares of the validation set: the real head, through the
whole loop, under DDP and ZeRO 1, 2 and 3, takes every step and waits for nobody.

A rank that skipped a branch would abort under ZeRO or leave the other one waiting, which the time limit of the launch ends.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from permafrost.data.stream.sampler import GlobalStream
from permafrost.data.worlds.config import ShapesWorld
from permafrost.data.worlds.shapes_files import SHAPES

pytestmark = pytest.mark.slow  # groups of processes, started for minutes in all

NUM_STEPS, GLOBAL_BATCH, NUM_VAL = 4, 4, 5
LOSSES = ("loss_rpn_objectness", "loss_rpn_box", "loss_classifier", "loss_box", "loss_mask")
BOXES = ("loss_rpn_box", "loss_box", "loss_mask")
"""Losses of positives alone."""

EMPTY, CROWD = "empty", "crowd"
# What the four images of each step are made into; None stays as it is. The last two are the second rank's, and its
# micro-batches of one with accumulation.
STEPS: tuple[tuple[str | None, ...], ...] = (
    (None, None, EMPTY, EMPTY),
    (None, EMPTY, None, CROWD),
    (EMPTY, EMPTY, EMPTY, CROWD),
    (CROWD, EMPTY, None, None),
)
KINDS: dict[str, dict] = {
    "accelerate": {},
    **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)},
    "zero3_accumulated": {"kind": "deepspeed", "zero_stage": 3, "accumulation": 2},
}


def change_annotations(file: Path, changes: dict[int, str]) -> None:
    """Take an image's objects away, or make crowds of them; images by their place in the data set."""
    content = json.loads(file.read_text())
    ids = sorted(image["id"] for image in content["images"])
    what = {ids[index]: change for index, change in changes.items()}
    kept = [entry for entry in content["annotations"] if what.get(entry["image_id"]) != EMPTY]
    for entry in kept:
        if what.get(entry["image_id"]) == CROWD:
            entry["iscrowd"] = 1
    content["annotations"] = kept
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def runs(run_ranks: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every kind on two ranks, of one process, and evaluations of the former by one process."""
    folder = tmp_path_factory.mktemp("uneven")
    num_train = NUM_STEPS * GLOBAL_BATCH
    world = ShapesWorld(num_train=num_train, num_val=NUM_VAL, image_side=64, objects=(2, 4), crowd_share=0)
    data = SHAPES.ensure(world, folder / "data")
    stream = GlobalStream(num_train, 0)
    changes = {
        stream.key(step * GLOBAL_BATCH + place).index: change
        for step, own in enumerate(STEPS)
        for place, change in enumerate(own)
        if change
    }
    change_annotations(data / "annotations/instances_train2017.json", changes)
    # Batches of two: one of two images and one of a single image on the first rank, two empty ones and padding on the second.
    change_annotations(data / "annotations/instances_val2017.json", {2: EMPTY, 3: EMPTY})

    def run(name: str, engine: dict) -> dict:
        fields = {"num_steps": NUM_STEPS, "checkpoint_every": NUM_STEPS, "evaluation_batch": 2}
        names = {"output": str(folder / name), "detections": str(folder / f"{name}_detections"), "coco": str(data)}
        return {**names, "heads": ["detection"], "engine": engine, **fields}

    pair = run_ranks("train_worker.py", 2, {"runs": [run(kind, engine) for kind, engine in KINDS.items()]})
    assert all(own.keys() == {"metrics"} for one in pair["outcomes"] for own in one), pair["outcomes"]
    again = [{"run": str(folder / kind)} for kind in KINDS]
    run_ranks("train_worker.py", 1, {"runs": [run("alone", {})], "evaluate": again})
    return folder


def steps(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "data/epoch" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_taken(runs: Path, kind: str) -> None:
    found, alone = steps(runs / kind), steps(runs / "alone")
    assert [line["step"] for line in found] == list(range(1, NUM_STEPS + 1))
    for line, own in zip(found, STEPS):
        values = {name: line[f"detection/{name}"] for name in LOSSES}
        assert all(math.isfinite(value) for value in values.values())
        has_objects = None in own
        assert all((values[name] > 0) == has_objects for name in BOXES), values
        assert values["loss_rpn_objectness"] > 0
        assert values["loss_classifier"] > 0
        assert line["detection/skipped_steps"] == 0
    # The counts are those of the global batch, wherever the objects are.
    for tag in (*(f"detection/{name}" for name in LOSSES), "detection/grad_norm"):
        assert found[0][tag] == pytest.approx(alone[0][tag], rel=1e-5), tag


@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_is_watched(runs: Path, kind: str) -> None:
    """metrics.jsonl and TensorBoard tell of a step's time, of memory and of skipped steps; and each rank's last beat."""
    lines = steps(runs / kind)
    for line in lines:
        parts = [line[f"time/{part}"] for part in ("data_wait", "backbone", "heads")]
        assert all(part > 0 for part in parts)
        assert sum(parts) <= line["time/step"]
        assert line["speed/images_per_second"] == pytest.approx(GLOBAL_BATCH / line["time/step"])
        assert line["memory/host_gib"] > 0.05
        assert line["checkpoints/failed"] == 0
    # Collectives are timed in the second step, and then now and then.
    assert [line["step"] for line in lines if "time/communication" in line] == [2]
    assert 0 < lines[1]["time/communication"] < lines[1]["time/backbone"] + lines[1]["time/heads"]
    events = EventAccumulator(str(runs / kind / "tensorboard")).Reload()
    for tag in ("time/communication", "time/heads", "memory/host_gib", "detection/skipped_steps"):
        logged = [line[tag] for line in lines if tag in line]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(logged), tag
    beats = [json.loads(file.read_text()) for file in sorted((runs / kind / "heartbeats").glob("rank_*.json"))]
    assert [(beat["rank"], beat["step"], beat["phase"]) for beat in beats] == [
        (rank, NUM_STEPS, "done") for rank in (0, 1)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_validation_image_is_scored_once(runs: Path, kind: str) -> None:
    """The detections are those of one process with the same weights, and none come from padding."""
    files = [runs / f"{kind}_detections/results_detection.json", runs / kind / "results_detection.json"]
    found, alone = (json.loads(file.read_text()) for file in files)
    counts = [Counter(result["image_id"] for result in results) for results in (found, alone)]
    assert counts[0] == counts[1]
    assert len(counts[0]) == NUM_VAL
    scores = [sorted(result["score"] for result in results) for results in (found, alone)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
