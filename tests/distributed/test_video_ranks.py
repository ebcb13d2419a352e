"""A video head with learned position codes through the whole loop on two ranks: the first step and its evaluation are those of one
process, under DDP, ZeRO 2 and ZeRO 3."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # groups of processes, started for minutes in all

KINDS = {
    "accelerate": [],
    **{f"zero{stage}": ["--engine.kind", "deepspeed", "--engine.zero-stage", str(stage)] for stage in (2, 3)},
}
NUM_STEPS, NUM_VAL = 2, 5
FIELDS = {
    "backbone.weights": "random",
    "data.world.num-train": 8,
    "data.world.num-val": NUM_VAL,
    "heads.video.model.position": "learned",
    # Another number of rows than the clip has frames: they are resampled.
    "heads.video.model.num-frames": 4,
    "heads.video.model.dropout": 0.0,
    "loop.num-steps": NUM_STEPS,
    "loop.global-batch": 4,
    "loop.num-workers": 0,
    "loop.log-every": 1,
    "loop.image-every": 0,
    "loop.checkpoint-every": NUM_STEPS,
    "loop.evaluation-batch": 2,
}


@pytest.fixture(scope="module")
def runs(run_command: Callable, clean_environment: Callable, free_port: Callable, tmp_path_factory) -> Path:
    """A folder with a run of every kind on two ranks, and one of one process."""
    folder = tmp_path_factory.mktemp("video_ranks")
    flags = [part for name, value in FIELDS.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "permafrost.launcher.train", "quickstart_video", *flags]
    for kind, engine in {"alone": [], **KINDS}.items():
        environs = [clean_environment() for _ in range(1 if kind == "alone" else 2)]
        port = str(free_port())
        for rank, environ in enumerate(environs if len(environs) > 1 else ()):
            environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        own = [*command, *engine, "--output", str(folder / kind)]
        outcomes = run_command([own] * len(environs), environs, 300.0)
        assert all(code == 0 for code, _ in outcomes), outcomes
    return folder


def first_step(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if "data/epoch" in line)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_that_of_one_process(runs: Path, kind: str) -> None:
    found, alone = first_step(runs / kind), first_step(runs / "alone")
    for name in ("loss", "grad_norm"):
        assert found[f"video/{name}"] == pytest.approx(alone[f"video/{name}"], rel=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_clip_is_scored_once(runs: Path, kind: str) -> None:
    metrics = json.loads((runs / kind / "final.json").read_text())["metrics"]["video"]
    alone = json.loads((runs / "alone" / "final.json").read_text())["metrics"]["video"]
    assert metrics.keys() == alone.keys()
    assert metrics["video/num_clips"] == alone["video/num_clips"] == NUM_VAL
