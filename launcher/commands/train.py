"""`permafrost train`: train heads. `python -m permafrost.launcher.train` runs it, too, under torchrun, deepspeed and others."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from permafrost.launcher.commands.arguments import add_device, add_resume, recipe_parser, split_recipe
from permafrost.launcher.recipes.overrides import parse_experiment
from permafrost.launcher.run.folder import RunFolder

EPILOG = """RECIPE is a name from `permafrost recipes`, package.module:function, or file.py:function.
Its fields are options: `permafrost train RECIPE --help` shows each with its type and default.

  permafrost train quickstart
  permafrost train quickstart --loop.num-steps 50 --heads.detection.optimizer.learning-rate 2e-4

The same command again continues the run where its last checkpoint left it.
Several processes: torchrun, deepspeed --module, accelerate launch -m or srun with `permafrost.launcher.train RECIPE ...`.

SIGTERM or SIGUSR1 to any rank: all of them save after the step they are in and exit with 75, which asks to be run again;
a second signal ends at once. Exit codes: 0 trained to the end (final.json is in the run folder then, and only then), 1 failed or
stopped, 2 a mistake in command, recipe or files, 75 saved on a signal, 130 Ctrl-C."""


def make_parser() -> argparse.ArgumentParser:
    """Return a parser of the command's own options."""
    parser = recipe_parser(
        "train",
        usage="[--field.sub value ...] [--output DIR] [--init-head RUN] [--resume ...]\n"
        "                        [--device ...]",
        description="Train the heads of a recipe on its frozen backbone.",
        epilog=EPILOG,
    )
    add_resume(parser)
    add_device(parser)
    help_text = (
        "start every head from that run's head, or from a released detector's file, and list what is initialised anew; for one "
        "head only, use --heads.NAME.init RUN"
    )
    parser.add_argument("--init-head", metavar="RUN", help=help_text)
    return parser


def run(argv: Sequence[str]) -> int:
    """Train; returns 0.

    Raises:
        TrainingStopped: non-finite losses stopped a head; the program exits with 1.
    """
    options, recipe, fields = split_recipe(make_parser(), argv)
    description = "Besides these fields: --init-head, --resume, --device (see `permafrost train --help`)."
    experiment = parse_experiment(recipe, fields, description=description)
    if options.init_head is not None:
        for head in experiment.heads.values():
            head.init = options.init_head

    if os.environ.get("RANK", "0") == "0":
        # At once: the imports below take seconds, the weights perhaps minutes.
        RunFolder.of(experiment).require_place()

    from permafrost.launcher.train import train

    train(experiment, resume=options.resume, device=options.device)
    return 0
