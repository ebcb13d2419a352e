"""Override a recipe's fields on the command line, typed, with --help: `--loop.num-steps 50`. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from permafrost._nearest import nearest
from permafrost.launcher.errors import USER_ERRORS, RecipeError
from permafrost.launcher.experiment import Experiment
from permafrost.launcher.recipes.find import Recipe, build_recipe, find_recipe


def apply_overrides(experiment: Any, args: Sequence[str], *, prog: str, description: str = "") -> Any:
    """Return a copy of a recipe's experiment with fields replaced by dotted flags.

    Flags follow the nesting: dataclass fields and dict keys joined by dots, words joined by `-` or `_`; a field that
        may be None takes `None`, a boolean `True` or `False`. Every dataclass is built anew, so every `__post_init__`
        checks the new values. Where the recipe holds a subclass of the declared dataclass, the subclass's fields are
        the flags, and where a field may hold one of several dataclasses, those of the one it holds.

    Args:
        experiment: a dataclass instance; it is not changed.
        args: flags and their values; `--help` prints every field with type and default and exits with 0.
        prog: how the command was called, for messages.
        description: printed above the fields by --help.

    Raises:
        RecipeError: an unknown flag (with the nearest ones), or values that a `__post_init__` refuses.
        SystemExit: with 2 after a message on stderr for a value of the wrong type, with 0 after --help.
    """
    import tyro

    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            changed, unknown = tyro.cli(
                type(experiment),
                prog=prog,
                description=description,
                default=experiment,
                args=list(args),
                return_unknown_args=True,
                # One rule for all fields: a flag and its value; of a choice of dataclasses (FPN or simple pyramid), the
                # recipe's own has the flags.
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as stop:
        # tyro frames whatever a __post_init__ raises in a box of its own, breaking its lines; the original is still
        # behind the exit.
        cause: BaseException | None = stop
        while cause is not None:
            if isinstance(cause, USER_ERRORS):
                raise cause from None
            cause = cause.__context__
        sys.stderr.write(messages.getvalue())
        raise
    if unknown:
        raise RecipeError(_explain_unknown(unknown, experiment, prog))
    return changed


def flags_of(experiment: Any) -> list[str]:
    """Return every flag that overrides a field of this dataclass instance, in the order of the fields."""
    return [f"--{path.replace('_', '-')}" for path, _ in _leaves(experiment, "")]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        children = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value) if field.init]
    elif isinstance(value, dict) and value and all(dataclasses.is_dataclass(item) for item in value.values()):
        children = list(value.items())
    else:
        yield path, value
        return
    for name, child in children:
        yield from _leaves(child, f"{path}.{name}" if path else str(name))


def _explain_unknown(unknown: list[str], experiment: Any, prog: str) -> str:
    flags = flags_of(experiment)
    more = f"`{prog} --help` lists all"
    names = [token.split("=", 1)[0].replace("_", "-") for token in unknown if token.startswith("-")]
    if not names:
        return f"unexpected argument {unknown[0]!r}: fields are given as --field value; {more}"
    # The two dashes look alike in every flag and say nothing about likeness.
    close = nearest(names[0].lstrip("-"), [flag.removeprefix("--") for flag in flags])
    meant = f"did you mean {' or '.join('--' + flag for flag in close)}? " if close else ""
    return f"there is no option {names[0]}: {meant}{more}"


def parse_recipe(recipe: str | Recipe, args: Sequence[str], *, kind: type, command: str, description: str = "") -> Any:
    """Return a recipe's dataclass with the command line's overrides.

    Args:
        recipe: a name that find_recipe knows, or the function itself.
        args: see apply_overrides.
        kind: the dataclass the recipe must return.
        command: "train" or the like, for messages.
        description: printed by --help after the recipe's own text.

    Raises:
        RecipeError: as find_recipe and apply_overrides.
        SystemExit: as apply_overrides.
    """
    function = find_recipe(recipe) if isinstance(recipe, str) else recipe
    name = recipe if isinstance(recipe, str) else function.__name__
    text = "\n\n".join(part for part in (inspect.getdoc(function) or "", description) if part)
    return apply_overrides(build_recipe(function, kind), args, prog=f"permafrost {command} {name}", description=text)


def parse_experiment(
    recipe: str | Recipe, args: Sequence[str], *, description: str = "", command: str = "train"
) -> Experiment:
    """Return a recipe's experiment with the command line's overrides.

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
    return parse_recipe(recipe, without_local_rank(args), kind=Experiment, command=command, description=description)


def without_local_rank(args: Sequence[str]) -> list[str]:
    """Return the arguments without the deepspeed launcher's `--local_rank=N`: processes learn their rank from LOCAL_RANK."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--local_rank", "--local-rank")
    return parser.parse_known_args(list(args))[1]
