"""`permafrost launch`: run a recipe on every GPU of this machine or, with a hostfile, of many."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from permafrost.launcher.cluster.environment import forwarded, requested
from permafrost.launcher.cluster.hostfile import read_hostfile
from permafrost.launcher.cluster.launch import Launch, run_launch
from permafrost.launcher.cluster.slurm import batch_script
from permafrost.launcher.commands.arguments import (
    add_device,
    add_resume,
    amount,
    number,
    port,
    recipe_parser,
    split_recipe,
)
from permafrost.launcher.errors import LaunchError
from permafrost.launcher.machine import num_gpus
from permafrost.launcher.ranks.division import micro_batch_size, require_mesh
from permafrost.launcher.recipes.overrides import parse_experiment
from permafrost.launcher.run.folder import RunFolder

EPILOG = """RECIPE and its fields are those of `permafrost train`; every rank gets them as they are given here.

  permafrost launch coco:swinv2_base_fpn
  permafrost launch coco:swinv2_base_fpn --hostfile hosts --dry-run
  permafrost launch coco:swinv2_base_fpn --hostfile hosts --engine.kind deepspeed --export HF_TOKEN --max-restarts 3
  permafrost launch coco:swinv2_base_fpn --slurm run.sbatch --num-nodes 4 --num-procs 8

Without --hostfile, one process starts for each GPU that CUDA_VISIBLE_DEVICES leaves, or a single one where there is
none; --num-procs overrides that. With it, DeepSpeed's launcher starts `slots` processes on each node over pdsh and ssh,
once each node is inspected: ssh, versions, source, GPUs or cores, ports, network, data, weights, space on its disks.

If a rank dies, stops or goes silent, if a node cannot be reached, or if this program ends in any way, every process of
the launch is ended on every node. Ctrl-C and SIGTERM are passed on to the ranks first.

Exit codes: 0 every rank ended well and the run folder has its final.json; 1 training failed on a rank; 2 a mistake,
nothing was trained; 3 a rank, a node or the network was lost; 75 a signal to a rank ended the run, saved; 128 + N stopped by
signal N. Another code is the ranks' own. --max-restarts answers 1 and 3."""


def make_parser() -> argparse.ArgumentParser:
    """Return a parser of the command's own options."""
    parser = recipe_parser(
        "launch",
        usage="[--field.sub value ...] [--hostfile FILE] [options]",
        description="Train a recipe on every GPU of this machine, or of the machines of a hostfile.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="file with one node per line, such as `node01 slots=8`; rank 0 runs on the first",
    )
    parser.add_argument(
        "--num-procs",
        type=number("processes"),
        metavar="N",
        help="processes on this machine (default: one per GPU, or 1 without any)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="inspect the nodes and say what would run, but start nothing"
    )
    parser.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="pass this variable to every rank; may be repeated. NCCL_*, OMP_*, PERMAFROST_* and some others are always passed",
    )
    parser.add_argument(
        "--max-restarts",
        type=number("restarts", 0),
        default=0,
        metavar="N",
        help="start again from the last checkpoint after a fault, up to N times (default 0)",
    )
    parser.add_argument(
        "--patience",
        # Reports come once a second.
        type=amount("seconds", 5),
        default=60.0,
        metavar="SECONDS",
        help="how long a node or rank may be silent or stopped before the launch is ended (default 60)",
    )
    parser.add_argument("--interface", metavar="NAME", help="network interface for messages between ranks")
    parser.add_argument(
        "--master-port", type=port, default=0, metavar="PORT", help="port where ranks meet (default: a free one)"
    )
    parser.add_argument(
        "--ssh-config", type=Path, metavar="FILE", help="ssh configuration to use instead of the user's"
    )
    parser.add_argument(
        "--min-free",
        type=amount("GiB", 0),
        default=1.0,
        metavar="GIB",
        help="free space that the disks of run folder and cache must have (default 1)",
    )
    parser.add_argument(
        "--slurm",
        metavar="FILE",
        help="only write a batch script for sbatch (- is standard output), and start nothing",
    )
    parser.add_argument(
        "--num-nodes", type=number("nodes"), metavar="N", help="nodes that the batch script asks for (default 1)"
    )
    add_resume(parser)
    add_device(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    """Launch; returns the exit code, one of those that `permafrost launch --help` lists.

    Raises:
        LaunchError: nothing was started.
    """
    options, recipe, fields = split_recipe(make_parser(), argv)
    description = "Besides these fields: the options of `permafrost launch --help`."
    experiment = parse_experiment(recipe, fields, description=description, command="launch")

    if options.slurm is not None and options.hostfile is not None:
        raise LaunchError("--slurm and --hostfile exclude each other: Slurm chooses the nodes; give --num-nodes")
    if options.hostfile is not None and options.num_procs is not None:
        raise LaunchError(
            "--num-procs is for one machine: with --hostfile, its slots say how many processes each node has"
        )
    if options.num_nodes is not None and options.slurm is None:
        raise LaunchError("--num-nodes is for --slurm: without it, --hostfile names the nodes")
    nodes = None if options.hostfile is None else read_hostfile(options.hostfile)
    environment = forwarded(os.environ, options.export)
    if options.slurm is not None:
        return _write_script(options, experiment, recipe, fields)
    if options.interface is not None and nodes is None:
        raise LaunchError("--interface is for several nodes: without --hostfile, ranks meet inside this machine")
    if options.ssh_config is not None and nodes is None:
        raise LaunchError("--ssh-config is for several nodes: without --hostfile, ssh is not used")
    launch = Launch(
        recipe=recipe,
        fields=fields,
        resume=options.resume,
        device=options.device,
        nodes=nodes,
        num_procs=options.num_procs,
        environment=environment,
        interface=options.interface,
        master_port=options.master_port,
        ssh_config=None if options.ssh_config is None else options.ssh_config.absolute(),
        patience=options.patience,
        max_restarts=options.max_restarts,
        min_free=int(options.min_free * 2**30),
        command=["permafrost", "launch", *argv],
    )
    if launch.ssh_config is not None and not launch.ssh_config.is_file():
        raise LaunchError(f"--ssh-config {launch.ssh_config} is not a file")
    return run_launch(launch, experiment, dry_run=options.dry_run)


def _write_script(options: argparse.Namespace, experiment, recipe: str, fields: Sequence[str]) -> int:
    num_nodes = options.num_nodes or 1
    num_procs = options.num_procs or num_gpus()
    if not num_procs:
        raise LaunchError("--slurm needs --num-procs N, the processes (GPUs) of each node: this machine shows no GPU")
    world_size = num_nodes * num_procs
    require_mesh(world_size=world_size, tensor=experiment.mesh.tensor)
    micro_batch_size(
        global_batch=experiment.loop.global_batch, world_size=world_size, accumulation=experiment.engine.accumulation
    )
    script = batch_script(
        name=experiment.name,
        arguments=[recipe, *fields, "--resume", options.resume, "--device", options.device],
        exports=requested(os.environ, options.export),
        output=os.path.abspath(RunFolder.of(experiment).path),
        num_nodes=num_nodes,
        num_procs=num_procs,
        uses_gpus=options.device != "cpu",
        max_restarts=options.max_restarts,
    )
    if options.slurm == "-":
        sys.stdout.write(script)
        return 0
    try:
        Path(options.slurm).write_text(script, errors="surrogateescape")
    except OSError as error:
        raise LaunchError(f"--slurm {options.slurm} cannot be written: {error.strerror or error}") from None
    print(f"{options.slurm} is written; `sbatch {options.slurm}` submits it")
    return 0
