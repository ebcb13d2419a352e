""".ci/run runs a test that fails once more by itself, and says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FLAKY = """
from pathlib import Path

def test_now_and_then():
    marker = Path(__file__).with_name("ran")
    first = not marker.exists()
    marker.touch()
    assert not first, "the race was lost"

def test_sound():
    assert True
"""
BROKEN = (
    FLAKY
    + """
def test_broken():
    assert False, "it is broken"
"""
)


@pytest.mark.parametrize(("content", "code"), [(FLAKY, 0), (BROKEN, 1), ("import nothing_of_that_name", 1)])
def test_what_fails_once_is_run_again_by_itself(root: Path, tmp_path: Path, content: str, code: int) -> None:
    (tmp_path / "test_it.py").write_text(content)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml=junit.xml", "test_it.py"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode in (1, 2)
    again = [sys.executable, root / ".ci" / "rerun_failed.py", "junit.xml"]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stdout
    assert ("FLAKY test_it.py::test_now_and_then" in done.stdout) == (code == 0)
    assert ("the race was lost" in done.stdout) == (code == 0)


def test_every_call_of_pytest_in_ci_goes_that_way(root: Path) -> None:
    lines = [line.strip() for line in (root / ".ci" / "run").read_text().splitlines()]
    assert [line for line in lines if line.startswith("pytest")] == [
        'pytest -q --junitxml="$work/junit.xml" "$@" || code=$?'
    ]
    assert len([line for line in lines if line.startswith("tests ")]) == 2
