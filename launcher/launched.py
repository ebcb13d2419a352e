"""What a launcher starts once per rank: `python -m permafrost.launcher.launched WORD`.

The word is the whole assignment (arguments, environment, folder) as base64 of JSON: letters, digits, `-`, `_` and `=`
alone, so no shell, and no program that passes it on to one, can change a byte. It is decoded here, the environment is
taken on, and `permafrost train` runs. How the rank ended is noted in a folder of the node that the launcher watches.

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

from permafrost.launcher.errors import LaunchError
from permafrost.launcher.node_agent import LAUNCH_VARIABLE, NODE_VARIABLE, process_state

TAKEN_VARIABLE = "PERMAFROST_LAUNCH_TAKEN"

MAX_WORD = 100_000
"""Characters: Linux takes no argument above 128 KiB, and pdsh's command carries a little more than the word."""


@dataclass(frozen=True)
class Assignment:
    """What every rank of a launch is told.

    Attributes:
        arguments: of `permafrost train`.
        command: how the user called the launcher, for the run folder.
        folder: current folder of every rank.
        environment: variables that are set on every node.
        nodes: of each node, by number: variables of its own and the folder for its ranks' notes.
    """

    arguments: Sequence[str]
    command: Sequence[str]
    folder: str
    environment: Mapping[str, str]
    nodes: Sequence[NodeAssignment]


@dataclass(frozen=True)
class NodeAssignment:
    """What the ranks of one node are told; see Assignment."""

    notes: str
    environment: Mapping[str, str]


def encode(assignment: Assignment) -> str:
    """One word for a command line.

    Raises:
        LaunchError: it is too long for one.
    """
    # ASCII escapes keep what is no valid Unicode (an argument of arbitrary bytes) as it is.
    text = json.dumps(asdict(assignment), ensure_ascii=True)
    word = base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode()
    if len(word) > MAX_WORD:
        raise LaunchError(
            f"arguments and environment take {len(word)} characters, compressed; at most {MAX_WORD} can be passed to "
            "other nodes: put fields into a recipe of your own, or forward fewer variables"
        )
    return word


def decode(word: str) -> Assignment:
    """The assignment that `encode` made a word of."""
    content = json.loads(zlib.decompress(base64.urlsafe_b64decode(word)))
    nodes = [NodeAssignment(**node) for node in content.pop("nodes")]
    return Assignment(**content, nodes=nodes)


def main(word: str) -> int:
    """Take on the environment, note the process, train, note the end. Returns the exit code."""
    assignment = decode(word)
    own = assignment.nodes[int(os.environ.get(NODE_VARIABLE, 0))]
    os.chdir(assignment.folder)
    launch = os.environ.get(LAUNCH_VARIABLE, "")
    if os.environ.get(TAKEN_VARIABLE) != launch:
        wanted = {**os.environ, **assignment.environment, **own.environment, TAKEN_VARIABLE: launch}
        # Anew, since some variables (LD_LIBRARY_PATH, PYTHON*, OMP_*) are read when a program starts.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)
    # As with `python -m`, minus this module's own word.
    sys.argv = list(assignment.command)
    note = Path(own.notes) / f"rank_{int(os.environ['RANK']):05d}.json"
    write_note(note, None, None)
    try:
        from permafrost.launcher import cli

        code = cli.main(["train", *assignment.arguments])
    except BaseException as raised:
        write_note(note, 1, f"{type(raised).__name__}: {raised}".partition("\n")[0])
        raise
    write_note(note, code, None)
    return code


def write_note(path: Path, code: int | None, error: str | None) -> None:
    """Say which process a rank is and, at its end, how it ended."""
    pid = os.getpid()
    content = {
        "rank": int(os.environ["RANK"]),
        "pid": pid,
        "started": process_state(pid)[1],
        "code": code,
        "error": error,
    }
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(content))
        partial.replace(path)
    except OSError as problem:
        # The launch was ended meanwhile and took the folder away, or the disk is full: the rank's work is not at stake.
        print(f"warning: {path} could not be written: {problem}", file=sys.stderr)


if __name__ == "__main__":
    from permafrost.launcher.leave import run_and_leave

    run_and_leave(lambda: main(sys.argv[1]))
