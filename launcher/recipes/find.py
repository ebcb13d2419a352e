"""Find recipes: the shipped ones by short name, a user's own by module or file. Imports no torch.

A recipe is a function without required arguments that returns an Experiment (or a pretraining one); its docstring's
first line is its summary. Names:

- `coco:swinv2_base_fpn`: function `swinv2_base_fpn` of permafrost/configs/coco.py;
- `quickstart`: function and module of one name, or a function's name alone where only one shipped module has it;
- `package.module:function`: a user's own importable module, also from the current folder;
- `path/to/file.py:function`: a user's own file; `path/to/file.py` alone when it holds one recipe.

Functions that a module makes of a table and puts into its globals() count like those it writes out, if their `__module__` is
the module's: see `recipes_of` in permafrost/configs/paper_parts.py.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import sys
import traceback
import typing
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import permafrost._configuration
from permafrost._nearest import did_you_mean, nearest
from permafrost.launcher.errors import USER_ERRORS, RecipeError
from permafrost.launcher.experiment import Experiment

CONFIGS = "permafrost.configs"

Recipe = Callable[[], Any]


@dataclass
class RecipeInfo:
    """One row of `permafrost recipes`.

    Attributes:
        name: what the commands take.
        function: the recipe itself.
        command: the command it is for, "train" or "pretrain".
        summary: first line of the docstring.
        data: the kind of data set and, where it has a folder, the folder.
        backbone: its name, and " (random)" where nothing pretrained is loaded.
        trainable: its trainable parameters, where they are on record.
        metric: figures that the summary states, such as "45.0 box AP, 41.1 mask AP"; "" where it states none.
        error: why the recipe cannot be built, else None; data and backbone are "" then.
    """

    name: str
    function: Recipe
    command: str
    summary: str
    data: str = ""
    backbone: str = ""
    trainable: int | None = None
    metric: str = ""
    error: str | None = None


def find_recipe(name: str) -> Recipe:
    """Return the function that a recipe's name stands for.

    Args:
        name: one of the forms in this module's docstring.

    Returns:
        a function without required arguments; `build_recipe` calls it and checks what it returns.

    Raises:
        RecipeError: nothing has that name (with the nearest names), or its module cannot be imported.
    """
    if not name or name.startswith("-"):
        raise RecipeError(
            f"{name!r} is not a recipe: the recipe's name comes before its fields, as in `permafrost train quickstart`"
        )
    location, _, function = name.partition(":")
    if location.endswith(".py") or "/" in location:
        module = _import_file(Path(location).expanduser())
    else:
        # Folders inside configs (deepspeed/, accelerate/) hold files for other programs: only modules count.
        if location.isidentifier() and location in _config_modules():
            module = _import(f"{CONFIGS}.{location}", what=name)
            function = function or location
        elif not function:
            return _shipped_function(name)
        else:
            module = _import_own(location, name)
    return _function_of(module, function, name)


def build_recipe(recipe: str | Recipe, kind: type = Experiment) -> Any:
    """Return the experiment of a recipe, before any override.

    Args:
        recipe: its name, or the function itself.
        kind: the dataclass it must return.

    Raises:
        RecipeError: it fails, or returns something else.
    """
    name = recipe if isinstance(recipe, str) else f"{recipe.__module__}:{recipe.__name__}"
    function = find_recipe(recipe) if isinstance(recipe, str) else recipe
    with _explained(f"recipe {name} fails"):
        experiment = function()
    if not isinstance(experiment, kind):
        hint = ""
        if dataclasses.is_dataclass(experiment) and not isinstance(experiment, type):
            hint = f"; it is for `permafrost {_command_of(type(experiment))}`"
        raise RecipeError(f"recipe {name} returns a {type(experiment).__name__}, expected a {kind.__name__}{hint}")
    return experiment


def list_recipes() -> list[RecipeInfo]:
    """Describe every shipped recipe, by module and then in the order of the file."""
    # Counting takes torch and seconds; a test holds the record to what is built.
    counts = json.loads(_configs_folder().joinpath("trainable.json").read_text())
    return [_describe(name, function, counts.get(name)) for name, function in _shipped().items()]


def summary_of(recipe: Recipe) -> str:
    """Return the docstring's first sentence, passing over a first line that is the command itself."""
    paragraphs = re.split(r"\n\s*\n", inspect.getdoc(recipe) or "")
    texts = [
        " ".join(paragraph.split()) for paragraph in paragraphs if not paragraph.lstrip().startswith("permafrost ")
    ]
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", texts[0])[0] if texts else ""


def _describe(name: str, function: Recipe, trainable: int | None) -> RecipeInfo:
    summary = summary_of(function)
    figures = re.findall(r"\d+(?:\.\d+)?\s?%?\s(?:box AP|mask AP|mIoU|top-1)(?!\w)", summary)
    info = RecipeInfo(
        name, function, _command_of(_returned(function)), summary, trainable=trainable, metric=", ".join(figures)
    )
    try:
        experiment = build_recipe(function, object)
    except USER_ERRORS as error:
        info.error = str(error)
        return info
    if isinstance(experiment, Experiment):
        info.data = experiment.data.describe()
    info.backbone = _describe_backbone(getattr(experiment, "backbone", None))
    return info


def _describe_backbone(backbone: object) -> str:
    name = getattr(backbone, "name", backbone)
    if name is None:
        return ""
    return f"{name} (random)" if getattr(backbone, "weights", None) == "random" else str(name)


def _command_of(kind: object) -> str:
    return "train" if isinstance(kind, type) and issubclass(kind, Experiment) else "pretrain"


def _configs_folder() -> Path:
    return Path(importlib.import_module(CONFIGS).__path__[0])


def _config_modules() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules([str(_configs_folder())]) if not module.ispkg)


def _recipes_in(module: ModuleType) -> dict[str, Recipe]:
    """Return the public functions of the module's own that say they return a dataclass and need no argument."""
    found: dict[str, Recipe] = {}
    for name, function in vars(module).items():
        if name.startswith("_") or not inspect.isfunction(function) or function.__module__ != module.__name__:
            continue
        if not _needs_nothing(function):
            continue
        if _returned(function) is not None:
            found[name] = function
    return found


@functools.cache
def _returned(function: Recipe) -> type | None:
    """Return the dataclass that a function says it returns; None if it says anything else."""
    try:
        returned = typing.get_type_hints(function).get("return")
    except NameError:
        return None
    return returned if isinstance(returned, type) and dataclasses.is_dataclass(returned) else None


def _needs_nothing(function: Callable[..., Any]) -> bool:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return all(parameter.default is not parameter.empty or parameter.kind in variadic for parameter in parameters)


def _function_of(module: ModuleType, function: str, name: str) -> Recipe:
    recipes = _recipes_in(module)
    where = module.__file__ if name.partition(":")[0].endswith(".py") else module.__name__
    if not function:
        if len(recipes) == 1:
            return next(iter(recipes.values()))
        raise RecipeError(
            f"{name} holds {len(recipes)} recipes: name one, as in {name}:function; {did_you_mean(name, list(recipes))}"
        )
    found = getattr(module, function, None)
    if found is None:
        prefix = name.partition(":")[0]
        raise RecipeError(
            f"{where} has no recipe {function!r}: {did_you_mean(function, [f'{prefix}:{other}' for other in recipes])}"
        )
    if not callable(found) or not _needs_nothing(found):
        raise RecipeError(
            f"{name} is not a recipe: it must be a function without required arguments that returns an Experiment"
        )
    return found


def _shipped() -> dict[str, Recipe]:
    """Return the functions of all shipped recipes by name; none is called."""
    found = {}
    for module_name in _config_modules():
        module = _import(f"{CONFIGS}.{module_name}", what=module_name)
        for function_name, function in _recipes_in(module).items():
            found[module_name if function_name == module_name else f"{module_name}:{function_name}"] = function
    return found


def _shipped_function(name: str) -> Recipe:
    """Return the shipped recipe whose function has this name, if it is the only one."""
    found = {full_name: function for full_name, function in _shipped().items() if function.__name__ == name}
    if len(found) > 1:
        raise RecipeError(f"several recipes are called {name!r}: say {' or '.join(found)}")
    if not found:
        raise RecipeError(_unknown(name))
    return next(iter(found.values()))


def _unknown(name: str) -> str:
    guess = did_you_mean(name, list(_shipped()))
    own = "your own are package.module:function or file.py:function"
    return f"there is no recipe {name!r}: {guess} `permafrost recipes` lists them; {own}"


def _import_own(location: str, name: str) -> ModuleType:
    """Import a module of the user's, installed or in the current folder."""
    if not all(part.isidentifier() for part in location.split(".")):
        raise RecipeError(_unknown(name))
    # At the end, so that a folder called `data` or `test` here hides nothing that is installed. It stays: data workers
    # that are spawned import the module again.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    parts = location.split(".")
    for depth in range(1, len(parts) + 1):
        part, parent = ".".join(parts[:depth]), ".".join(parts[: depth - 1])
        with _explained(f"recipe {name}: module {part} cannot be imported"):
            is_there = not parent or hasattr(importlib.import_module(parent), "__path__")
            is_there = is_there and importlib.util.find_spec(part) is not None
        if not is_there:
            raise RecipeError(_unknown(name) if depth == 1 else f"recipe {name}: there is no module {part}")
    return _import(location, what=name)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [str(file) for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        close = nearest(str(path), siblings)
        raise RecipeError(
            f"there is no recipe file {path}" + (f": did you mean {' or '.join(close)}?" if close else "")
        )
    # Here, as its library takes as long to load as twenty recipes to build.
    import hashlib

    path = path.resolve()
    module_name = f"permafrost_recipe_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path} is not a Python file: a recipe file ends in .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses of the file resolve their annotations through sys.modules.
    sys.modules[module_name] = module
    try:
        with _explained(f"{path} cannot be imported"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _import(module: str, *, what: str) -> ModuleType:
    with _explained(f"recipe {what}: module {module} cannot be imported"):
        return importlib.import_module(module)


@contextmanager
def _explained(what: str):
    """Turn any failure of a recipe's own code into a RecipeError that names the line: the text is the user's."""
    try:
        yield
    except USER_ERRORS:
        raise
    except Exception as error:
        if isinstance(error, SyntaxError):
            place = f"{error.filename}, line {error.lineno}"
        else:
            # Where the recipe went wrong, not what refused it.
            passed_over = ("importlib", permafrost._configuration.__file__)
            stack = traceback.extract_tb(error.__traceback__)
            frames = [frame for frame in stack if not any(name in frame.filename for name in passed_over)]
            place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "unknown place"
        raise RecipeError(f"{what}: {type(error).__name__}: {error} ({place})") from error
