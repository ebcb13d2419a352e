"""Refuse ranks that would train on different things, before the first step and with the field in which they differ."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from permafrost.launcher.errors import LaunchError
from permafrost.launcher.machine import code_hash
from permafrost.launcher.provenance import versions
from permafrost.launcher.recipes.serialise import CLASS_KEY, differing_fields, to_json

if TYPE_CHECKING:
    from permafrost.launcher.experiment import Experiment
    from permafrost.launcher.ranks.process_group import ProcessGroup

MOST = 5
"""Differences that a message lists."""


def require_same_program(experiment: Experiment, group: ProcessGroup) -> None:
    """Refuse ranks with another recipe, other sources or other versions of what computes. Collective.

    It comes before everything else that ranks do together: with other recipes they would wait for each other in different
    places.

    Raises:
        LaunchError: on every rank, naming the dotted field and both values.
    """
    if group.world_size == 1:
        return
    recipe = to_json(experiment)
    code = {"permafrost": code_hash(), **own_modules(recipe)}
    require_agreement(group, {"recipe": _without_places(recipe), "code": code, "versions": versions()})


def require_agreement(group: ProcessGroup, facts: Mapping[str, Any]) -> None:
    """Refuse ranks that have different facts. Collective.

    Args:
        group: this process among the others.
        facts: JSON values by what they are; the same names on every rank.

    Raises:
        LaunchError: on every rank, naming which rank, the dotted fields and both values.
    """
    everyone = group.gather_objects(dict(facts))

    def check() -> None:
        assert everyone is not None
        for what, value in facts.items():
            odd = [rank for rank, own in enumerate(everyone) if own[what] != value]
            if odd:
                differences = differing_fields(everyone[odd[0]][what], value)
                shown = [f"{name or what} is {found!r} there and {own!r} on rank 0" for name, found, own in differences]
                more = f"; and {len(shown) - MOST} more" if len(shown) > MOST else ""
                raise LaunchError(
                    f"the {what} of rank {', '.join(map(str, odd))} is not that of rank 0: {'; '.join(shown[:MOST])}{more}. "
                    "Give every process the same command, files and versions"
                )

    group.on_main(check)


def own_modules(recipe: Any) -> dict[str, str]:
    """Return the SHA-256 of the source of every module outside permafrost that has a class in a recipe, by the module's name."""
    found = {}
    for name in sorted(set(_modules(recipe))):
        if name.partition(".")[0] != "permafrost" and name in sys.modules:
            try:
                found[_without_place(name)] = hashlib.sha256(inspect.getsource(sys.modules[name]).encode()).hexdigest()
            except (OSError, TypeError):
                continue
    return found


def _modules(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get(CLASS_KEY), str):
            module, colon, _ = value[CLASS_KEY].partition(":")
            if colon:
                yield module
        for item in value.values():
            yield from _modules(item)
    elif isinstance(value, list):
        for item in value:
            yield from _modules(item)


def _without_places(value: Any) -> Any:
    """Return a recipe whose classes do not say in which folder of this machine their file lies."""
    if isinstance(value, dict):
        return {
            key: _without_place(item) if key == CLASS_KEY and isinstance(item, str) else _without_places(item)
            for key, item in value.items()
        }
    return [_without_places(item) for item in value] if isinstance(value, list) else value


def _without_place(name: str) -> str:
    # The module of a recipe file has a hash of its path in its name.
    module, colon, attribute = name.partition(":")
    return (module.rpartition("_")[0] if module.startswith("permafrost_recipe_") else module) + colon + attribute
