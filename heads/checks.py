"""Check the values of a head's configuration, and that it has a builder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from permafrost._checks import Checks
from permafrost.heads.errors import HeadError

_CHECKS = Checks(HeadError)
require, require_counts = _CHECKS.require, _CHECKS.counts
require_positive, require_shares = _CHECKS.positive, _CHECKS.shares


def find_builder(
    builders: Mapping[type, Callable[..., Any]], config: object, given: Mapping[str, Any], method: str
) -> Callable[..., Any]:
    """Return what builds this configuration: the table's entry for exactly its type, or else its own `build` method.

    A subclass does not take its parent's entry, which would build the parent in silence.

    Args:
        builders: by type of configuration.
        config: what is to be built.
        given: arguments of a table's entry that say what the configuration holds.
        method: how its own method would be called, "build(spec=)".

    Raises:
        HeadError: there is neither.
    """
    found = builders.get(type(config))
    if found is not None:
        return partial(found, **given)
    own = getattr(config, "build", None)
    if own is None:
        raise HeadError(f"{type(config).__name__} has no builder: give it a {method} method")
    return own
