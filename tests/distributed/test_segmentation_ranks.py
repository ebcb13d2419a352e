"""Mask2Former through the whole loop on two ranks: images without a label on one rank or on both, a validation set that does not
divide, under DDP, ZeRO 2 and ZeRO 3."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from permafrost.data.stream.sampler import GlobalStream

sys.path.insert(0, str(Path(__file__).parent.parent / "data" / "segmentation"))
from scene_files import SIZES, label_path, write_scenes

pytestmark = pytest.mark.slow  # groups of processes, started for minutes in all

NUM_STEPS, GLOBAL_BATCH, NUM_VAL = 3, 4, 3
# What of each step has labels: all, the first rank's half, none.
LABELLED = ((True, True, True, True), (True, True, False, False), (False, False, False, False))
KINDS = {
    "accelerate": [],
    **{f"zero{stage}": ["--engine.kind", "deepspeed", "--engine.zero-stage", str(stage)] for stage in (2, 3)},
}
LOSSES = ("loss_class", "loss_mask", "loss_dice", "loss_auxiliary")


@pytest.fixture(scope="module")
def runs(run_command: Callable, clean_environment: Callable, free_port: Callable, tmp_path_factory) -> Path:
    """A folder with a run of every kind on two ranks, each evaluated by one process afterwards, and one of one process."""
    folder = tmp_path_factory.mktemp("segmentation_ranks")
    num_train = NUM_STEPS * GLOBAL_BATCH
    root = write_scenes(folder / "data", num_train=num_train, num_val=NUM_VAL)
    stream = GlobalStream(num_train, 0)
    for step, own in enumerate(LABELLED):
        for place, has_labels in enumerate(own):
            if not has_labels:
                number = stream.key(step * GLOBAL_BATCH + place).index
                size = SIZES[number % len(SIZES)]
                Image.fromarray(np.zeros(size, dtype=np.uint8)).save(label_path(root, "training", number))
    fields = {"backbone.name": "swinv2_nano", "backbone.weights": "random", "backbone.window-size": "None"}
    fields |= {"data.root": root, "data.image-size": 64, "data.evaluation.short-side": 64}
    model = {"pixel-decoder.channels": 16, "pixel-decoder.ffn-channels": 16, "transformer-decoder.ffn-channels": 16}
    model |= {"transformer-decoder.num-queries": 10, "loss.num-points": 64}
    fields |= {f"heads.segmentation.model.{name}": value for name, value in model.items()}
    loop = {"num-steps": NUM_STEPS, "global-batch": GLOBAL_BATCH, "num-workers": 0, "log-every": 1, "image-every": 0}
    loop |= {"checkpoint-every": NUM_STEPS, "evaluation-batch": 1}
    fields |= {f"loop.{name}": value for name, value in loop.items()}
    flags = [part for name, value in fields.items() for part in (f"--{name}", str(value))]

    def run(name: str, num_ranks: int, engine: list[str]) -> None:
        recipe = "ade20k:swinv2_base_mask2former"
        command = [sys.executable, "-m", "permafrost.launcher.train", recipe, *flags, *engine]
        environs = [clean_environment() for _ in range(num_ranks)]
        port = str(free_port())
        for rank, environ in enumerate(environs if num_ranks > 1 else ()):
            environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
            environ.update(LOCAL_WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        outcomes = run_command([[*command, "--output", str(folder / name)]] * num_ranks, environs, 300.0)
        assert all(code == 0 for code, _ in outcomes), outcomes

    run("alone", 1, [])
    for kind, engine in KINDS.items():
        run(kind, 2, engine)
        again = [sys.executable, "-m", "permafrost.launcher.cli", "evaluate", str(folder / kind)]
        outcomes = run_command([[*again, "--checkpoint", "latest"]], [clean_environment()], 300.0)
        assert outcomes[0][0] == 0, outcomes
    return folder


def steps(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "data/epoch" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_taken_whoever_has_labels(runs: Path, kind: str) -> None:
    found, alone = steps(runs / kind), steps(runs / "alone")
    assert [line["step"] for line in found] == list(range(1, NUM_STEPS + 1))
    for line, own in zip(found, LABELLED):
        values = {name: line[f"segmentation/{name}"] for name in LOSSES}
        assert all(math.isfinite(value) for value in values.values())
        assert values["loss_class"] > 0
        assert all((values[name] > 0) == any(own) for name in ("loss_mask", "loss_dice")), values
    # The counts are those of the global batch, wherever the labels are.
    for name in (*LOSSES, "grad_norm"):
        tag = f"segmentation/{name}"
        assert found[0][tag] == pytest.approx(alone[0][tag], rel=1e-5), tag


@pytest.mark.parametrize("kind", KINDS)
def test_the_confusion_of_all_ranks_is_that_of_one(runs: Path, kind: str) -> None:
    final = json.loads((runs / kind / "final.json").read_text())["metrics"]["segmentation"]
    alone = json.loads((runs / kind / "evaluation.json").read_text())["metrics"]["segmentation"]
    assert final.keys() == alone.keys()
    assert final == pytest.approx(alone, abs=1e-6)
    labelled = 0
    for number in range(NUM_VAL):
        with Image.open(label_path(runs / "data", "validation", number)) as labels:
            labelled += int(np.count_nonzero(np.asarray(labels)))
    assert np.load(runs / kind / "confusion_segmentation.npy").sum() == labelled
