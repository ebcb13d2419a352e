"""`permafrost plan` against what engines really hold and send, on one rank and on two; see plan_worker.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from permafrost.launcher.plan.planner import Machines, Planner, Row
from permafrost.launcher.recipes.overrides import parse_experiment

pytestmark = pytest.mark.slow  # groups of processes, started for minutes in all

RECIPE = f"{Path(__file__).parents[1] / 'launcher' / 'tiny_recipe.py'}:tiny"
# Parameters on both sides of ZeRO 3's threshold, and activations that outweigh them.
MODEL = "--heads.detection.model"
FIELDS = ["--data.image-size", "128", "--loop.global-batch", "4", f"{MODEL}.neck.channels", "64"]
FIELDS += [f"{MODEL}.box.fc-channels", "256", f"{MODEL}.mask.channels", "64"]
ACCUMULATED = ["--engine.accumulation", "2"]
TRAINED = ["--backbone.frozen", "False", "--backbone.drop-path-rate", "0.1"]
CASES = {
    1: {
        "accelerate": ("accelerate", []),
        "zero1": ("zero1", []),
        "zero3": ("zero3", []),
        "offloaded": ("accelerate", ["--engine.offload", "all", *ACCUMULATED]),
        "swin v1": ("accelerate", ["--backbone.name", "swin_tiny"]),
        "timm": ("accelerate", ["--backbone.name", "timm/convnextv2_atto"]),
        "trained": ("accelerate", TRAINED),
        "trained again": ("accelerate", [*TRAINED, "--backbone.checkpoint-activations", "True"]),
    },
    2: {
        "accelerate": ("accelerate", []),
        "zero1": ("zero1", []),
        "zero2": ("zero2", []),
        "zero3": ("zero3", []),
        "zero2 accumulated": ("zero2", [*ACCUMULATED, "--mesh.tensor", "2"]),
        "zero3 accumulated": ("zero3", ACCUMULATED),
        "trained zero2": ("zero2", TRAINED),
        "trained zero3": ("zero3", TRAINED),
    },
}


@pytest.fixture(scope="module")
def measured(run_ranks) -> dict[int, dict]:
    """{number of ranks: {case: what it holds and sends}}."""

    def measure(num_ranks: int) -> dict:
        cases = {name: (kind, FIELDS + fields) for name, (kind, fields) in CASES[num_ranks].items()}
        return run_ranks("plan_worker.py", num_ranks, {"recipe": RECIPE, "measure": cases})

    return {num_ranks: measure(num_ranks) for num_ranks in CASES}


def predict(num_ranks: int, case: str) -> Row:
    kind, fields = CASES[num_ranks][case]
    planner = Planner(parse_experiment(RECIPE, FIELDS + fields), Machines(gpus=num_ranks, device_type="cpu"))
    return planner.row(replace(planner.own, stage=0 if kind == "accelerate" else int(kind[-1])))


@pytest.mark.parametrize(("num_ranks", "case"), [(n, case) for n, cases in CASES.items() for case in cases])
def test_memory_and_traffic_are_as_predicted(measured, num_ranks: int, case: str) -> None:
    held, sent = measured[num_ranks][case]["held"], measured[num_ranks][case]["sent"]
    row = predict(num_ranks, case)
    assert {name: row.memory[name] for name in held if name != "peak"} == {
        name: pytest.approx(num_bytes, rel=0.05) for name, num_bytes in held.items() if name != "peak"
    }
    # DeepSpeed's bucket of 50 million elements would hide the rest. With several micro-batches the peak of ZeRO 3 differs
    # from run to run by more than the rest's tolerance: when gathered weights are released is not settled.
    bucket = 4 * 50_000_000 if row.layout.stage and case != "zero3 accumulated" else 0
    assert row.peak - bucket == pytest.approx(held["peak"] - bucket, rel=0.15)
    planned: dict[str, int] = {}
    for name, num_bytes in row.sent.items():
        kind = name.split()[-1]
        planned[kind] = planned.get(kind, 0) + num_bytes
    assert planned == {name: pytest.approx(num_bytes, rel=0.01) for name, num_bytes in sent.items()}
    assert bool(sent) == (num_ranks > 1)


def test_zero_sends_what_its_stage_adds(measured) -> None:
    """ZeRO 2 reduces in every micro-batch, and by all-reduce; ZeRO 3 sends no more than DDP while it need not gather twice."""
    two = {name: result["sent"] for name, result in measured[2].items() if name != "output"}
    whole = two["accelerate"]["all-reduce"]
    assert two["zero1"]["all-reduce"] == two["zero2"]["all-reduce"] == pytest.approx(whole, rel=0.001)
    assert two["zero2 accumulated"]["all-reduce"] > 2 * whole
    assert sum(two["zero3"].values()) == pytest.approx(whole, rel=0.01)
    assert two["zero3 accumulated"]["all-gather"] > 4 * two["zero3"]["all-gather"]


def test_what_a_frozen_backbone_saves_is_predicted(measured) -> None:
    """Peak of full fine-tuning over that of a frozen backbone: measured, and planned."""
    (held, whole), (row, trained) = (
        [measured[1][case]["held"]["peak"] for case in ("accelerate", "trained")],
        [predict(1, case).peak for case in ("accelerate", "trained")],
    )
    assert whole > 2 * held
    assert trained / row == pytest.approx(whole / held, rel=0.15)
