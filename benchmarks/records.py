"""The part that every benchmark's rows need: the machine's name, where the code stands, and a CSV that grows a row at a time."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def processor() -> str:
    """The processor's own name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def provenance() -> dict[str, str]:
    """The columns `date`, `commit` (of the source, short) and `processor`."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    )
    return {"date": datetime.date.today().isoformat(), "commit": commit.stdout.strip(), "processor": processor()}


def read(path: Path) -> list[dict[str, str]]:
    """The rows there are."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def append(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """More rows, on disk at once; the first ones come below a header.

    Raises:
        ValueError: the file has other columns.
    """
    is_new = not path.exists()
    if not is_new:
        header = path.read_text().splitlines()[0].split(",")
        if header != list(fields):
            raise ValueError(f"{path} has the columns {header}, these rows have {list(fields)}: move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
