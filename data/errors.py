"""What a user can get wrong about a data set, and checks of the values of its configuration."""

from __future__ import annotations


class DataError(ValueError):
    """A data set is missing, malformed or too damaged to train on: says which file, what was expected, what to do."""


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise DataError unless the condition holds: "data.<name> is <value>: <remedy>"."""
    if not condition:
        raise DataError(f"data.{name} is {value}: {remedy}")


def require_within(
    config: object, prefix: str, *names: str, low: float, high: float = float("inf"), remedy: str
) -> None:
    """Raise DataError unless each of these fields lies within low..high; `prefix`, "jitter.", stands before its name in the message."""
    for name in names:
        require(low <= getattr(config, name) <= high, prefix + name, getattr(config, name), remedy)
