"""The `permafrost` command. It imports a command when that is called, so that --help answers at once.

Errors become exit codes here, those of launcher/exit_codes.py.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from permafrost._nearest import did_you_mean
from permafrost.launcher.errors import USER_ERRORS, Interrupted, RankLost, TrainingStopped
from permafrost.launcher.exit_codes import DONE, FAILED, INTERRUPTED, SAVED, USAGE_ERROR
from permafrost.launcher.ranks.exit import run_and_leave

COMMANDS = {
    "train": ("RECIPE [--field value ...]", "train a recipe's heads on its frozen backbone"),
    "launch": ("RECIPE [--hostfile FILE] [--field value ...]", "train on every GPU of one machine or many"),
    "evaluate": ("RUN", "score a run's heads on its validation split"),
    "predict": ("RUN INPUT... --output DIR", "draw and list what a run finds in images"),
    "pretrain": ("RECIPE [--field value ...]", "train a backbone that others freeze"),
    "convert": ("IN OUT", "turn weights of any known format into sharded safetensors"),
    "resize-videos": ("IN OUT [--short-side N]", "shrink a folder of videos once, before training on them"),
    "plan": ("RECIPE [--gpus N] [--gpu-memory GB]", "predict a recipe's memory, traffic and time"),
    "recipes": ("", "list the recipes that come with permafrost"),
    "check-data": ("RECIPE [--field value ...]", "look for faults in a recipe's data, draw training samples"),
    "doctor": ("", "show versions and devices, and what is missing here"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the arguments without the program's name; None takes this process's.
    """
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        # argparse and tyro have printed their message and leave this way; in-process callers get the code.
        return stop.code if isinstance(stop.code, int) else DONE if stop.code is None else FAILED


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text(), file=sys.stdout if argv else sys.stderr)
        return DONE if argv else USAGE_ERROR
    if argv[0] in ("-V", "--version"):
        # Here, as it would be most of what --help takes.
        from permafrost.launcher.machine import version_of

        print(f"permafrost {version_of('permafrost') or '(not installed)'}")
        return DONE
    command = argv[0]
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        guess = did_you_mean(command, list(COMMANDS))
        print(f"error: there is no command {command!r}: {guess} Commands: {known}", file=sys.stderr)
        return USAGE_ERROR

    try:
        module = importlib.import_module(f"permafrost.launcher.commands.{command.replace('-', '_')}")
        return module.run(argv[1:])
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except TrainingStopped as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except Interrupted as error:
        print(error, file=sys.stderr)
        return SAVED
    except RankLost as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # What would be tidied up from here on may wait for the lost rank.
        os._exit(FAILED)


def help_text() -> str:
    """Return what `permafrost --help` prints."""
    calls = {name: f"permafrost {name} {arguments}".rstrip() for name, (arguments, _) in COMMANDS.items()}
    width = max(map(len, calls.values()))
    return "\n".join(
        [
            "Train task heads on giant frozen vision backbones.",
            "",
            *(f"  {calls[name]:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()),
            "",
            "`permafrost COMMAND --help` shows a command's options,",
            "`permafrost train RECIPE --help` every field of a recipe.",
            "To begin: permafrost train quickstart",
        ]
    )


def program() -> NoReturn:
    """Run `main` and end the process: the console script."""
    run_and_leave(main)


if __name__ == "__main__":
    program()
