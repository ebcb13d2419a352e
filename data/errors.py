"""The error of a data set that a user can mend, and the checks that raise it for values of a configuration."""

from __future__ import annotations

from permafrost._checks import Checks


class DataError(ValueError):
    """A data set is missing, malformed or too damaged to train on: says which file, what was expected, what to do."""


_CHECKS = Checks(DataError, "data.")
require, require_within = _CHECKS.require, _CHECKS.within
