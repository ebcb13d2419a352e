"""Checks of the values of a head's configuration, and of its having a builder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from permafrost.heads.errors import HeadError


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise HeadError unless the condition holds: "<name> is <value>: <remedy>"."""
    if not condition:
        raise HeadError(f"{name} is {value!r}: {remedy}")


def require_counts(prefix: str, config: object, *names: str, least: int = 1) -> None:
    """Raise HeadError unless each of these fields is at least `least`; `prefix`, "rpn.", stands before its name in the message."""
    for name in names:
        require(getattr(config, name) >= least, prefix + name, getattr(config, name), f"it must be at least {least}")


def require_positive(prefix: str, config: object, *names: str) -> None:
    """Raise HeadError unless each of these fields is above 0."""
    for name in names:
        require(getattr(config, name) > 0, prefix + name, getattr(config, name), "it must be above 0")


def require_shares(prefix: str, config: object, *names: str) -> None:
    """Raise HeadError unless each of these fields is above 0 and at most 1."""
    for name in names:
        value = getattr(config, name)
        require(0.0 < value <= 1.0, prefix + name, value, "give a share above 0 and at most 1")


def find_builder(builders: Mapping[type, Callable[..., Any]], config: object, method: str) -> Callable[..., Any] | None:
    """Return what builds configurations of exactly this type; None if the table has nothing and the configuration a `build` method.

    A subclass does not take its parent's entry, which would build the parent in silence.

    Args:
        builders: by type of configuration.
        config: what is to be built.
        method: how its own method would be called, "build(spec=)".

    Raises:
        HeadError: there is neither.
    """
    found = builders.get(type(config))
    if found is None and not hasattr(config, "build"):
        raise HeadError(f"{type(config).__name__} has no builder: give it a {method} method")
    return found
