"""Report a plan: a table of layouts and the conclusions below it, or JSON."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from typing import Any

from permafrost.launcher.plan.advice import flags
from permafrost.launcher.plan.planner import Planner, Row


def as_json(planner: Planner, rows: list[Row], own: Row, best: Row | None, changes: list[tuple[str, Row]]) -> Any:
    """Return everything, in bytes, operations and seconds."""

    def plain(row: Row) -> dict[str, Any]:
        return {**dataclasses.asdict(row), "fits": planner.fits(row), "engine": row.layout.engine}

    return {
        "recipe": planner.experiment.name,
        "machines": dataclasses.asdict(planner.machines),
        "objects": planner.objects,
        "classes": planner.num_classes,
        "rows": [plain(row) for row in rows],
        "own": plain(own),
        "recommended": None if best is None else plain(best),
        "remedies": [{"change": text, **plain(row)} for text, row in changes],
        "notes": planner.notes,
    }


def conclusions(
    planner: Planner, rows: list[Row], own: Row, best: Row | None, changes: list[tuple[str, Row]]
) -> list[str]:
    """Return the lines below the table."""
    machines = planner.machines
    lines = [
        f"step         {planner.experiment.loop.global_batch} {planner.data.unit} = {own.micro_batch} x {machines.world_size} rank(s) x "
        f"{own.layout.accumulation} micro-batch(es); {own.flops / 1e12:.2f} TFLOP a rank"
    ]
    if own.sent:
        parts = ", ".join(f"{name} {_mib(num_bytes)}" for name, num_bytes in own.sent.items())
        lines.append(f"wire         {parts} MiB a rank and step (the recipe's layout)")
    if machines.memory is not None:
        usable = f"{machines.usable / 2**30:.1f} of {machines.memory / 2**30:.1f} GiB can be filled"
        if not planner.fits(own):
            lines.append(
                f"too large    the recipe's layout needs {own.peak / 2**30:.1f} GiB, in the {own.phase}: {usable}"
            )
        others = [row for row in rows if not planner.fits(row) and row is not own]
        if others:
            least = min(row.peak for row in others) / 2**30
            lines.append(f"too large    {len(others)} other layout(s) above, {least:.1f} GiB and more: {usable}")
    for text, row in changes:
        lines.append(f"it fits with {text}: {row.peak / 2**30:.1f} GiB")
    if not planner.fits(own) and not changes:
        lines.append(
            "nothing makes it fit, not even all changes together: take smaller images, a smaller network or head, or larger GPUs"
        )
    if best is not None:
        what = flags(best.layout, own.layout) or "as the recipe says"
        judged = f"{best.peak / 2**30:.1f} GiB" + (
            "" if machines.memory is not None else " (no --gpu-memory to judge it by)"
        )
        lines.append(
            f"recommended  tensor {best.layout.tensor}, {best.layout.engine}: {what}; {judged}, about {best.seconds:.3g} s a step "
            f"at {machines.tflops:g} TFLOP/s"
        )
    return lines + [f"note: {note}" for note in planner.notes]


def print_table(planner: Planner, rows: list[Row], own: Row) -> None:
    """Print a row for each layout: for people on a terminal, else separated by tabs."""
    names = list(rows[0].memory)
    header = ["tensor", "engine", *names, "fits", "wire MiB", "s/step"]
    lines = [
        [
            ("*" if row is own else "") + str(row.layout.tensor),
            row.layout.engine,
            *(_mib(row.memory[name]) for name in names),
            "" if planner.machines.memory is None else "yes" if planner.fits(row) else "NO",
            _mib(sum(row.sent.values())),
            f"{row.seconds:.3g}",
        ]
        for row in rows
    ]
    print(f"{planner.experiment.name}: MiB on each rank's device; * is what the recipe says")
    if not sys.stdout.isatty():
        print("\n".join("\t".join(line) for line in (header, *lines)))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, justify="left" if name in ("engine", "fits") else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    Console(width=max(100, shutil.get_terminal_size().columns)).print(table)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f}" if num_bytes >= 10 * 2**20 else f"{num_bytes / 2**20:.1f}"
