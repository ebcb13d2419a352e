"""A list of modules that type checkers know the members of: `torch.nn.ModuleList` hands out plain modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)


def module_list(modules: Iterable[M]) -> Sequence[M]:
    """Return an nn.ModuleList of these modules, as the sequence that it is."""
    return cast("Sequence[M]", nn.ModuleList(modules))
