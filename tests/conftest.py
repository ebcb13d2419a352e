"""Shared by all tests: caches of their own, few threads."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from smoke import SMOKE

ROOT = Path(__file__).resolve().parent.parent

# The suite is many small problems: more threads than cores make it slower and timing-dependent. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker per core for the suite as it is; one process for chosen files, slow tests (groups of processes) and a GPU's."""
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    is_plain = config.option.markexpr in ("not slow and not gpu", "smoke") and not config.option.keyword
    return len(os.sched_getaffinity(0)) if is_whole and is_plain else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what the smoke tier names, but for what is slow."""
    chosen = tuple(entry for entries in SMOKE.values() for entry in entries)
    for item in items:
        if item.nodeid.startswith(chosen) and not any(item.iter_markers("slow")) and not any(item.iter_markers("gpu")):
            item.add_marker(pytest.mark.smoke)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def permafrost_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this run's own, also for subprocesses: a user's cached worlds must not decide a test."""
    folder = tmp_path_factory.mktemp("permafrost_cache")
    os.environ["PERMAFROST_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def own_garbage() -> Iterator[None]:
    """Collect at its end what a file of tests leaves to the garbage collector. A leak (an open file, a process nobody waited
    for) is an error then, which else falls upon whatever test runs when the collector does, in another file and once in a while."""
    yield
    gc.collect()
