"""Hostfiles: what is read, and what is refused with the line's number."""

from __future__ import annotations

from pathlib import Path

import pytest

from permafrost.launcher.cluster.hostfile import Node, read_hostfile, write_hostfile
from permafrost.launcher.errors import LaunchError


def test_nodes_in_the_order_of_the_file(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(
        b"# two racks\r\n\nnode01 slots=8\r\n  node-02.rack_1.example\tslots=16  \n10.0.0.3 slots=1\nme@gpu slots=2"
    )
    nodes = read_hostfile(path)
    assert nodes == [
        Node("node01", 8),
        Node("node-02.rack_1.example", 16),
        Node("10.0.0.3", 1),
        Node("me@gpu", 2),
    ]
    assert [node.host for node in nodes][-1] == "gpu"
    write_hostfile(tmp_path / "clean", nodes)
    assert read_hostfile(tmp_path / "clean") == nodes
    assert len(read_hostfile(root / "configs/hostfile.example")) == 2


REFUSED = {
    "an option of ssh": (b"-oProxyCommand=touch slots=1", "'-oProxyCommand=touch' is not a host's name"),
    "an option behind a user": (b"me@-oX slots=1", "'me@-oX' is not a host's name"),
    "two commands": (b"a;b slots=1", "'a;b' is not a host's name"),
    "a substitution": (b"$(id) slots=1", r"'\$\(id\)' is not a host's name"),
    "a backquote": (b"`id` slots=1", "'`id`' is not a host's name"),
    "a list of pdsh": (b"a,b slots=1", "'a,b' is not a host's name"),
    "a range of pdsh": (b"node[1-4] slots=1", r"'node\[1-4\]' is not a host's name"),
    "a file for pdsh": (b"^hosts slots=1", r"'\^hosts' is not a host's name"),
    "a pattern for pdsh": (b"/node/ slots=1", "'/node/' is not a host's name"),
    "another rcmd of pdsh": (b"exec:node slots=1", "'exec:node' is not a host's name"),
    "a replacement of pdsh": (b"%h slots=1", "'%h' is not a host's name"),
    "a path": (b"../node slots=1", r"'\.\./node' is not a host's name"),
    "quotes": (b"'node' slots=1", "is not a host's name"),
    "a name too long": (b"n" * 300 + b" slots=1", "is not a host's name"),
    "spaces in the name": (b"node 02 slots=1", "'node 02 slots=1' is not a node"),
    "no slots": (b"node02", "'node02' is not a node: expected a line such as `node01 slots=8`"),
    "slots of another kind": (b"node02 slots:8", "is not a node"),
    "no slot": (b"node02 slots=0", "slots=0: give the number of processes on the node, 1 to 1024"),
    "fewer than none": (b"node02 slots=-1", "slots=-1: give the number"),
    "a fraction": (b"node02 slots=1.5", r"slots=1\.5: give the number"),
    "too many": (b"node02 slots=1025", "slots=1025: give the number"),
    "text glued to the slots": (b"node02 slots=8;id", "slots=8;id: give the number"),
    "text behind": (b"node02 slots=8 max-slots=9", "'max-slots=9' after the slots is not understood"),
    "a comment behind": (b"node02 slots=8 # rack 2", "'# rack 2' after the slots is not understood"),
    "the same node": (b"node01 slots=4", "'node01' is there already, on line 2: give each node once"),
    "the same node in capitals": (b"NODE01 slots=4", "'NODE01' is there already, on line 2"),
    "the same node of another user": (b"me@node01 slots=4", "'node01' is there already, on line 2"),
    "reversed text": ("node\u202e02 slots=8".encode(), r"column 5 holds U\+202E RIGHT-TO-LEFT OVERRIDE"),
    "a letter that looks alike": ("n\u043ede02 slots=8".encode(), r"column 2 holds U\+043E CYRILLIC SMALL LETTER O"),
    "digits of another script": ("node02 slots=\u0661".encode(), r"U\+0661 ARABIC-INDIC DIGIT ONE"),
    "a space that is none": ("node02\u00a0slots=8".encode(), r"column 7 holds U\+00A0 NO-BREAK SPACE"),
    "a separator of lines": ("node02 slots=8\u2028-oX slots=1".encode(), r"U\+2028 LINE SEPARATOR"),
    "a null": (b"node02\0 slots=8", r"column 7 holds U\+0000"),
    "a form feed": (b"node02\x0cslots=8", r"column 7 holds U\+000C"),
    "a return inside": (b"node02\rslots=8", r"column 7 holds U\+000D"),
    "no UTF-8": (b"node\xff02 slots=8", "column 5 holds the byte 0xFF"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_line_is_refused_with_its_number(what: str, tmp_path: Path) -> None:
    line, message = REFUSED[what]
    path = tmp_path / "hosts"
    path.write_bytes(b"# nodes\nnode01 slots=8\n\n" + line + b"\nnode09 slots=8\n")
    with pytest.raises(LaunchError, match=rf"hosts, line 4: .*{message}"):
        read_hostfile(path)


def test_a_file_without_nodes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    with pytest.raises(LaunchError, match="hosts cannot be read: No such file"):
        read_hostfile(path)
    path.write_text("# nothing\n\n")
    with pytest.raises(LaunchError, match="hosts names no node"):
        read_hostfile(path)
