"""A program ends with its code, its output, its exit functions, and no teardown of an interpreter that holds torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from permafrost.launcher.ranks.exit import run_and_leave
{imports}
class Witness:
    def __del__(self, write=sys.__stderr__.write):
        write("torn down")
witness = Witness()
atexit.register(print, "exit function", end="")
def main():
    print("unfinished line", end=" ")
    {ending}
run_and_leave(main)
"""
ENDINGS = [
    ("return 0", 0, ""),
    ("return None", 0, ""),
    ("return 3", 3, ""),
    ("sys.exit(2)", 2, ""),
    ("sys.exit()", 0, ""),
    ("sys.exit('no such thing')", 1, "no such thing"),
    ("raise ValueError('broken')", 1, "ValueError: broken"),
    ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
]


def end(ending: str, imports: str = "import torch") -> subprocess.CompletedProcess:
    program = PROGRAM.format(ending=ending, imports=imports)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("ending", "code", "error"), ENDINGS)
def test_without_torch(ending: str, code: int, error: str) -> None:
    done = end(ending, imports="")
    assert (done.returncode, done.stdout) == (code, "unfinished line exit function")
    assert error in done.stderr
    assert "torn down" in done.stderr


@pytest.mark.parametrize(("ending", "code", "error"), [ENDINGS[2], ENDINGS[6]])
def test_with_torch_the_interpreter_is_not_taken_down(ending: str, code: int, error: str) -> None:
    done = end(ending)
    assert (done.returncode, done.stdout) == (code, "unfinished line exit function")
    assert error in done.stderr
    assert "torn down" not in done.stderr
