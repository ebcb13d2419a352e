"""Shared by all tests: caches of their own, few threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The suite is many small problems: more threads than cores make it slower and timing-dependent. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
