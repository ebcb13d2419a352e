"""Parts that data sets of many files share: they pick shares of records, keep records in memory, count unreadable files."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from permafrost.data.errors import DataError

T = TypeVar("T")

MIN_TOLERATED = 10
"""Unreadable files that are tolerated in a data set of any size."""


def tolerated(num_files: int, share: float) -> int:
    """Return how many files of a data set may be unreadable: this share of them, and MIN_TOLERATED always."""
    return max(MIN_TOLERATED, int(share * num_files))


def spread(records: Sequence[T], most: int | None) -> Sequence[T]:
    """Return at most so many records, spread evenly over all: they are often sorted by class or scene. None takes all."""
    if most is None or most >= len(records):
        return records
    return [records[index] for index in np.linspace(0, len(records) - 1, most).round().astype(int)]


def choose_share(image_ids: Iterable[int], share: float, seed: int) -> set[int]:
    """Return exactly round(share * N) of N image ids, at least one.

    Images are ranked by the SHA-256 of seed and id, and the first ones taken: no generator's stream decides, the order of the
    ids does not matter, and a smaller share is part of a larger one of the same seed.
    """
    ranked = sorted(image_ids, key=lambda image_id: hashlib.sha256(f"share/{seed}/{image_id}".encode()).digest())
    return set(ranked[: max(1, round(share * len(ranked)))])


class Listing:
    """Tells which files are there. Lists each folder once, which is quicker than asking for every file."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def has(self, path: str | Path) -> bool:
        """Tell whether there is something of this name."""
        parent, name = os.path.split(path)
        if parent not in self._names:
            try:
                self._names[parent] = set(os.listdir(parent))
            except OSError:
                self._names[parent] = set()
        return name in self._names[parent]


class PackedRecords(Sequence):
    """A list of plain records kept as one array of bytes.

    Data workers are forked: a list of Python objects would be copied page by page into each of them as reference counts
    change (gigabytes for COCO), an array is shared.

    Args:
        records: what to keep; every access unpacks a fresh copy.
    """

    def __init__(self, records: Sequence[Any]) -> None:
        packed = [pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL) for record in records]
        self._ends = np.cumsum([len(part) for part in packed], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(packed), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        start = self._ends[index - 1] if index else 0
        return pickle.loads(self._bytes[start : self._ends[index]].data)


class ReplacementTracker:
    """Counts distinct unreadable training images (or videos) in the main process, and stops the run when there are too many.

    Args:
        num_images: images of the data set.
        share: largest share that is tolerated; MIN_TOLERATED images always are.
        what: what the files are called in the message.
    """

    def __init__(self, num_images: int, share: float, what: str = "images") -> None:
        self.num_images = num_images
        self.what = what
        self.limit = tolerated(num_images, share)
        self.reasons: dict[str, str] = {}

    @property
    def count(self) -> int:
        """Return the number of distinct files seen so far."""
        return len(self.reasons)

    def update(self, replaced: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Take in `Batch.replaced`.

        Returns:
            the (path, reason) pairs that are new: to be said once.

        Raises:
            DataError: more files than the limit cannot be read.
        """
        new = []
        for path, reason in replaced:
            if path not in self.reasons:
                self.reasons[path] = reason
                new.append((path, reason))
        if self.count > self.limit:
            shown = "\n".join(f"  {path}: {reason}" for path, reason in list(self.reasons.items())[:5])
            raise DataError(
                f"{self.count} of {self.num_images} training {self.what} cannot be read, {self.limit} are tolerated "
                f"(data.corrupt_share); the first:\n{shown}"
            )
        return new
