"""Read hostfiles: one line per node, `node01 slots=8`. Stricter than DeepSpeed, whose names reach a shell nearly unquoted.

A name that is accepted here means nothing else to ssh, to pdsh (lists, ranges, exclusions) or to a shell, so that a
hostfile can only ever name machines. Imports no torch.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from permafrost.launcher.errors import LaunchError

# A user's name, if given, and a host's name or IPv4 address. Both begin with a letter or digit: nothing is an option.
_USER = r"[A-Za-z_][A-Za-z0-9_-]{0,31}"
_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?)*"
_NAME = re.compile(rf"(?:(?P<user>{_USER})@)?(?P<host>{_HOST})")
_LINE = re.compile(r"(?P<name>\S+)[ \t]+slots=(?P<slots>\S+)(?P<rest>.*)")
MAX_NAME = 253
MAX_SLOTS = 1024
EXPECTED = "expected a line such as `node01 slots=8`"


@dataclass(frozen=True)
class Node:
    """One machine of a launch.

    Attributes:
        name: what ssh is given: a host, or user@host.
        slots: processes to start there, one per GPU.
    """

    name: str
    slots: int

    @property
    def host(self) -> str:
        """Return the name without the user."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: Path) -> list[Node]:
    """Read the nodes of a file, in its order; the first one holds rank 0.

    Raises:
        LaunchError: the file cannot be read, or a line is not exactly one node, naming file and line.
    """
    try:
        text = path.read_bytes().decode("ascii", errors="surrogateescape")
    except OSError as error:
        raise LaunchError(f"--hostfile {path} cannot be read: {error.strerror or error}") from None
    nodes: list[Node] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        content = line.removesuffix("\r").strip(" \t")
        if not content or content.startswith("#"):
            continue
        where = f"{path}, line {number}"
        node = _parse_line(content, where)
        # The same machine under two users is one machine, and names of hosts do not tell capitals apart.
        key = node.host.lower()
        if key in lines:
            raise LaunchError(f"{where}: {node.host!r} is there already, on line {lines[key]}: give each node once")
        lines[key] = number
        nodes.append(node)
    if not nodes:
        raise LaunchError(f"{path} names no node: {EXPECTED} for each")
    return nodes


def write_hostfile(path: Path, nodes: list[Node]) -> None:
    """Write the nodes in the form that DeepSpeed reads."""
    path.write_text("".join(f"{node.name} slots={node.slots}\n" for node in nodes))


def _parse_line(content: str, where: str) -> Node:
    for column, character in enumerate(content, start=1):
        if not character.isascii() or (not character.isprintable() and character != "\t"):
            raise LaunchError(f"{where}: column {column} holds {_shown(content, column - 1)}: only plain ASCII is read")
    match = _LINE.fullmatch(content)
    if match is None:
        raise LaunchError(f"{where}: {content!r} is not a node: {EXPECTED}")
    name, slots, rest = match["name"], match["slots"], match["rest"]
    if rest.strip():
        raise LaunchError(f"{where}: {rest.strip()!r} after the slots is not understood: {EXPECTED} and nothing else")
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise LaunchError(
            f"{where}: {name!r} is not a host's name or IPv4 address, which has letters, digits, `-`, `_` and `.` and "
            "begins with a letter or digit (a user may come before it: user@host). For anything else, such as a port, "
            "give the host an entry in ssh's configuration"
        )
    if not re.fullmatch(r"[1-9][0-9]{0,3}", slots) or int(slots) > MAX_SLOTS:
        raise LaunchError(f"{where}: slots={slots}: give the number of processes on the node, 1 to {MAX_SLOTS}")
    return Node(name, int(slots))


def _shown(content: str, index: int) -> str:
    """Return a character that is not plain ASCII, for a terminal that it could deceive."""
    # What follows may belong to it: UTF-8 has up to four bytes a character.
    tail = content[index : index + 4].encode("ascii", errors="surrogateescape")
    for length in range(1, len(tail) + 1):
        try:
            character = tail[:length].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return f"U+{ord(character):04X} {unicodedata.name(character, 'a control character')}"
    return f"the byte 0x{tail[0]:02X}"
