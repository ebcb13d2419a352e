"""`permafrost recipes`: list the recipes that come with permafrost."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence

from permafrost.launcher.commands.arguments import parse
from permafrost.launcher.recipes.find import RecipeInfo, list_recipes

COLUMNS = ("recipe", "command", "data", "backbone", "trainable", "result", "about")


def run(argv: Sequence[str]) -> int:
    """Print the table and return 0."""
    parser = argparse.ArgumentParser(
        prog="permafrost recipes", description="List the recipes that come with permafrost."
    )
    parser.add_argument(
        "--plain", action="store_true", help="print tab-separated lines, as it does when the output is not a terminal"
    )
    options = parse(parser, argv)
    rows = [_row(info) for info in list_recipes()]
    if options.plain or not sys.stdout.isatty():
        print("\n".join("\t".join(row) for row in (COLUMNS, *rows)))
    else:
        _print_table(rows)
    return 0


def _row(info: RecipeInfo) -> tuple[str, ...]:
    about = f"cannot be built: {info.error}" if info.error else info.summary
    trainable = "" if info.trainable is None else f"{info.trainable / 1e6:.2f} M"
    return (info.name, info.command, info.data, info.backbone, trainable, info.metric, about)


def _print_table(rows: list[tuple[str, ...]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS:
        # Names are for copying: they are not broken while there is room.
        table.add_column(name, no_wrap=name in ("recipe", "command"), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=max(80, shutil.get_terminal_size().columns)).print(table)
    print("permafrost train RECIPE --help shows every field of a recipe.")
