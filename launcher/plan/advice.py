"""Give advice on a plan: the layout to take, and what makes one fit that does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from permafrost.launcher.experiment import OffloadMode
from permafrost.launcher.plan.planner import STAGES, Layout, Planner, Row

HOST_OPTIMIZER = "a DeepSpeed JSON with offload_optimizer to the cpu (--engine.deepspeed-config)"


def recommend(planner: Planner, rows: Sequence[Row]) -> Row | None:
    """Return the fastest row that fits; of those within 2 % of it the simplest. None: none fits."""
    # Several nodes are DeepSpeed's.
    single = planner.machines.nodes == 1
    eligible = [row for row in rows if planner.fits(row) and (row.layout.stage or single)]
    if not eligible:
        return None
    fastest = min(row.seconds for row in eligible)
    close = [row for row in eligible if row.seconds <= 1.02 * fastest]
    return min(close, key=lambda row: (row.layout.tensor, row.layout.stage, row.peak))


def remedies(planner: Planner, row: Row, rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Return (change, row) of each single change that makes a row fit, else of the smallest of all together; empty: nothing helps."""
    layout = row.layout
    found = [(flags(changed, layout), planner.row(changed)) for changed in _single_changes(planner, layout)]
    found += [(flags(other.layout, layout), other) for other in rows if _differs_once(other.layout, layout)]
    fitting = [(text, changed) for text, changed in found if planner.fits(changed)]
    if fitting:
        return fitting
    offload: OffloadMode = "all" if planner.experiment.backbone.frozen else "off"
    smallest = replace(layout, accumulation=_most_micro_batches(planner), offload=offload)
    everything = [
        planner.row(replace(smallest, tensor=tensor, stage=stage, offload_optimizer=stage > 0))
        for tensor in planner.degrees
        for stage in STAGES
    ]
    fitting_all = [one for one in everything if planner.fits(one)]
    if not fitting_all:
        return []
    best = min(fitting_all, key=lambda one: (one.layout.tensor, one.layout.stage))
    return [(flags(best.layout, layout), best)]


def flags(new: Layout, old: Layout) -> str:
    """Return what to add to the command line of one layout for another."""
    parts = []
    if new.tensor != old.tensor:
        parts.append(f"--mesh.tensor {new.tensor}")
    if new.accumulation != old.accumulation:
        parts.append(f"--engine.accumulation {new.accumulation}")
    if new.offload != old.offload:
        parts.append(f"--engine.offload {new.offload}")
    if new.stage != old.stage:
        parts.append("--engine.kind deepspeed" if new.stage else "--engine.kind accelerate")
        parts += [f"--engine.zero-stage {new.stage}"] if new.stage else []
    if new.offload_optimizer and not old.offload_optimizer:
        parts.append(HOST_OPTIMIZER)
    return " ".join(parts)


def _single_changes(planner: Planner, layout: Layout) -> list[Layout]:
    changes = []
    most = _most_micro_batches(planner)
    more = next((count for count in range(layout.accumulation + 1, most + 1) if most % count == 0), None)
    if more is not None:
        changes.append(replace(layout, accumulation=more))
    # Of a backbone that is trained a plan does not know what offload moves.
    modes: list[OffloadMode] = ["off", "features", "all"] if planner.experiment.backbone.frozen else ["off"]
    changes += [replace(layout, offload=mode) for mode in modes[modes.index(layout.offload) + 1 :]]
    if layout.stage and not layout.offload_optimizer:
        changes.append(replace(layout, offload_optimizer=True))
    return changes


def _differs_once(new: Layout, old: Layout) -> bool:
    """Return whether two layouts differ in the tensor degree or the engine, and in nothing else."""
    return new != old and old in (replace(new, tensor=old.tensor), replace(new, stage=old.stage))


def _most_micro_batches(planner: Planner) -> int:
    """Return the number of micro-batches a step where each has one image."""
    return planner.experiment.loop.global_batch // planner.machines.world_size
