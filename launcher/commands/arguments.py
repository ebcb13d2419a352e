"""Arguments that several commands share: options of their own before or among a recipe's fields. Imports no torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from permafrost._nearest import nearest
from permafrost.launcher.errors import RecipeError
from permafrost.launcher.recipes.overrides import without_local_rank


def device_name(text: str) -> str:
    """For argparse: auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device: give auto, cpu, cuda or cuda:N")
    return text


def add_device(parser: argparse.ArgumentParser) -> None:
    """The --device option."""
    help_text = "where to compute: auto (the default) takes a GPU if torch sees one; cpu, cuda or cuda:N"
    parser.add_argument("--device", type=device_name, default="auto", metavar="DEVICE", help=help_text)


def add_resume(parser: argparse.ArgumentParser) -> None:
    """The --resume option."""
    help_text = (
        "auto (the default) continues what the run folder holds; must refuses an empty one; never one with a run"
    )
    parser.add_argument("--resume", choices=("auto", "must", "never"), default="auto", help=help_text)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The --checkpoint option."""
    help_text = "best (the default): of each head the checkpoint that evaluated best; latest: the newest"
    parser.add_argument("--checkpoint", choices=("best", "latest"), default="best", help=help_text)


def num_workers(text: str) -> int:
    """For argparse: how many data workers, from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of workers: give 0 or more")
    return int(text)


def probability(text: str) -> float:
    """For argparse: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """parse_args, naming the nearest option where one is unknown.

    Raises:
        SystemExit: as argparse.
    """
    options, rest = parser.parse_known_args(list(argv))
    if rest:
        known = re.findall(r"--[\w-]+", parser.format_usage())
        close = nearest(rest[0].split("=", 1)[0], known)
        parser.error(f"unknown argument {rest[0]!r}" + (f": did you mean {' or '.join(close)}?" if close else ""))
    return options


def split_recipe(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """Parse a command line of the form `[options] RECIPE [--field value | options ...]`.

    Args:
        parser: knows the command's own options and was made with add_help=False and allow_abbrev=False: what it does
            not know is a field of the recipe, and --help after a recipe is about the recipe.
        argv: the arguments after the command.

    Returns:
        the command's options, the recipe's name, and the arguments that are left for its fields, in their order.

    Raises:
        RecipeError: the recipe is missing or does not come first.
        SystemExit: as argparse; with 0 after printing the command's help when it is asked for without a recipe.
    """
    options, rest = parser.parse_known_args(without_local_rank(argv))
    if rest and not rest[0].startswith("-"):
        return options, rest[0], rest[1:]
    if any(token in ("-h", "--help") for token in rest):
        parser.print_help()
        raise SystemExit(0)
    if rest:
        raise RecipeError(f"{parser.prog}: the recipe comes first, then its fields: {parser.prog} RECIPE {rest[0]} ...")
    raise RecipeError(
        f"{parser.prog} needs a recipe, for example `{parser.prog} quickstart`; `permafrost recipes` lists them"
    )
