"""The `permafrost` command. Imports what a command needs when it runs, so that --help answers at once.

Exit codes: 0 done; 1 the work itself failed (a head stopped by non-finite losses, a machine that `doctor` finds
    wanting, another rank that was lost); 2 a mistake in the command, recipe or input files, printed as `error: ...`; 75 a
    training that SIGTERM or SIGUSR1 ended, saved, to be continued by the same command; 130 interrupted.
`launch` has some of its own, see the cluster module.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from permafrost.launcher.experiment import Experiment
    from permafrost.launcher.recipes.find import Recipe

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

FAILED = 1
USAGE_ERROR = 2
SAVED = 75
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        argv: the arguments without the program's name; None takes this process's.
    """
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        # What is unwritten may meet a closed pipe: here it can be caught, at the interpreter's end it cannot.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`permafrost recipes | head`) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        # argparse and tyro have printed their message and leave this way; in-process callers get the code.
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else USAGE_ERROR
    if argv[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"permafrost {version('permafrost')}")
        return 0
    command = argv[0]
    if command not in COMMANDS:
        from permafrost._nearest import did_you_mean

        known = ", ".join(COMMANDS)
        guess = did_you_mean(command, list(COMMANDS))
        print(f"error: there is no command {command!r}: {guess} Commands: {known}", file=sys.stderr)
        return USAGE_ERROR

    from permafrost.launcher.errors import USER_ERRORS, Interrupted, RankLost, TrainingStopped

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
    """What `permafrost --help` prints."""
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


def parse_experiment(
    recipe: str | Recipe, args: Sequence[str], *, description: str = "", command: str = "train"
) -> Experiment:
    """A recipe's experiment with the command line's overrides.

    Args:
        recipe: a name that find_recipe knows, or the function itself.
        args: `--field.sub value` pairs; `--local_rank=N`, which the deepspeed launcher adds to every process's
            arguments, is ignored.
        description: printed by --help after the recipe's own text.
        command: whose arguments these are, for messages.

    Raises:
        RecipeError: no such recipe or field (with the nearest names), or values that contradict each other.
        SystemExit: with 2 for a value of the wrong type (the message is on stderr), with 0 after --help.
    """
    from permafrost.launcher.commands.arguments import without_local_rank
    from permafrost.launcher.experiment import Experiment
    from permafrost.launcher.recipes.overrides import parse_recipe

    return parse_recipe(recipe, without_local_rank(args), kind=Experiment, command=command, description=description)


def program() -> NoReturn:
    """The console script: `main`, and the end of the process."""
    from permafrost.launcher.ranks.exit import run_and_leave

    run_and_leave(main)


if __name__ == "__main__":
    program()
