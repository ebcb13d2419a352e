"""The stream of samples, which says what image stands where, whatever the number of ranks, workers or restarts."""

from __future__ import annotations

import hashlib

import torch

from permafrost.data.errors import DataError
from permafrost.data.types import SampleKey


class GlobalStream:
    """An endless stream over a data set: epoch after epoch, each a permutation of its own.

    Position p holds sample `order(p // N)[p % N]` of epoch p // N. Step s of a global batch of G takes positions s *
    G to (s + 1) * G, across the ends of epochs, so no sample is dropped and the step number is the only state there
    is: a run resumed at step s, on any number of ranks, sees what the uninterrupted run would have seen.

    Args:
        num_samples: N, the length of the data set.
        seed: of the run; it orders the epochs and seeds every sample's augmentation.

    Raises:
        DataError: the data set is empty.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise DataError("the training set is empty: it needs at least one sample")
        self.num_samples = num_samples
        self.seed = seed
        self._orders: dict[int, list[int]] = {}

    def order(self, epoch: int) -> list[int]:
        """Return the permutation of 0..N-1 of one epoch."""
        if epoch not in self._orders:
            digest = hashlib.sha256(f"order/{self.seed}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
            # A step touches at most the end of one epoch and the start of the next: older orders are not needed again.
            self._orders = {kept: order for kept, order in self._orders.items() if kept == epoch - 1}
            self._orders[epoch] = torch.randperm(self.num_samples, generator=generator).tolist()
        return self._orders[epoch]

    def key(self, position: int) -> SampleKey:
        """Return the sample at a position of the stream."""
        epoch, offset = divmod(position, self.num_samples)
        return SampleKey(self.seed, epoch, self.order(epoch)[offset])

    def epoch(self, step: int, global_batch: int) -> float:
        """Return the epochs completed before a step."""
        return step * global_batch / self.num_samples

    def step_keys(
        self, step: int, global_batch: int, rank: int = 0, world_size: int = 1, accumulation: int = 1
    ) -> list[list[SampleKey]]:
        """Return one rank's samples of a step, one list per micro-batch.

        Args:
            step: 0-based step of the run.
            global_batch: G, samples of the step over all ranks and micro-batches.
            rank: this rank; it takes a contiguous slice of the step's samples.
            world_size: number of ranks.
            accumulation: number of micro-batches that the slice is split into.

        Raises:
            DataError: G does not divide into ranks and micro-batches.
        """
        check_division(global_batch, world_size, accumulation)
        share = global_batch // world_size
        start = step * global_batch + rank * share
        micro = share // accumulation
        return [
            [self.key(position) for position in range(start + part * micro, start + (part + 1) * micro)]
            for part in range(accumulation)
        ]


def check_division(global_batch: int, world_size: int, accumulation: int) -> None:
    """Refuse a global batch that does not split evenly.

    Raises:
        DataError: with the two values that would fit.
    """
    parts = world_size * accumulation
    if global_batch < 1 or global_batch % parts:
        nearest = max(parts, round(global_batch / parts) * parts)
        raise DataError(
            f"a global batch of {global_batch} does not divide into {world_size} ranks x {accumulation} micro-batches: "
            f"use a multiple of {parts}, for example {nearest}"
        )
