"""Count the denominators of losses when one step is made of several micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from permafrost.launcher.ranks.process_group import ProcessGroup


class RecordedCounts:
    """LossCounts over all ranks and micro-batches of one step, in two passes.

    First every micro-batch runs forward with `record`, which adds up each named count; `fix` sums over the ranks; then
    the object itself is the LossCounts of the real passes. A count must not depend on another count's denominator,
    which holds for anything that is counted from targets and sampled proposals.

    Engines average gradients over `world_size` ranks and `accumulation` micro-batches, so dividing each local sum by
    total / (world_size * accumulation) makes that average the global sum over the global count.
    """

    def __init__(self, group: ProcessGroup, accumulation: int) -> None:
        self._group = group
        self._shares = group.world_size * accumulation
        self._totals: dict[str, Tensor] = {}
        self._denominators: dict[str, float] | None = None

    def record(self, name: str, count: Tensor) -> Tensor:
        """Count in the first pass; what it returns keeps that pass finite and is used for nothing."""
        count = count.detach()
        self._totals[name] = self._totals.get(name, 0) + count.double()
        return count.float().clamp(min=1.0)

    def fix(self) -> None:
        """Sum what was recorded over the ranks. Collective."""
        names = list(self._totals)
        values = torch.stack([self._totals[name] for name in names]).tolist() if names else []
        means = self._group.all_reduce_mean(dict(zip(names, values)))
        # At least a share of one object, as in heads.base.world_mean_counts: a step without any has loss 0, not 0 / 0.
        self._denominators = {
            name: max(mean * self._group.world_size, 1.0) / self._shares for name, mean in means.items()
        }

    def __call__(self, name: str, count: Tensor) -> Tensor:
        """Return the denominator of `name` for every micro-batch of the step."""
        assert self._denominators is not None, "fix() comes between the recording pass and the real ones"
        return torch.tensor(self._denominators[name], dtype=torch.float32, device=count.device)
