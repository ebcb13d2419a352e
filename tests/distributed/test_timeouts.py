"""One time limit for every process group."""

from __future__ import annotations

from collections.abc import Callable


def test_a_group_of_a_library_has_our_time_limit(run_ranks: Callable) -> None:
    found = run_ranks("timeout_worker.py", 2, {"limit": 2.0}, timeout=120)
    assert found["error"] is not None
    assert 1.5 < found["seconds"] < 4.5, found
