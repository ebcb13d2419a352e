"""Rows 16 and 17: ranks that disagree are refused before the first step; an error of one rank is told once, by it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import permafrost.launcher
from permafrost.data.build import located
from permafrost.data.worlds.config import ShapesDataConfig, ShapesWorld
from permafrost.model.swin.v2 import SwinV2
from permafrost.model.swin.weights import draw_weights


@pytest.mark.slow
def test_an_error_on_one_rank(start, tmp_path) -> None:
    """Row 17. Its traceback is printed once, and comes first; the others say in a line whose fault it is."""
    run = tmp_path / "run"
    job = start(
        "endless",
        *("--output", str(run), "--loop.process-group-timeout", "20"),
        ranks=2,
        launcher="torchrun",
        fault={"do": "raise", "rank": 1, "at": "step", "number": 3},
    )
    job.gone_after(60)
    assert job.processes[0].returncode != 0
    output = job.output()
    # torchrun ends with a traceback of its own, which says nothing of ours.
    assert output.count("in act\n") == 1, output
    (told,) = [line for line in output.splitlines() if line.startswith("error: rank 0 of 2")]
    assert re.search(r"rank 1 \(pid \d+ on \S+\) failed: KeyError: 'the odd one'", told)
    assert output.index("in act\n") < output.index("error: rank 0 of 2")
    beats = [json.loads(path.read_text()) for path in sorted((run / "heartbeats").iterdir())]
    assert [beat["phase"] for beat in beats] == ["lost", "failed"]


def refused(job, what: str) -> None:
    """Both ranks end with 2, before anything is trained; the main one says why."""
    assert job.codes(timeout=90) == [2, 2], job.all_output()
    (line,) = [line for line in job.output(0).splitlines() if line.startswith("error: ")]
    assert what in line, line


def test_another_recipe(start, tmp_path) -> None:
    """Row 16. The dotted fields and both values; fields that decide how ranks talk to each other among them."""
    run = tmp_path / "run"
    job = start("smooth", "--output", str(run), ranks=2, more=[[], ["--loop.global-batch", "6", "--loop.seed", "3"]])
    refused(job, "the recipe of rank 1 is not that of rank 0: ")
    assert "loop.global_batch is 6 there and 4 on rank 0; loop.seed is 3 there and 0 on rank 0" in job.output(0)
    assert not run.exists()


@pytest.mark.slow
def test_other_code(start, tmp_path) -> None:
    """Row 16. The same version number, and a line that differs."""
    copy, run = tmp_path / "copy", tmp_path / "run"
    checkout = Path(permafrost.launcher.__file__).resolve().parents[1]
    shutil.copytree(checkout / "permafrost", copy / "permafrost")
    for part in ("configs", "data", "heads", "launcher", "model"):
        ignored = shutil.ignore_patterns("__pycache__", "pretrained")
        shutil.copytree(checkout / part, copy / "permafrost" / part, ignore=ignored)
    with (copy / "permafrost/launcher/ranks/division.py").open("a") as file:
        file.write("# another line\n")
    variables = [{}, {"PYTHONPATH": str(copy)}]
    job = start("smooth", "--output", str(run), ranks=2, rank_variables=variables)
    refused(job, "the code of rank 1 is not that of rank 0: permafrost is '")
    assert not run.exists()


@pytest.fixture
def machines(tmp_path) -> list[Path]:
    """Two folders with the same files in them: a small COCO data set and a backbone's weights."""
    first, second = tmp_path / "machine0", tmp_path / "machine1"
    world = ShapesWorld(num_train=12, num_val=5, image_side=64, objects=(1, 4))
    located(ShapesDataConfig(root=str(first / "world"), image_size=64, world=world))
    network = SwinV2("swinv2_nano", window_size=8)
    save_file(dict(draw_weights(network, seed=0)), first / "weights.safetensors")
    shutil.copytree(first, second)
    return [first, second]


FILES = ("--backbone.weights", "weights.safetensors", "--data.root", "world")
WINDOWS = ("--backbone.window-size", "8", "--backbone.pretrained-window-size", "8")


@pytest.mark.slow
def test_other_annotations(start, tmp_path, machines) -> None:
    """Row 16. The same path, and one annotation less on one machine."""
    path = machines[1] / "world/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    run = tmp_path / "run"
    job = start("on_disk", "--output", str(run), *FILES, *WINDOWS, ranks=2, cwds=machines)
    refused(job, "the training set of rank 1 is not that of rank 0")
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
def test_other_weights(start, tmp_path, machines) -> None:
    """Row 16. The same path, and one number of the backbone is another one."""
    path = machines[1] / "weights.safetensors"
    tensors = load_file(path)
    tensors["patch_embed.proj.bias"][3] += 1e-3
    save_file(tensors, path)
    run = tmp_path / "run"
    job = start("on_disk", "--output", str(run), *FILES, *WINDOWS, ranks=2, cwds=machines)
    refused(job, "the backbone of rank 1 is not that of rank 0")
    assert not (run / "checkpoints").exists()
