"""Suggest names for one that does not exist. Imports nothing heavy: every package may use it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence


def nearest(name: str, candidates: Sequence[str], *, cutoff: float = 0.5) -> list[str]:
    """Return up to three candidates that look like `name`, the closest first: wholly, in the last part, or as initials."""

    def tail(text: str) -> str:
        return re.split(r"[:.]", text)[-1]

    def likeness(candidate: str) -> float:
        given, other = name.lower(), candidate.lower()
        whole = difflib.SequenceMatcher(None, given, other).ratio()
        last = difflib.SequenceMatcher(None, tail(given), tail(other)).ratio()
        words = re.split(r"[-_]", tail(other))
        initials = len(words) > 1 and tail(given) == "".join(word[:1] for word in words)
        return max(whole, 0.95 * last, 0.9 * initials)

    scored = sorted(((likeness(candidate), candidate) for candidate in candidates), key=lambda pair: -pair[0])
    return [candidate for value, candidate in scored[:3] if value >= max(cutoff, scored[0][0] - 0.1)]


def did_you_mean(name: str, candidates: Sequence[str]) -> str:
    """Return a sentence that names the nearest candidates, or lists a few when none is near."""
    close = nearest(name, candidates)
    if close:
        return f"did you mean {' or '.join(close)}?"
    shown = ", ".join(sorted(candidates)[:8])
    return f"there is {shown}{', ...' if len(candidates) > 8 else ''}" if candidates else "there is none"
