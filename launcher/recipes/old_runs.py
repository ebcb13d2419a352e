"""The meaning of runs that were written before a field existed.

A field that is added with another default than what the code did before would change old runs in silence: a resumed run, an
evaluation. Whoever adds a field to a configuration writes a row here, whatever its default is; a test finds a field without one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OldValue:
    """A field that was added later, and what its absence means.

    Attributes:
        configuration: public name of the class that has the field, "data.CocoDataConfig"; its subclasses are meant, too.
        field: its name.
        since: day on which it was added, "2026-11-29".
        value: what the code did before, as JSON.
    """

    configuration: str
    field: str
    since: str
    value: Any


OLD_VALUES: list[OldValue] = [
    OldValue("heads.SemanticBranchConfig", "resize", "2026-11-29", "after"),
]
"""Every field that was added after 2026-11-29."""


def old_values(names: Iterable[str]) -> dict[str, Any]:
    """Return field -> JSON value of what the absence of each newer field means.

    Args:
        names: public names of a configuration's class and its bases.
    """
    wanted = set(names)
    return {entry.field: entry.value for entry in OLD_VALUES if entry.configuration in wanted}
