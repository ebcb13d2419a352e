"""The program that a launcher starts once per rank: `python -m permafrost.launcher.cluster.rank_main WORD`.

The word names, for each node, a folder there, as base64: letters, digits, `-`, `_` and `=` alone, so no shell, and no
program that passes it on to one, can change a byte. In the node's folder the launcher has left the assignment: arguments,
environment and current folder, in a file that only the user can read, as variables may be secrets. The environment is
taken on and `permafrost train` runs; how the rank ended is noted in the same folder, which the launcher watches.

The standard library alone, until the rank's own work begins.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from permafrost.launcher import cli
from permafrost.launcher.cluster.node_agent import ASSIGNMENT, LAUNCH_VARIABLE, NODE_VARIABLE
from permafrost.launcher.exit_codes import FAILED
from permafrost.launcher.files import write_atomically
from permafrost.launcher.machine import process
from permafrost.launcher.ranks.exit import run_and_leave

TAKEN_VARIABLE = "PERMAFROST_LAUNCH_TAKEN"


@dataclass(frozen=True)
class Assignment:
    """Orders that the ranks of a node are given.

    Attributes:
        arguments: of `permafrost train`.
        command: how the user called the launcher, for the run folder.
        folder: current folder of every rank.
        environment: variables besides those that the launchers between set.
    """

    arguments: Sequence[str]
    command: Sequence[str]
    folder: str
    environment: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the fields for the node's agent. JSON's ASCII escapes keep what is no valid Unicode (an argument of arbitrary bytes)."""
        return asdict(self)


def encode(folders: Sequence[str]) -> str:
    """Make one word for a command line of a folder on each node."""
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(list(folders)).encode(), 9)).decode()


def decode(word: str) -> list[str]:
    """Return the folders that `encode` made a word of."""
    return json.loads(zlib.decompress(base64.urlsafe_b64decode(word)))


def main(word: str) -> int:
    """Take on the environment, note the process, train, note the end. Returns the exit code."""
    own = Path(decode(word)[int(os.environ[NODE_VARIABLE])])
    assignment = Assignment(**json.loads((own / ASSIGNMENT).read_text()))
    os.chdir(assignment.folder)
    launch = os.environ[LAUNCH_VARIABLE]
    if os.environ.get(TAKEN_VARIABLE) != launch:
        # Anew, since some variables (LD_LIBRARY_PATH, PYTHON*, OMP_*) are read when a program starts.
        environment = {**os.environ, **assignment.environment, TAKEN_VARIABLE: launch}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    # As with `python -m`, minus this module's own word.
    sys.argv = list(assignment.command)
    note = own / f"rank_{int(os.environ['RANK']):05d}.json"
    write_note(note, None, None)
    try:
        code = cli.main(["train", *assignment.arguments])
    except BaseException as raised:
        write_note(note, FAILED, f"{type(raised).__name__}: {raised}".partition("\n")[0])
        raise
    write_note(note, code, None)
    return code


def write_note(path: Path, code: int | None, error: str | None) -> None:
    """Say which process a rank is and, at its end, how it ended."""
    pid = os.getpid()
    content = {
        "rank": int(os.environ["RANK"]),
        "pid": pid,
        "started": process(pid).started,
        "code": code,
        "error": error,
    }
    try:
        write_atomically(path, json.dumps(content), durable=False)
    except OSError as problem:
        # The launch was ended meanwhile and took the folder away, or the disk is full: the rank's work is not at stake.
        print(f"warning: {path} could not be written: {problem}", file=sys.stderr)


if __name__ == "__main__":
    run_and_leave(lambda: main(sys.argv[1]))
