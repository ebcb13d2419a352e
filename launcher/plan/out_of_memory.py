"""Raise the error of a full device, with what the run was planned to take and what would take less."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from permafrost.launcher.errors import OutOfDeviceMemory
from permafrost.launcher.plan.advice import remedies
from permafrost.launcher.plan.planner import Machines, Planner

if TYPE_CHECKING:
    from permafrost.launcher.experiment import Experiment
    from permafrost.launcher.ranks.process_group import ProcessGroup

NUM_OPTIONS = 2
GENERAL = (
    "--engine.accumulation {more}: as many images a step, fewer at a time",
    "--engine.offload all: what heads save waits in host memory",
    "--engine.kind deepspeed --engine.zero-stage 3: optimizer and weights of the heads in parts, one on each rank",
)
"""Where a plan cannot be made or names too few."""


@contextmanager
def memory_explained(experiment: Experiment, group: ProcessGroup) -> Iterator[None]:
    """Turn torch's error of a full device into one that says what to change.

    Raises:
        OutOfDeviceMemory: with the estimate of `permafrost plan` and at least two options.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        text = str(error).partition(" If reserved")[0].strip().rstrip(".") or "out of memory"
        raise OutOfDeviceMemory(f"rank {group.rank}, on {group.device}: {text}. {advice(experiment, group)}") from None


def advice(experiment: Experiment, group: ProcessGroup) -> str:
    """Return the estimate, and options that need less. Not collective: the other ranks are busy or gone."""
    estimate = "No estimate could be made"
    options: list[str] = []
    try:
        estimate, options = _from_plan(experiment, group)
    except Exception as error:  # a head or network that plan cannot run must not hide what has happened
        estimate += f" ({type(error).__name__}: {error})"
    more = 2 * experiment.engine.accumulation
    for text in GENERAL:
        if len(options) < NUM_OPTIONS and text.split()[0] not in " ".join(options):
            options.append(text.format(more=more))
    return f"{estimate}. Less is needed with {'; or with '.join(options[:3])}"


def _from_plan(experiment: Experiment, group: ProcessGroup) -> tuple[str, list[str]]:
    is_cuda = group.device.type == "cuda"
    memory = torch.cuda.get_device_properties(group.device).total_memory if is_cuda else None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", group.world_size))
    machines = Machines(gpus=here, nodes=max(1, group.world_size // here), memory=memory, device_type=group.device.type)
    planner = Planner(experiment, machines)
    row = planner.row(planner.own)
    changes = [change for change in remedies(planner, row, planner.table()) if change[1].peak < row.peak]
    changes.sort(key=lambda change: change[1].peak)
    of = "" if memory is None else f" of the device's {memory / 2**30:.1f}"
    estimate = f"The recipe is estimated to need {row.peak / 2**30:.2f} GiB{of} on each rank, most in the {row.phase}"
    return estimate, [f"{text} ({changed.peak / 2**30:.2f} GiB)" for text, changed in changes[:NUM_OPTIONS]]
