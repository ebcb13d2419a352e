"""Check the values of a head's configuration, and that it has a builder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from permafrost._checks import Checks
from permafrost.heads.errors import HeadError

_CHECKS = Checks(HeadError)
require, require_counts = _CHECKS.require, _CHECKS.counts
require_positive, require_shares = _CHECKS.positive, _CHECKS.shares


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
