"""Findings of a data set's check, raised as one error."""

from __future__ import annotations

import pytest

from permafrost.data.errors import DataError
from permafrost.data.findings import Finding, raise_fatal


def test_findings_that_are_not_fatal_raise_nothing() -> None:
    raise_fatal([Finding("a.json", "odd", fatal=False)])
    with pytest.raises(DataError, match=r"^b\.json: bad\nDo this$"):
        raise_fatal([Finding("a.json", "odd", fatal=False), Finding("b.json", "bad")], "Do this")
