"""The loop with a backbone that learns: one process, DDP and ZeRO 1, 2 and 3 take the same steps, and a run moves between
them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import Tensor

pytestmark = pytest.mark.slow  # groups of processes, started for minutes in all

KINDS: dict[str, dict] = {
    "accelerate": {},
    **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)},
}
TRAINED = {"frozen": False, "drop_path_rate": 0.2, "learning_rate_factor": 0.1}
AGAIN = {**TRAINED, "checkpoint_activations": True}
AGAIN_KINDS = ("accelerate", "zero3")


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "data/epoch" in line]


def tensors(run: Path, step: int, head: str, file: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run / f"checkpoints/step_{step:08d}/{head}/{file}.safetensors")


def relative(found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> float:
    """L2 distance of all tensors of a prefix together, relative to the expected ones' norm."""
    names = [name for name in expected if name.startswith(prefix)]
    assert names
    norm = math.sqrt(sum(expected[name].double().square().sum().item() for name in names))
    return math.sqrt(sum((found[n].double() - expected[n].double()).square().sum().item() for n in names)) / norm


def run(folder: Path, name: str, head: str, **fields: object) -> dict:
    defaults = {"backbone": TRAINED, "num_steps": 1, "checkpoint_every": 100, "keep_checkpoints": 1}
    return {"output": str(folder / name), "heads": [head], **defaults, **fields}


def first(folder: Path, name: str, **fields: object) -> dict:
    return run(folder, f"first_{name}", "detection", checkpoint_every=1, **fields)


@pytest.fixture(scope="module")
def outcome(run_ranks: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[Any]]]:
    """The runs of all tests: {ranks: outcomes}."""
    folder = tmp_path_factory.mktemp("fine_tune")
    long = {"num_steps": 20, "checkpoint_every": 20}
    alone = [first(folder, "alone"), run(folder, "alone", "probe", **long)]
    pair = [
        *(first(folder, kind, engine=engine) for kind, engine in KINDS.items()),
        *(run(folder, kind, "probe", engine=engine, **long) for kind, engine in KINDS.items()),
    ]
    return folder, {
        1: run_ranks("train_worker.py", 1, {"runs": alone})["outcomes"],
        2: run_ranks("train_worker.py", 2, {"runs": pair}, timeout=500)["outcomes"],
    }


@pytest.fixture(scope="module")
def more(outcome: tuple[Path, dict], run_ranks: Callable) -> dict[int, list[Any]]:
    """Further runs in the same folder, for slow tests: {ranks: outcomes}, and of a run that moves from two ranks to one."""
    folder, _ = outcome
    moving = {"num_steps": 6, "checkpoint_every": 3}
    alone = [
        first(folder, "accumulated", engine={"accumulation": 2}),
        first(folder, "again", backbone=AGAIN),
        run(folder, "same_rate", "probe", backbone={**TRAINED, "learning_rate_factor": 1.0}, num_steps=3),
    ]
    pair = [
        *(first(folder, f"{kind}_again", engine=KINDS[kind], backbone=AGAIN) for kind in AGAIN_KINDS),
        first(folder, "zero3_accumulated", engine={**KINDS["zero3"], "accumulation": 2}),
        run(folder, "moving", "probe", engine=KINDS["zero3"], kill_after=4, **moving),
    ]
    found = {2: run_ranks("train_worker.py", 2, {"runs": pair})["outcomes"]}
    alone.append(run(folder, "moving", "probe", **moving))
    return {**found, 1: run_ranks("train_worker.py", 1, {"runs": alone})["outcomes"]}


def assert_same_first_step(folder: Path, layout: str) -> None:
    found, expected = folder / f"first_{layout}", folder / "first_alone"
    (ours,), (wanted,) = metrics(found), metrics(expected)
    tags = [tag for tag in wanted if "loss" in tag or "grad_norm" in tag]
    assert len(tags) >= 7
    assert {tag: ours[tag] for tag in tags} == pytest.approx({tag: wanted[tag] for tag in tags}, rel=1e-5)
    # After one step the first moment is a tenth of the gradient.
    moments = [tensors(run, 1, "detection", "optimizer") for run in (found, expected)]
    for part in ("exp_avg.backbone.", "exp_avg.head."):
        assert relative(*moments, part) < 1e-5, part
    nothing = [name for name, moment in moments[1].items() if not moment.any()]
    assert not [name for name in nothing if ".backbone." in name]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_that_of_one_process(outcome: tuple[Path, dict], kind: str) -> None:
    assert_same_first_step(outcome[0], kind)


@pytest.mark.parametrize(
    "layout", ["accumulated", "again", *(f"{kind}_again" for kind in AGAIN_KINDS), "zero3_accumulated"]
)
def test_accumulation_and_recomputing_change_nothing(outcome: tuple[Path, dict], more: dict, layout: str) -> None:
    assert_same_first_step(outcome[0], layout)


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_are_those_of_one_process(outcome: tuple[Path, dict], kind: str) -> None:
    folder, outcomes = outcome
    found, expected = metrics(folder / kind), metrics(folder / "alone")
    losses = [[line["probe/loss"] for line in lines] for lines in (found, expected)]
    assert len(losses[1]) == 20
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    weights = [tensors(run, 20, "probe", "head") for run in (folder / kind, folder / "alone")]
    start = tensors(folder / "first_alone", 1, "detection", "head")
    moved = relative(start, weights[1], "backbone.")
    assert relative(*weights, "backbone.") < 0.05 * moved
    assert all(own.keys() == {"metrics"} for ranks in outcomes.values() for one in ranks for own in one)


def test_the_backbone_has_a_learning_rate_of_its_own(outcome: tuple[Path, dict], more: dict) -> None:
    folder, _ = outcome
    slow, fast = ([line["probe/loss"] for line in metrics(folder / run)[:3]] for run in ("alone", "same_rate"))
    assert slow[0] == fast[0]
    assert slow[1:] != pytest.approx(fast[1:], rel=1e-3)


def test_a_run_moves_from_zero_3_on_two_ranks_to_one_process(outcome: tuple[Path, dict], more: dict) -> None:
    folder, _ = outcome
    assert more[2][-1] == [{"killed": True}] * 2
    assert more[1][-1][0].keys() == {"metrics"}
    starts = [json.loads(line) for line in (folder / "moving/provenance.jsonl").read_text().splitlines()]
    assert [(start["world_size"], start["start_step"]) for start in starts] == [(2, 0), (1, 3)]
    found, expected = metrics(folder / "moving"), metrics(folder / "alone")[:6]
    assert [line["probe/loss"] for line in found] == pytest.approx([line["probe/loss"] for line in expected], rel=1e-4)


def test_it_says_what_it_trains(outcome: tuple[Path, dict]) -> None:
    folder, _ = outcome
    (start,) = [json.loads(line) for line in (folder / "zero3/provenance.jsonl").read_text().splitlines()]
    (line,) = [line for line in start["lines"] if line.startswith("backbone ")]
    assert "trained with its head" in line
    count = start["parameters"]["probe"]
    assert count["trainable"] == count["all"] > start["parameters"]["backbone"]["all"]
    assert any("the backbone's 0.1 of it" in line for line in start["lines"])
