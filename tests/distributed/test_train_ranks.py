"""The loop on two ranks: the same run as on one, faults that both ranks answer alike, and a move from one layout to
another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from permafrost.data.stream.sampler import GlobalStream

NUM_TRAIN = 12


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "data/epoch" in line]


def moments(run: Path, step: int, head: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run / f"checkpoints/step_{step:08d}/{head}/optimizer.safetensors")


def relative(found: dict[str, Tensor], expected: dict[str, Tensor], kind: str) -> float:
    names = [name for name in expected if name.startswith(f"{kind}.")]
    norm = math.sqrt(sum(expected[name].double().square().sum().item() for name in names))
    return math.sqrt(sum((found[n].double() - expected[n].double()).square().sum().item() for n in names)) / norm


@pytest.fixture(scope="module")
def outcome(run_ranks: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, Any]]:
    """All runs of this module: {ranks: outcomes}, in one launch per number of ranks, and what two ranks printed."""
    folder = tmp_path_factory.mktemp("train_ranks")
    both = ["detection", "probe"]
    stream = GlobalStream(NUM_TRAIN, 0)
    # The second half of a step's four samples is rank 1's: only that rank sees what is bad.
    bad_of_rank_1 = [stream.key(4 * step + 3).index for step in (0, 1, 2)]

    def common(ranks: int) -> list[dict]:
        return [
            {"output": str(folder / f"plain{ranks}"), "heads": both},
            {"output": str(folder / f"first{ranks}"), "heads": both, "num_steps": 1},
            {"output": str(folder / f"nan{ranks}"), "heads": both, "bad": bad_of_rank_1, "num_steps": 8},
        ]

    alone = run_ranks("train_worker.py", 1, {"runs": common(1)})["outcomes"]
    runs = [
        *common(2),
        {"output": str(folder / "accumulated"), "heads": both, "num_steps": 1, "engine": {"accumulation": 2}},
        {"output": str(folder / "disagree"), "heads": ["probe"], "wrong_rank": 1},
        {"output": str(folder / "odd"), "heads": ["probe"], "global_batch": 3},
        {"output": str(folder / "must"), "heads": ["probe"], "resume": "must"},
        {"output": str(folder / "moving"), "heads": ["probe"], "kill_after": 4},
        *(
            {
                "output": str(folder / f"zero{stage}"),
                "heads": both,
                "bad": [stream.key(4 * 2 + 3).index],
                "num_steps": 4,
                "image_every": 2,
                "engine": {"kind": "deepspeed", "zero_stage": stage, "accumulation": accumulation},
            }
            for stage, accumulation in ((2, 1), (3, 2))
        ),
    ]
    pair = run_ranks("train_worker.py", 2, {"runs": runs})
    moved = run_ranks("train_worker.py", 1, {"runs": [{"output": str(folder / "moving"), "heads": ["probe"]}]})[
        "outcomes"
    ]
    return folder, {1: alone, 2: pair["outcomes"], 0: moved, "output": pair["output"]}


def test_the_first_step_on_two_ranks_is_that_on_one(outcome: tuple[Path, dict]) -> None:
    folder, _ = outcome
    (expected,) = metrics(folder / "first1")
    for layout in ("first2", "accumulated", "zero2", "zero3"):
        if layout.startswith("first") or layout == "accumulated":
            for head in ("detection", "probe"):
                assert (
                    relative(moments(folder / layout, 1, head), moments(folder / "first1", 1, head), "exp_avg") < 1e-5
                )
        found = metrics(folder / layout)[0]
        for tag in expected:
            if "loss" in tag or "grad_norm" in tag:
                assert found[tag] == pytest.approx(expected[tag], rel=1e-5), tag


def test_a_smooth_head_stays_the_same_to_the_end(outcome: tuple[Path, dict]) -> None:
    folder, outcomes = outcome
    found, expected = metrics(folder / "plain2"), metrics(folder / "plain1")
    assert [line["probe/loss"] for line in found] == pytest.approx([line["probe/loss"] for line in expected], rel=1e-5)
    assert outcomes[2][0][0].keys() == {"metrics"}
    # Every rank hands back the same metrics.
    assert outcomes[2][0][0] == outcomes[2][0][1]


def test_what_is_not_finite_on_one_rank_is_skipped_on_both(outcome: tuple[Path, dict]) -> None:
    folder, outcomes = outcome
    for ranks in (1, 2):
        for own in outcomes[ranks][2]:
            assert own["error"].startswith(
                "TrainingStopped: stopped by losses that were not finite: probe (after step 3)"
            )
    evidence = json.loads((folder / "nan2/nonfinite_probe.json").read_text())["ranks"]
    assert [[entry["step"] for entry in rank] for rank in evidence] == [[1, 2, 3], [1, 2, 3]]
    seen = [[(s["epoch"], s["index"]) for entry in rank for s in entry["samples"]] for rank in evidence]
    stream = GlobalStream(NUM_TRAIN, 0)
    keys = [stream.key(position) for position in range(12)]
    assert sorted(seen[0] + seen[1]) == sorted((key.epoch, key.index) for key in keys)
    assert not set(seen[0]) & set(seen[1])
    # The other head has gone on to the end, on both.
    assert [line["step"] for line in metrics(folder / "nan2")] == list(range(1, 9))
    assert all(math.isfinite(line["detection/loss"]) for line in metrics(folder / "nan2"))


@pytest.mark.parametrize("layout", ["plain1", "plain2", "zero2", "zero3"])
def test_collectives_are_timed(outcome: tuple[Path, dict], layout: str) -> None:
    """In the second step, and not in every one; a single process has none."""
    lines = metrics(outcome[0] / layout)
    timed = [line["step"] for line in lines if "time/communication" in line]
    assert timed == ([] if layout == "plain1" else [2])
    for line in lines[1:2] if timed else []:
        assert 0 < line["time/communication"] < line["time/backbone"] + line["time/heads"]


def test_timing_them_prints_nothing(outcome: tuple[Path, dict]) -> None:
    """The profiler has lines of its own: USDT, STAGE, ERROR."""
    lines = outcome[1]["output"].splitlines()
    assert not [line for line in lines if "profiler" in line.lower() or line.startswith(("ERROR", "USDT"))]


@pytest.mark.parametrize("stage", [2, 3])
def test_the_loop_runs_on_deepspeed(outcome: tuple[Path, dict], stage: int) -> None:
    folder, outcomes = outcome
    for own in outcomes[2][6 + stage]:
        assert own.keys() == {"metrics"}
        assert own["metrics"].keys() == {"detection", "probe"}
    lines = metrics(folder / f"zero{stage}")
    assert [line["probe/skipped_steps"] for line in lines] == [0, 0, 1, 1]
    assert [line["detection/skipped_steps"] for line in lines] == [0, 0, 0, 0]
    expected = [line["probe/loss"] for line in metrics(folder / "plain1")[:2]]
    assert [line["probe/loss"] for line in lines[:2]] == pytest.approx(expected, rel=1e-4)
    # The skipped step has left the weights alone: the next loss is that of the weights after the second step.
    state = json.loads((folder / f"zero{stage}/checkpoints/step_00000004/state.json").read_text())
    assert state["heads"]["probe"]["optimizer_step"] == 3
    assert state["heads"]["detection"]["optimizer_step"] == 4


def test_mistakes_are_raised_on_every_rank(outcome: tuple[Path, dict]) -> None:
    _, outcomes = outcome
    disagree, odd, must = outcomes[2][4:7]
    for own in disagree:
        assert own["error"].startswith("LaunchError: the recipe of rank 1 is not that of rank 0")
    for own in odd:
        assert own["error"].startswith("LaunchError: loop.global_batch 3 does not divide over 2 process(es)")
    for own in must:
        assert own["error"].startswith("RunFolderError: --resume is must")


def test_a_run_moves_from_two_ranks_to_one(outcome: tuple[Path, dict], run_ranks: Callable) -> None:
    folder, outcomes = outcome
    assert outcomes[2][7] == [{"killed": True}, {"killed": True}]
    assert outcomes[0][0][0].keys() == {"metrics"}
    starts = [json.loads(line) for line in (folder / "moving/provenance.jsonl").read_text().splitlines()]
    assert [(start["world_size"], start["start_step"]) for start in starts] == [(2, 0), (1, 3)]
    found, expected = metrics(folder / "moving"), metrics(folder / "plain1")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["probe/loss"] for line in found] == pytest.approx([line["probe/loss"] for line in expected], rel=1e-5)
    weights = [
        safetensors.torch.load_file(folder / run / "checkpoints/step_00000006/probe/head.safetensors")
        for run in ("moving", "plain1")
    ]
    for name, tensor in weights[1].items():
        assert torch.allclose(weights[0][name], tensor, rtol=1e-4, atol=1e-6), name
