"""Write an Experiment as JSON and read it back: each dataclass carries its name, so a run folder alone says what was trained.

A class of permafrost is written under its public name, `data.ShapesDataConfig`: the front of its package and its own name, so
that its file may move. A user's class is written `module:Name`. Recipes of before that have the file's path
(`permafrost.data.detection.config:ShapesDataConfig`) and read the same.

A run folder is data: reading it imports nothing outside permafrost. A class of a user's own recipe is found again only
where its module is already imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from permafrost._nearest import did_you_mean
from permafrost.launcher.errors import RunFolderError
from permafrost.launcher.experiment import Experiment
from permafrost.launcher.recipes.old_runs import old_values

CLASS_KEY = "class"
PACKAGES = ("data", "heads", "launcher", "model")
"""Packages whose fronts name configurations."""
MISSING = "not there"


def to_json(value: Any) -> Any:
    """Return plain JSON values of a configuration; a dataclass becomes an object whose "class" is its public name.

    Raises:
        TypeError: it holds what JSON cannot.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {CLASS_KEY: public_name(type(value)), **fields}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a configuration holds {value!r} of type {type(value).__name__}, which JSON cannot")


def experiment_from_json(data: Any) -> Experiment:
    """Return the Experiment that `to_json` wrote, today or before.

    A field that newer code added means what the code did before it (see old_runs), else its default.

    Raises:
        RunFolderError: a class or value that does not belong there, naming the field.
        ValueError: of the configuration itself, when its values contradict each other.
    """
    return _decode(data, Experiment, "experiment")


def public_name(cls: type) -> str:
    """Return the name under which a configuration's class is written: "data.ShapesDataConfig", or "module:Name" of a user's."""
    top, _, rest = cls.__module__.partition(".")
    package = rest.partition(".")[0]
    if top == "permafrost" and package in PACKAGES:
        return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}:{cls.__qualname__}"


def differing_fields(found: Any, expected: Any) -> list[tuple[str, Any, Any]]:
    """Return (dotted field, value in `found`, value in `expected`) for every leaf in which two JSON trees differ, in order."""
    left, right = dict(_leaves(found, "")), dict(_leaves(expected, ""))
    names = list(left) + [name for name in right if name not in left]
    pairs = ((name, left.get(name, MISSING), right.get(name, MISSING)) for name in names)
    return [(name, a, b) for name, a, b in pairs if a != b]


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def _decode(data: Any, hint: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _decode_union(data, arguments, where)
    if hint is Any:
        return data
    if hint is None or hint is type(None):
        return _accept(data, data is None, "null", where)
    if origin is Literal:
        return _accept(data, data in arguments, f"one of {', '.join(map(repr, arguments))}", where)
    if origin is dict:
        _accept(data, isinstance(data, dict), "an object", where)
        return {key: _decode(item, arguments[1], f"{where}.{key}") for key, item in data.items()}
    if origin in (list, tuple):
        return _decode_sequence(data, origin, arguments, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _decode_dataclass(data, hint, where)
    if hint is bool:
        return _accept(data, isinstance(data, bool), "true or false", where)
    if hint is float:
        return _accept(data, isinstance(data, (int, float)) and not isinstance(data, bool), "a number", where)
    if hint is int:
        return _accept(data, isinstance(data, int) and not isinstance(data, bool), "an integer", where)
    if hint is str:
        return _accept(data, isinstance(data, str), "a string", where)
    raise TypeError(f"{where}: fields of type {hint!r} are not read from JSON")


def _accept(data: Any, fits: bool, expected: str, where: str) -> Any:
    if not fits:
        raise RunFolderError(f"{where} is {data!r}: expected {expected}")
    return data


def _decode_union(data: Any, members: tuple[Any, ...], where: str) -> Any:
    if data is None and type(None) in members:
        return None
    problems = []
    for member in members:
        if member is type(None):
            continue
        try:
            return _decode(data, member, where)
        except RunFolderError as error:
            problems.append(str(error))
    raise RunFolderError("; ".join(problems))


def _decode_sequence(data: Any, origin: type, arguments: tuple[Any, ...], where: str) -> Any:
    _accept(data, isinstance(data, list), "a list", where)
    if origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis):
        arguments = (arguments[0],) * len(data)
    _accept(data, len(data) == len(arguments), f"a list of {len(arguments)}", where)
    return origin(_decode(item, argument, f"{where}[{i}]") for i, (item, argument) in enumerate(zip(data, arguments)))


def _decode_dataclass(data: Any, expected: type, where: str) -> Any:
    _accept(
        data,
        isinstance(data, dict) and isinstance(data.get(CLASS_KEY), str),
        f"a {expected.__name__} with its class",
        where,
    )
    cls = _find_class(data[CLASS_KEY], expected, where)
    hints = get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls) if field.init}
    unknown = [key for key in data if key != CLASS_KEY and key not in names]
    if unknown:
        raise RunFolderError(
            f"{where}: {cls.__name__} has no field {', '.join(unknown)}; the run was written by other code"
        )
    before = {name: value for name, value in old_values(map(public_name, cls.__mro__[:-1])).items() if name not in data}
    values = {
        key: _decode(item, hints[key], f"{where}.{key}") for key, item in (before | data).items() if key != CLASS_KEY
    }
    try:
        return cls(**values)
    except TypeError as error:
        raise RunFolderError(f"{where}: {error}") from None


def _find_class(name: str, expected: type, where: str) -> type:
    front = _front_of(name)
    cls = _own_class(name, where) if front is None else _public_class(front, name, where)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and issubclass(cls, expected)):
        raise RunFolderError(f"{where} is a {name!r}: expected a {expected.__name__} or a kind of it")
    return cls


def _front_of(name: str) -> str | None:
    """Return the package whose front has a class of permafrost, by its public name or its old one; None of a user's class."""
    if ":" not in name:
        return name.partition(".")[0]
    module = name.partition(":")[0]
    return module.split(".")[1] if module.startswith("permafrost.") and module.split(".")[1] in PACKAGES else None


def _public_class(front: str, name: str, where: str) -> Any:
    attribute = name.rpartition(":" if ":" in name else ".")[2]
    if front in PACKAGES:
        module = importlib.import_module(f"permafrost.{front}")
        if attribute in module.__all__:
            return getattr(module, attribute)
    known = [f"{package}.{found}" for package in PACKAGES for found in _configurations(package)]
    raise RunFolderError(
        f"{where} is a {name!r}, which permafrost does not have: {did_you_mean(f'{front}.{attribute}', known)}"
    )


def _configurations(package: str) -> list[str]:
    names = importlib.import_module(f"permafrost.{package}").__all__
    return [name for name in names if name.endswith(("Config", "Experiment", "World"))]


def _own_class(name: str, where: str) -> Any:
    module_name, _, attribute = name.partition(":")
    module = sys.modules.get(module_name)
    if module is None:
        raise RunFolderError(
            f"{where} is a {name}, which is not part of permafrost: import {module_name} before reading this run (only "
            "permafrost's own modules are imported on a file's word)"
        )
    cls: Any = module
    for part in attribute.split("."):
        cls = getattr(cls, part, None)
    return cls
