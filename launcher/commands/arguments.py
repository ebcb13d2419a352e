"""Add the arguments that several commands share: options of their own before or among a recipe's fields. Imports no torch."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence

from permafrost._nearest import nearest
from permafrost.launcher.errors import RecipeError
from permafrost.launcher.recipes.overrides import without_local_rank

PROGRESS_SECONDS = 10.0


def device_name(text: str) -> str:
    """Return the name of a device for argparse: auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device: give auto, cpu, cuda or cuda:N")
    return text


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the --device option."""
    help_text = "where to compute: auto (the default, a GPU if torch sees one), cpu, cuda or cuda:N"
    parser.add_argument("--device", type=device_name, default="auto", metavar="DEVICE", help=help_text)


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Add the --resume option."""
    help_text = "auto (the default) continues a run that the folder holds; must refuses a folder without a checkpoint, never one with a run"
    parser.add_argument("--resume", choices=("auto", "must", "never"), default="auto", help=help_text)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the --checkpoint option."""
    help_text = "best (the default) takes each head's best-scoring checkpoint; latest takes the newest"
    parser.add_argument("--checkpoint", choices=("best", "latest"), default="best", help=help_text)


def number(what: str, least: int = 1) -> Callable[[str], int]:
    """Return a type for argparse: a whole number of something ("GPUs"), from `least`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {what}: give {least} or more")
        return int(text)

    return parse


def port(text: str) -> int:
    """Read a port for argparse."""
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give 1 to 65535")
    return int(text)


def amount(unit: str, least: float | None = None) -> Callable[[str], float]:
    """Return a type for argparse: a finite number of a unit, from `least`; None: above 0."""

    def parse(text: str) -> float:
        value = _float(text)
        if value == float("inf") or not (value > 0 if least is None else value >= least):
            limit = "a number above 0" if least is None else f"{least:g} or more"
            raise argparse.ArgumentTypeError(f"{text!r} is not an amount of {unit}: give {limit}")
        return value

    return parse


def probability(text: str) -> float:
    """Return a number from 0 to 1 for argparse."""
    value = _float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _float(text: str) -> float:
    """Return what a text says, or NaN, which is in no range."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def progress_printer(shown: str) -> Callable[[int, int], None]:
    """Return a function that prints, every few seconds, how many are done of how many: `shown` has a {} for each."""
    last = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            print(shown.format(done, total), flush=True)

    return on_progress


def recipe_parser(command: str, *, usage: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Return a parser for `split_recipe`, to be told the command's own options.

    Args:
        command: its name.
        usage: what follows the recipe's name.
        description: printed above the options by --help.
        epilog: printed below them as it is.
    """
    return argparse.ArgumentParser(
        prog=f"permafrost {command}",
        usage=f"permafrost {command} RECIPE {usage}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # What it does not know is a field of the recipe, and --help after a recipe is about the recipe.
        add_help=False,
        allow_abbrev=False,
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; where an option is unknown, the error names the nearest one.

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
        parser: of `recipe_parser`, with the command's own options.
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
