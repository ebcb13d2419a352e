"""Small files: replaced whole, or grown by a line. No torch in here, and nothing that holds a lock: see `write_atomically`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give another name to write a file under, and put it in the place of `path` when that is done.

    Args:
        path: what is replaced; whoever reads it, whenever a process is killed, finds the old or the new content.
        durable: hold this through a power failure, too, at the price of waiting for the disk.

    Raises:
        OSError: the disk is full or gone. `path` is as it was, and the unfinished file removed.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace a small file, as `replacing` does."""
    with replacing(path, durable=durable) as partial:
        # Without a buffer, whose lock a data worker that is forked meanwhile would inherit.
        with partial.open("wb", buffering=0) as file:
            rest = memoryview(content.encode() if isinstance(content, str) else content)
            while rest:
                rest = rest[file.write(rest) :]


def sync(path: Path) -> None:
    """Make a file's content, or the names inside a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_json_line(path: Path, content: dict[str, Any]) -> None:
    """Append one JSON object as a line."""
    with path.open("a") as file:
        file.write(json.dumps(content) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file; what is not one (a line cut off by a kill) is passed over."""
    objects = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            content = json.loads(line)
            if isinstance(content, dict):
                objects.append(content)
    return objects
