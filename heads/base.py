"""Define the contract of a head: features and a batch in; named losses out in training, typed results out in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from permafrost.data.types import Batch

LossCounts = Callable[[str, Tensor], Tensor]
"""counts(name, n): turns this rank's count `n` (0-dim) into the denominator this rank must divide its *sum* by, so that
the mean of the ranks' (and accumulated micro-batches') losses is the global sum over the global count. Every rank asks
for the same names in the same order, once each in a forward."""


def world_mean_counts(name: str, count: Tensor) -> Tensor:
    """Return the mean of `count` over all ranks, at least a share of 1: the default LossCounts.

    Engines average gradients over ranks, so sum_r(loss_r) / world with loss_r = sum_r / (total / world) is sum / total.
    The floor of 1 / world keeps a global batch without any positive at loss 0 instead of 0 / 0.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return count.float().clamp(min=1.0)
    total = count.detach().float().reshape(1)
    dist.all_reduce(total)
    return total.clamp(min=1.0)[0] / dist.get_world_size()


class Head(nn.Module):
    """A head, the part that is trained. Built from a FeatureSpec, by keyword; never sees the backbone class.

    A head's graph does not depend on the data: every parameter gets a gradient and every submodule runs equally often
    in each forward, on every rank (a branch without positives is a zero-weighted pass, not a skipped one), since ZeRO
    aborts or hangs otherwise. Its random choices draw from `batch.keys[i].generator(purpose)`, never from global state.
    """

    def forward(
        self, features: Sequence[Tensor], batch: Batch, counts: LossCounts = world_mean_counts
    ) -> dict[str, Tensor] | list[Any]:
        """Return losses in training mode, results in evaluation mode.

        Args:
            features: one (B, C_i, H/s_i, W/s_i) map per level, in the backbone's dtype.
            batch: the images' targets and keys; in evaluation only sizes and ids are read from the targets.
            counts: what sums of losses are divided by, by name.

        Returns:
            Training: named float32 scalars whose sum is the loss; evaluation: one result of the task per image.
        """
        raise NotImplementedError

    def kernels_of(self, device_type: str) -> AbstractContextManager[None]:
        """Return a context in which forward and backward on a CPU hold what they would hold on such a device, for a plan.

        Whatever computes in another way on a CPU than elsewhere, and needs other memory for it, is to be overridden here.

        Args:
            device_type: "cuda" or "cpu".
        """
        return nullcontext()


@dataclass
class ReleasedHead:
    """A head from a file that others released.

    Attributes:
        tensors: under our names.
        classes: in the order of the labels.
        notes: what was done to the tensors, and where the classes come from.
    """

    tensors: Mapping[str, Tensor]
    classes: list[str]
    notes: list[str]

    @classmethod
    def of_unknown_classes(
        cls, tensors: Mapping[str, Tensor], num_classes: int, file: str, notes: list[str]
    ) -> ReleasedHead:
        """Return one whose classes have names that nobody else's have: of what the file does not name, nothing is known."""
        classes = [f"class {number} of {file}" for number in range(num_classes)]
        return cls(tensors, classes, [*notes, "the file names no classes"])
