"""`permafrost pretrain`: pretrain, with labels, a backbone that others freeze."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from permafrost.launcher.commands.arguments import add_device, add_resume, recipe_parser, split_recipe
from permafrost.launcher.pretraining.config import PretrainExperiment
from permafrost.launcher.recipes.overrides import parse_recipe

EPILOG = """RECIPE is a pretraining recipe from `permafrost recipes`, package.module:function, or file.py:function.
Its fields are options: `permafrost pretrain RECIPE --help` shows each with its type and default.

  permafrost pretrain nano_glyphs_debug"""


def make_parser() -> argparse.ArgumentParser:
    """Return a parser of the command's own options."""
    parser = recipe_parser(
        "pretrain",
        usage="[--field value ...] [--output DIR] [--resume ...] [--device ...]",
        description="Train a backbone by classification; other recipes name its weights in `backbone.weights`.",
        epilog=EPILOG,
    )
    add_resume(parser)
    add_device(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    """Pretrain; returns 0."""
    options, recipe, fields = split_recipe(make_parser(), argv)
    description = "Besides these fields: --resume, --device (see `permafrost pretrain --help`)."
    experiment = parse_recipe(recipe, fields, kind=PretrainExperiment, command="pretrain", description=description)

    from permafrost.launcher.pretraining.trainer import run as pretrain

    command = shlex.join(["permafrost", "pretrain", *argv])
    pretrain(experiment, resume=options.resume, device=options.device, command=command)
    return 0
