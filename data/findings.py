"""Findings of the check of a data set, which are counted, or raised as one error."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from permafrost.data.errors import DataError

LISTED = 8
"""Findings that an error message shows; the rest is counted."""

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a data set.

    Attributes:
        path: the file, and the place inside of it for a JSON.
        what: what was found and what was expected.
        fatal: whether training and evaluation refuse to start.
        annotation: position in `annotations` when leaving out that one entry would cure it, else None.
        kind: what findings of its kind have in common, for counts; empty is the place in the JSON, or the folder.
    """

    path: str
    what: str
    fatal: bool = True
    annotation: int | None = None
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def raise_fatal(findings: Sequence[Finding], remedy: str = "") -> None:
    """Raise one DataError that counts the fatal findings and shows the first of them; without any, do nothing."""
    fatal = [finding for finding in findings if finding.fatal]
    if not fatal:
        return
    if len(fatal) == 1:
        lines = [str(fatal[0])]
    else:
        lines = [f"{len(fatal)} problems in the data:", *(f"  {finding}" for finding in fatal[:LISTED])]
        if len(fatal) > LISTED:
            lines.append(f"  ... and {len(fatal) - LISTED} more; `permafrost check-data` lists all")
    raise DataError("\n".join(lines + ([remedy] if remedy else [])))


def count_kinds(findings: Sequence[Finding]) -> list[str]:
    """Return how many findings there are of each kind, the most frequent first: "3 errors at FILE: annotations[].bbox"."""
    kinds = Counter(
        (
            ("error" if finding.fatal else "warning") + "{}",
            f": {finding.kind}" if finding.kind else " at " + re.sub(r"\[\d+\]", "[]", _kind(finding.path)),
        )
        for finding in findings
    )
    return [f"{n} {severity.format('s' if n > 1 else '')}{where}" for (severity, where), n in kinds.most_common()]


def _kind(path: str) -> str:
    """Return the place in a JSON, or the folder of an image."""
    return path if ": " in path else f"images in {Path(path).parent}"


def inspect_all(
    items: Sequence[T], problems: Callable[[T], list[Finding]], on_progress: Callable[[int, int], None] | None
) -> list[Finding]:
    """Return what `problems` finds about each item, in order; several are looked at at once, in threads.

    Args:
        items: files, or what describes them.
        problems: decodes one; decoders release the interpreter's lock, or are processes of their own.
        on_progress: called with the items done and all items, now and then.
    """
    found: list[Finding] = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for done, findings in enumerate(pool.map(problems, items), start=1):
            found += findings
            if on_progress is not None and (done % 100 == 0 or done == len(items)):
                on_progress(done, len(items))
    return found
