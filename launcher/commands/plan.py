"""`permafrost plan`: predict what a recipe's step holds, sends and takes on GPUs that need not be here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from permafrost.launcher.commands.arguments import split_recipe
from permafrost.launcher.exit_codes import DONE, FAILED
from permafrost.launcher.recipes.overrides import parse_experiment

if TYPE_CHECKING:
    from permafrost.launcher.plan.planner import Planner, Row

EPILOG = """All numbers are of one rank and of one optimizer step. Nothing is downloaded, and no weights, data or GPU are needed.
Not counted: CUDA's context, workspaces of its libraries, gaps of the allocator; 8 % of a GPU are left to them.
Times are arithmetic at --tflops plus traffic at 300 GB/s in a node and 40 GB/s between nodes, one after the other; what is
bound by memory comes on top.

Exit code: 0; 1 if no layout fits.

  permafrost plan coco:swinv2_base_fpn --gpus 8 --gpu-memory 80
  permafrost plan coco:swinv2_base_fpn --gpus 8 --nodes 4 --gpu-memory 40 --backbone.name swinv2_giant"""


def make_parser() -> argparse.ArgumentParser:
    """Options of the command itself."""
    parser = argparse.ArgumentParser(
        prog="permafrost plan",
        usage="permafrost plan RECIPE [--gpus N] [--nodes N] [--gpu-memory GB] [--tflops T] [--objects N] "
        "[--classes N] [--device cuda|cpu] [--json] [--field.sub value ...]",
        description="Predict memory, traffic and time of a recipe for every tensor degree and engine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=_count("GPUs"), default=1, metavar="N", help="GPUs of each node (default 1)")
    parser.add_argument("--nodes", type=_count("nodes"), default=1, metavar="N", help="nodes (default 1)")
    parser.add_argument(
        "--gpu-memory",
        type=_amount("GB of memory"),
        metavar="GB",
        help="memory of each GPU in units of 2^30 bytes, to say what fits",
    )
    parser.add_argument(
        "--tflops",
        type=_amount("TFLOP/s"),
        default=400.0,
        metavar="T",
        help="10^12 operations that a GPU really computes in a second (default 400: two fifths of an H100's bfloat16)",
    )
    parser.add_argument(
        "--objects",
        type=_count("objects"),
        metavar="N",
        help="objects in each image (segmentation: classes) to plan for",
    )
    parser.add_argument("--classes", type=_count("classes"), metavar="N", help="classes of the data set")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="plan for GPUs (the default), or for a run on CPUs"
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    return parser


def run(argv: Sequence[str]) -> int:
    """Print the plan; returns 0, or 1 where nothing fits."""
    options, recipe, fields = split_recipe(make_parser(), argv)
    description = "Besides these fields: --gpus, --nodes, --gpu-memory and others (see `permafrost plan --help`)."
    experiment = parse_experiment(recipe, fields, description=description, command="plan")

    from permafrost.launcher.plan.advice import recommend, remedies
    from permafrost.launcher.plan.planner import Machines, Planner

    machines = Machines(
        gpus=options.gpus,
        nodes=options.nodes,
        memory=None if options.gpu_memory is None else round(options.gpu_memory * 2**30),
        tflops=options.tflops,
        device_type=options.device,
    )
    planner = Planner(experiment, machines, objects=options.objects, num_classes=options.classes)
    rows = planner.table()
    own = next(row for row in rows if row.layout == planner.own)
    best = recommend(planner, rows)
    changes = [] if planner.fits(own) else remedies(planner, own, rows)
    if options.json:
        print(json.dumps(as_json(planner, rows, own, best, changes), indent=2))
    else:
        _print_table(planner, rows, own)
        print("\n".join(conclusions(planner, rows, own, best, changes)))
    return DONE if changes or any(map(planner.fits, rows)) else FAILED


def as_json(planner: Planner, rows: list[Row], own: Row, best: Row | None, changes: list[tuple[str, Row]]) -> Any:
    """Everything, in bytes, operations and seconds."""

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
    """The lines below the table."""
    from permafrost.launcher.plan.advice import flags

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


def _print_table(planner: Planner, rows: list[Row], own: Row) -> None:
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


def _count(what: str) -> Any:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {what}: give 1 or more")
        return int(text)

    return count


def _amount(what: str) -> Any:
    def amount(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is no amount of {what}: give a number above 0")
        return value

    return amount
