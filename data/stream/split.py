"""Exact shares of a data set, the same on every machine and with every version of every library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def choose_share(image_ids: Iterable[int], share: float, seed: int) -> set[int]:
    """Exactly round(share * N) of N image ids, at least one.

    Images are ranked by the SHA-256 of seed and id, and the first ones taken: no generator's stream decides, the order of the
    ids does not matter, and a smaller share is part of a larger one of the same seed.
    """
    ranked = sorted(image_ids, key=lambda image_id: hashlib.sha256(f"share/{seed}/{image_id}".encode()).digest())
    return set(ranked[: max(1, round(share * len(ranked)))])
