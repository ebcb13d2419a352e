"""A running average of the head's weights: the published formula, harmless, resumed bitwise, and what is evaluated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from permafrost.launcher.errors import RecipeError
from permafrost.launcher.evaluate import evaluate_run
from permafrost.launcher.experiment import Experiment, HeadExperiment
from permafrost.launcher.plan.planner import Machines, Planner
from permafrost.launcher.ranks.process_group import join_process_group
from permafrost.launcher.run.checkpoint import load_newest, read_checkpoint
from permafrost.launcher.run.folder import RunFolder
from permafrost.launcher.run.restore import load_trained
from permafrost.launcher.train import train

DECAY = 0.3


@pytest.fixture
def averaged(tiny: Callable[..., Experiment], make_head: Callable[..., HeadExperiment]) -> Callable[..., Experiment]:
    """averaged(output, ema_decay=DECAY, **loop)."""

    def build(output: str, ema_decay: float | None = DECAY, **loop: object) -> Experiment:
        fields = {"num_steps": 5, "checkpoint_every": 1, "keep_checkpoints": 9, **loop}
        return tiny(output, heads={"detection": dataclasses.replace(make_head(), ema_decay=ema_decay)}, **fields)

    return build


def tensors(run: str, step: int, file: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(Path(run) / f"checkpoints/step_{step:08d}/detection/{file}.safetensors")


def test_it_is_the_average_of_the_weights_and_changes_none(averaged: Callable[..., Experiment]) -> None:
    plain, run = averaged("plain", None), averaged("run")
    train(plain)
    metrics = train(run)
    for step in range(2, 6):
        before, now, weights = tensors(run.output, step - 1, "ema"), tensors(run.output, step, "ema"), None
        weights = tensors(run.output, step, "head")
        # 2/11, 3/12, then 4/13 is above 0.3.
        decay = min(DECAY, (1 + step) / (10 + step))
        for name in now:
            expected = decay * before[name].double() + (1 - decay) * weights[name].double()
            assert torch.allclose(now[name].double(), expected, rtol=1e-5, atol=1e-8), (step, name)
        assert any(not torch.equal(now[name], weights[name]) for name in now)
        for name, tensor in tensors(plain.output, step, "head").items():
            assert torch.equal(tensor, weights[name]), "the head itself trains as without"
    # It is what was scored, and what is used afterwards.
    group = join_process_group("cpu")
    head = load_trained(run.output, group, which="latest").heads["detection"].head
    for name, parameter in head.named_parameters():
        assert torch.equal(parameter, tensors(run.output, 5, "ema")[name])
    assert evaluate_run(run.output, which="latest", device="cpu", say=lambda text: None) == metrics


def test_it_is_resumed_bitwise(averaged: Callable[..., Experiment]) -> None:
    whole, stopped = averaged("whole", evaluate_every=2), averaged("stopped", evaluate_every=2)
    train(whole)
    train(stopped)
    run = RunFolder(stopped.output)
    run.final.unlink()
    for step in (4, 5):
        for path in run.checkpoint_folder(step).rglob("ema.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])
    checkpoint, problems = load_newest(run)
    assert checkpoint.state.step == 3
    assert all("ema.safetensors has" in problem for problem in problems)
    train(stopped)
    for file in ("ema", "head", "optimizer"):
        expected = tensors(whole.output, 5, file)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(stopped.output, 5, file).items())


def test_a_checkpoint_without_one_is_read_as_before(averaged: Callable[..., Experiment]) -> None:
    experiment = averaged("plain", None, num_steps=1)
    train(experiment)
    state = read_checkpoint(RunFolder(experiment.output).checkpoint_folder(1)).heads["detection"]
    assert state.ema is None
    assert state.weights is state.parameters


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 1.5])
def test_what_is_no_decay(decay: float) -> None:
    with pytest.raises(RecipeError, match=r"ema_decay is .*between 0 and 1"):
        HeadExperiment(ema_decay=decay)


def test_plan_counts_it(averaged: Callable[..., Experiment]) -> None:
    rows = {}
    for decay in (None, DECAY):
        planner = Planner(averaged("run", decay, global_batch=2), Machines(gpus=2))
        rows[decay] = planner.table()
    for plain, row in zip(rows[None], rows[DECAY]):
        masters = row.memory["optimizer"] - plain.memory["optimizer"]
        assert masters * (3 if row.layout.stage in (1, 2) else 2) == plain.memory["optimizer"]
