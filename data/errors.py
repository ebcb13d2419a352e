"""What a user can get wrong about a data set, and checks of the values of its configuration."""

from __future__ import annotations

from permafrost._checks import Checks


class DataError(ValueError):
    """A data set is missing, malformed or too damaged to train on: says which file, what was expected, what to do."""


_CHECKS = Checks(DataError, "data.")
require, require_within = _CHECKS.require, _CHECKS.within
