"""This machine is known by the hash of the sources, whichever way they are installed; processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from permafrost.launcher import machine

HASH = f"import runpy, sys; sys.path.insert(0, sys.argv[1]); print(runpy.run_path({machine.__file__!r})['code_hash']())"


def hash_in(place: Path) -> str:
    """The hash that a bare Python finds of the permafrost in a folder."""
    command = [sys.executable, "-I", "-S", "-c", HASH, str(place)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@pytest.fixture
def layouts(root: Path, tmp_path: Path) -> dict[str, Path]:
    """A small permafrost in a checkout and as a wheel lays it out: what sys.path needs for each."""
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    shutil.copytree(root / "permafrost", checkout / "permafrost", ignore=shutil.ignore_patterns("__pycache__"))
    for name in machine.FOLDERS:
        (checkout / name / "deep").mkdir(parents=True)
        (checkout / name / "__init__.py").touch()
        (checkout / name / "deep" / "table.json").write_text(name)
    shutil.copytree(checkout / "permafrost", site / "permafrost")
    for name in machine.FOLDERS:
        shutil.copytree(checkout / name, site / "permafrost" / name)
    return {"checkout": checkout, "site": site}


def test_the_hash_is_of_the_sources_not_of_their_place(layouts: dict[str, Path], tmp_path: Path) -> None:
    hashes = {name: hash_in(place) for name, place in layouts.items()}
    assert len(set(hashes.values())) == 1
    assert len(hashes["site"]) == 64
    # Running one leaves compiled files behind.
    for place in layouts.values():
        cache = place / "permafrost" / "__pycache__"
        cache.mkdir(exist_ok=True)
        (cache / "x.py").touch()
    assert {hash_in(place) for place in layouts.values()} == set(hashes.values())
    assert hash_in(tmp_path) == ""


@pytest.mark.parametrize("file", ["permafrost/_lazy.py", "model/deep/table.json"])
def test_every_source_counts(file: str, layouts: dict[str, Path]) -> None:
    before = hash_in(layouts["checkout"])
    with (layouts["checkout"] / file).open("a") as source:
        source.write("\n")
    assert hash_in(layouts["checkout"]) != before


def test_a_process_that_is_gone_has_ended() -> None:
    own = machine.process(os.getpid())
    assert own.parent == os.getppid()
    assert not own.has_ended
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert machine.process(child.pid).state == "Z"
    assert machine.process(child.pid).has_ended
    child.wait()
    assert machine.process(child.pid) == machine.Process()
    assert machine.process(child.pid).has_ended
