"""Data sets of many files share these: records in memory, the count of unreadable files."""

from __future__ import annotations

import pytest

from permafrost.data.errors import DataError
from permafrost.data.stream.records import PackedRecords, ReplacementTracker


def test_packed_records_are_a_list() -> None:
    records = [{"a": index, "b": "x" * index} for index in range(20)]
    packed = PackedRecords(records)
    assert list(packed) == records
    assert len(packed) == 20
    packed[3]["a"] = "changed"
    assert packed[3] == records[3]
    with pytest.raises(IndexError):
        packed[20]


def test_tracker_stops_past_the_budget() -> None:
    tracker = ReplacementTracker(num_images=20_000, share=0.001)
    assert tracker.limit == 20
    for number in range(20):
        assert tracker.update([(f"{number}.jpg", "empty")] * 3) == [(f"{number}.jpg", "empty")]
        assert tracker.update([(f"{number}.jpg", "empty")]) == []
    assert tracker.count == 20
    with pytest.raises(DataError, match=r"21 of 20000 training images cannot be read, 20 are tolerated") as error:
        tracker.update([("last.jpg", "empty")])
    assert "0.jpg: empty" in str(error.value)
