"""The whole path on GPUs, through the real launcher: NCCL, bfloat16 autocast, pinned offload, DeepSpeed, split and trained
backbones, resume, evaluation.

    pytest -m gpu tests/distributed/test_gpu.py

On CUDA some backward kernels add in any order, so what is promised is less than on a CPU (see test_equality.py): the first
step's losses within a stated tolerance of a CPU's from the same weights and images, and nothing bitwise.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BIN = Path(sys.executable).parent
RECIPE = f"{Path(__file__).parents[1] / 'launcher' / 'tiny_recipe.py'}:tiny"
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}
"""Of the first step's losses, relative to a CPU's in float32."""
NUM_STEPS, MIDDLE = 6, 3
COMMON = ["--loop.global-batch", "8", "--loop.num-steps", str(NUM_STEPS), "--loop.checkpoint-every", str(MIDDLE)]
FLOAT32 = ["--engine.precision", "float32"]
ALL_FLOAT32 = [*FLOAT32, "--backbone.dtype", "float32"]
TRAINED = ["--backbone.frozen", "False"]


def zero(stage: int, *more: str) -> list[str]:
    return ["--engine.kind", "deepspeed", "--engine.zero-stage", str(stage), *more]


CASES: dict[str, list[str]] = {
    "ddp": [],
    "ddp float32": ALL_FLOAT32,
    "ddp offload": ["--engine.offload", "all"],
    "zero1": zero(1),
    "zero1 float32": zero(1, *ALL_FLOAT32),
    "zero2 accumulated": zero(2, "--engine.accumulation", "2"),
    "zero2 optimizer on the CPU": zero(2, "--engine.deepspeed-config", "{offload}"),
    "zero3 offload": zero(3, "--engine.offload", "features"),
    "ddp trained": TRAINED,
    "zero3 trained": zero(3, *TRAINED, "--backbone.checkpoint-activations", "True"),
}
SPLIT = {"split": ["--mesh.tensor", "2"], "split zero2": zero(2, "--mesh.tensor", "2", "--engine.offload", "all")}


def lines_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "data/epoch" in line]


@pytest.fixture
def train_on(
    run_command: Callable, clean_environment: Callable, free_port: Callable, tmp_path: Path
) -> Callable[..., Path]:
    """train_on(device, name, fields): a run folder, after torchrun on as many GPUs as divide the batch, or on one CPU rank."""
    offload = tmp_path / "offload.json"
    offload.write_text(
        '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": true}}}'
    )

    def train(device: str, name: str, fields: list[str]) -> Path:
        environ, num_ranks = clean_environment(), 1
        if device == "cuda":
            del environ["CUDA_VISIBLE_DEVICES"]
            num_ranks = max(count for count in (1, 2, 4) if count <= torch.cuda.device_count())
        launcher = [str(BIN / "torchrun"), "--nproc_per_node", str(num_ranks), "--master_port", str(free_port())]
        module = ["-m", "permafrost.launcher.train", RECIPE, "--output", str(tmp_path / name), "--device", device]
        fields = [field.format(offload=offload) for field in fields]
        ((code, text),) = run_command([[*launcher, *module, *COMMON, *fields]], [environ], timeout=280)
        assert code == 0, text[-6000:]
        return tmp_path / name

    return train


def assert_trains_as_on_a_cpu(train_on: Callable[..., Path], fields: list[str]) -> None:
    run = train_on("cuda", "gpu", fields)
    found = lines_of(run)
    assert len(found) == NUM_STEPS
    assert all(math.isfinite(line["detection/loss"]) for line in found)
    assert all(line["detection/skipped_steps"] == 0 for line in found)
    reference = [*FLOAT32, "--loop.num-steps", "1", *(TRAINED if "--backbone.frozen" in fields else [])]
    expected = lines_of(train_on("cpu", "cpu", reference))
    precision = "float32" if "float32" in fields else "bfloat16"
    losses = {tag: value for tag, value in expected[0].items() if tag.startswith("detection/loss")}
    assert len(losses) == 6
    assert {tag: found[0][tag] for tag in losses} == pytest.approx(losses, rel=TOLERANCES[precision])
    (start,) = [json.loads(line) for line in (run / "provenance.jsonl").read_text().splitlines()]
    assert start["device"].startswith("cuda")
    assert precision in start["engines"]["detection"]
    if "--engine.offload" in fields:
        assert found[-1]["offload/share"] > 0
    metrics = json.loads((run / "final.json").read_text())["metrics"]["detection"]
    assert 0 <= metrics["bbox/AP"] <= 1
    assert (run / f"checkpoints/step_{NUM_STEPS:08d}").is_dir()


@pytest.mark.parametrize("case", CASES)
def test_the_whole_path(train_on: Callable[..., Path], case: str) -> None:
    assert_trains_as_on_a_cpu(train_on, CASES[case])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("case", SPLIT)
def test_a_split_backbone(train_on: Callable[..., Path], case: str) -> None:
    assert_trains_as_on_a_cpu(train_on, SPLIT[case])


@pytest.mark.parametrize("case", ["ddp", "zero3 offload"])
def test_a_run_is_resumed(train_on: Callable[..., Path], case: str) -> None:
    """From the checkpoint in the middle, when what came after it is gone: the next loss is that of the first run."""
    run = train_on("cuda", "gpu", CASES[case])
    before = lines_of(run)
    for gone in (f"checkpoints/step_{NUM_STEPS:08d}/state.json", "final.json"):
        (run / gone).unlink()
    train_on("cuda", "gpu", CASES[case])
    starts = [json.loads(line) for line in (run / "provenance.jsonl").read_text().splitlines()]
    assert [start["start_step"] for start in starts] == [0, MIDDLE]
    after = lines_of(run)
    assert [line["step"] for line in after] == list(range(1, NUM_STEPS + 1))
    assert after[MIDDLE]["detection/loss"] == pytest.approx(
        before[MIDDLE]["detection/loss"], rel=TOLERANCES["bfloat16"]
    )
    assert after[MIDDLE]["data/epoch"] == before[MIDDLE]["data/epoch"]
