"""`permafrost plan`: predict what a recipe's step holds, sends and takes on GPUs that need not be here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from permafrost.launcher.commands.arguments import amount, number, recipe_parser, split_recipe
from permafrost.launcher.exit_codes import DONE, FAILED
from permafrost.launcher.recipes.overrides import parse_experiment

EPILOG = """All numbers are for one rank and one optimizer step. Nothing is downloaded, and no weights, data or GPU are needed.
CUDA's context, its libraries' workspaces and gaps in the allocator are not counted; 8 % of a GPU is left for them.
Times add arithmetic at --tflops and traffic at 300 GB/s in a node and 40 GB/s between nodes; work that is bound by
memory bandwidth comes on top.

Exit code 0: a layout fits, perhaps after a change that the report names; 1: none fits.

  permafrost plan coco:swinv2_base_fpn --gpus 8 --gpu-memory 80
  permafrost plan coco:swinv2_base_fpn --gpus 8 --nodes 4 --gpu-memory 40 --backbone.name swinv2_giant"""


def make_parser() -> argparse.ArgumentParser:
    """Return a parser of the command's own options."""
    parser = recipe_parser(
        "plan",
        usage="[--gpus N] [--nodes N] [--gpu-memory GB] [--tflops T] [--objects N] "
        "[--classes N] [--device cuda|cpu] [--json] [--field.sub value ...]",
        description="Predict memory, traffic and time of a recipe for every tensor degree and engine.",
        epilog=EPILOG,
    )
    parser.add_argument("--gpus", type=number("GPUs"), default=1, metavar="N", help="GPUs per node (default 1)")
    parser.add_argument("--nodes", type=number("nodes"), default=1, metavar="N", help="number of nodes (default 1)")
    parser.add_argument(
        "--gpu-memory",
        type=amount("GB of memory"),
        metavar="GB",
        help="memory of each GPU in units of 2^30 bytes, to judge what fits",
    )
    parser.add_argument(
        "--tflops",
        type=amount("TFLOP/s"),
        default=400.0,
        metavar="T",
        help="10^12 operations that a GPU really sustains per second (default 400, two fifths of an H100's bfloat16 peak)",
    )
    parser.add_argument(
        "--objects",
        type=number("objects"),
        metavar="N",
        help="objects (in segmentation, classes) per image to plan for",
    )
    parser.add_argument("--classes", type=number("classes"), metavar="N", help="number of classes of the data set")
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
    from permafrost.launcher.plan.report import as_json, conclusions, print_table

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
        print_table(planner, rows, own)
        print("\n".join(conclusions(planner, rows, own, best, changes)))
    return DONE if changes or any(map(planner.fits, rows)) else FAILED
