"""The loop with a split backbone: the same losses as with a whole one on every rank, in training and in evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from permafrost.launcher.evaluate import evaluate_run

pytestmark = pytest.mark.slow  # groups of processes, started for minutes in all

BOTH = ["detection", "probe"]


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "data/epoch" in line]


def starts(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "provenance.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def outcome(run_ranks: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Any]]]:
    """All runs of this module: {ranks: what the worker saved}."""
    folder = tmp_path_factory.mktemp("train_tensor")

    # Five validation images in batches of two: on two ranks the last batches are of one image and of padding.
    def run(name: str, tensor: int, **fields: object) -> dict:
        defaults = {"heads": BOTH, "num_steps": 4, "evaluation_batch": 2}
        return {"output": str(folder / name), "tensor": tensor, **defaults, **fields}

    pair = run_ranks(
        "train_worker.py",
        2,
        {
            "runs": [
                run("data2", 1),
                run("tensor2", 2, image_every=2, evaluate_every=2),
                run("moving", 2, kill_after=3, checkpoint_every=2),
                run("moving", 1, checkpoint_every=2),
                run("tensor4_of_2", 4),
                run("wrong_rank", 2, wrong_rank=1),
                run("zero", 2, num_steps=2, engine={"kind": "deepspeed", "zero_stage": 2}),
                run("detection", 2, num_steps=1, heads=["detection"]),
            ],
            "evaluate": [
                {"run": str(folder / "detection")},
                {"run": str(folder / "data2")},
                {"copy": str(folder / "data2"), "run": str(folder / "split"), "tensor": 2},
            ],
        },
    )
    runs = [run("mesh2x2", 2, num_steps=2), run("tensor4", 4, num_steps=2)]
    four = run_ranks("train_worker.py", 4, {"runs": runs}, num_nodes=2)
    return folder, {2: pair, 4: four}


@pytest.mark.parametrize("layout", ["tensor2", "mesh2x2", "tensor4", "zero"])
def test_losses_are_those_of_whole_backbones(outcome: tuple[Path, dict], layout: str) -> None:
    folder, _ = outcome
    found, expected = metrics(folder / layout), metrics(folder / "data2")
    assert len(found) == (4 if layout == "tensor2" else 2)
    tags = [tag for tag in expected[0] if "loss" in tag]
    assert len(tags) >= 7
    for tag in tags:
        assert found[0][tag] == pytest.approx(expected[0][tag], rel=1e-6 if layout == "tensor2" else 1e-5), tag
    # Detection amplifies rounding from step to step; the smooth head shows that nothing else differs.
    losses = [[line["probe/loss"] for line in lines] for lines in (found, expected[: len(found)])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if layout == "zero" else 1e-5)


def test_runs_end_with_metrics_and_say_how_they_were_split(outcome: tuple[Path, dict]) -> None:
    folder, results = outcome
    for own in (results[2]["outcomes"][1], *results[4]["outcomes"]):
        assert all(rank["metrics"] == own[0]["metrics"] for rank in own)
        assert own[0]["metrics"].keys() == set(BOTH)
    whole, split = starts(folder / "data2")[0], starts(folder / "mesh2x2")[0]
    assert whole["mesh"] == {"data": 2, "tensor": 1}
    assert split["mesh"] == {"data": 2, "tensor": 2}
    assert any(line.startswith("mesh ") and "2 data x 2 tensor" in line for line in split["lines"])
    assert split["backbone"]["fingerprint"] == whole["backbone"]["fingerprint"]
    assert split["parameters"] == whole["parameters"]
    assert split["backbone"]["tensor_degree"] == 2
    assert split["backbone"]["resident_parameters"] < 0.6 * split["parameters"]["backbone"]["all"]


def test_a_run_moves_from_a_split_backbone_to_whole_ones(outcome: tuple[Path, dict]) -> None:
    folder, results = outcome
    killed, resumed = results[2]["outcomes"][2:4]
    assert killed == [{"killed": True}] * 2
    assert all(own.keys() == {"metrics"} for own in resumed)
    assert [(start["start_step"], start["mesh"]["tensor"]) for start in starts(folder / "moving")] == [(0, 2), (2, 1)]
    losses = [[line["probe/loss"] for line in metrics(folder / run)] for run in ("moving", "data2")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def detections(run: Path) -> list[dict]:
    return json.loads((run / "results_detection.json").read_text())


def same(found: list[dict], expected: list[dict]) -> bool:
    """Return whether the same was found, but for rounding."""
    assert len(expected) > 10
    assert [entry["image_id"] for entry in found] == [entry["image_id"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-5)
    return True


def test_evaluation_in_another_layout_finds_the_same(outcome: tuple[Path, dict]) -> None:
    folder, results = outcome
    _, whole, split = results[2]["metrics"]
    assert whole[0] == whole[1]
    assert split[0] == split[1]
    for head, values in whole[0].items():
        assert split[0][head] == pytest.approx(values, abs=1e-3)
    assert same(detections(folder / "split"), detections(folder / "data2"))


def test_a_single_process_evaluates_what_a_group_has_trained(outcome: tuple[Path, dict]) -> None:
    folder, _ = outcome
    expected = detections(folder / "detection")
    evaluate_run(folder / "detection", device="cpu", say=lambda text: None)
    assert json.loads((folder / "detection/evaluation.json").read_text())["num_samples"] == 5
    assert same(detections(folder / "detection"), expected)


def test_meshes_that_cannot_be_are_refused_on_every_rank(outcome: tuple[Path, dict]) -> None:
    folder, results = outcome
    too_many, wrong = results[2]["outcomes"][4:6]
    for own in too_many:
        assert own["error"].startswith("LaunchError: mesh.tensor is 4 but there are 2 process(es)")
    for own in wrong:
        assert own["error"].startswith("LaunchError: the recipe of rank 1 is not that of rank 0")
    assert not (folder / "tensor4_of_2").exists()


def test_a_tensor_group_may_span_nodes_and_says_so(outcome) -> None:
    """Two ranks on each of two nodes: degree 2 stays in a node, degree 4 does not; losses are compared above."""
    folder, _ = outcome
    across = {"tensor2": 0, "mesh2x2": 0, "tensor4": 1}
    for name, number in across.items():
        start = starts(folder / name)[-1]
        assert start["tensor_groups_across_nodes"] == number
        told = [note for note in start["notes"] if "on several nodes" in note]
        assert len(told) == number
    assert told[0].startswith("1 of 1 tensor groups have ranks on several nodes")
