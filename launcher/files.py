"""Replace small files whole, or grow them by a line. Imports no torch, and nothing that holds a lock: `write_atomically` says why."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from permafrost._files import replacing


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace a small file, as `replacing` does; `durable` waits for the disk, so that it survives a power failure."""
    with replacing(path, durable=durable) as partial:
        # Without a buffer, whose lock a data worker that is forked meanwhile would inherit.
        with partial.open("wb", buffering=0) as file:
            rest = memoryview(content.encode() if isinstance(content, str) else content)
            while rest:
                rest = rest[file.write(rest) :]


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
