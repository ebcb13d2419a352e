"""Plan what an engine holds for a head and sends between ranks, as the code of DeepSpeed 0.19 and torch's DDP has it.

Head parameters are float32. n is the number of ranks, P the head's parameters in bytes.

- Accelerate: gradients and AdamW's moments whole on every rank. Under DDP the gradients travel in buckets, which hold a
  second copy of them for good.
- ZeRO 1 and 2 keep the weights whole (one flat tensor per parameter group, padded) and, although these are float32
  already, a float32 master copy of this rank's part; gradients pass through a bucket of `reduce_bucket_size` elements
  that exists during a backward however small the head is. They are summed by an *all-reduce* of each bucket
  (`use_multi_rank_bucket_allreduce`), of which a rank keeps its part: ZeRO 2 saves memory, no traffic. The updated
  weights are gathered.
- ZeRO 3 keeps the weights in parts, which also are the masters; those of at most `stage3_param_persistence_threshold`
  elements also whole. Both its bucket and the gradients' parts are there for good. Gradients are reduce-scattered. What
  a forward gathers stays until the backward is done with it as long as the head is smaller than
  `stage3_max_reuse_distance` (10^9); of a larger one `stage3_max_live_parameters` are whole at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

FLOAT32 = 4
# DeepSpeed's own defaults (runtime/zero/config.py), where a JSON does not say.
REDUCE_BUCKET_SIZE = 500_000_000
PERSISTENCE_THRESHOLD = 100_000
MAX_LIVE_PARAMETERS = 1_000_000_000
# ZeRO 1 and 2 align a group to this many elements per rank.
ALIGNMENT = 2

Stage = Literal[0, 1, 2, 3]
"""0: Accelerate."""


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on one rank's device, for one head.

    Attributes:
        weights: of the head, for good.
        optimizer: moments and master weights, for good.
        gradients: held at the optimizer's step: gradients, and what they are collected in.
        resident_gradients: what of them is there for good, in the forward too.
        bucket: what gradients pass through, during a backward only.
        gathered: whole weights that ZeRO 3 gathers for forward and backward.
        keeps_gradients: whether gradients pile up whole on this rank during the backward.
        reducing: more than that while a bucket is reduced, at the end of the backward.
        stepping: more than `gradients` while the optimizer steps.
        host: bytes in host memory.
    """

    weights: int
    optimizer: int
    gradients: int
    resident_gradients: int = 0
    bucket: int = 0
    gathered: int = 0
    keeps_gradients: bool = True
    reducing: int = 0
    stepping: int = 0
    host: int = 0

    @property
    def resident(self) -> int:
        """Return the bytes that are there for good."""
        return self.weights + self.optimizer + self.resident_gradients


@dataclass(frozen=True)
class EnginePlan:
    """Engine of a head, as far as a plan needs to know it.

    Attributes:
        stage: ZeRO's, 0 for Accelerate.
        num_ranks: n.
        accumulation: micro-batches a step.
        zero: the JSON's section zero_optimization.
        is_fused: whether AdamW steps without temporaries, as on CUDA.
    """

    stage: Stage
    num_ranks: int
    accumulation: int = 1
    zero: dict[str, Any] = field(default_factory=dict)
    is_fused: bool = True

    @property
    def bucket_numel(self) -> int:
        """Return the elements of a bucket."""
        return int(self.zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE))

    @property
    def offloads_optimizer(self) -> bool:
        """Return whether the optimizer is in host memory."""
        return (self.zero.get("offload_optimizer") or {}).get("device", "none") == "cpu"

    def is_persistent(self, numel: int) -> bool:
        """Return whether ZeRO 3 also keeps a parameter of this size whole."""
        return numel <= int(self.zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD))

    def memory(self, groups: Sequence[Sequence[int]]) -> EngineMemory:
        """Return what a rank holds, the one that holds most.

        Args:
            groups: elements of every parameter, by AdamW's parameter groups.
        """
        if self.stage == 0:
            return self._accelerate(groups)
        return self._zero3(groups) if self.stage == 3 else self._zero12(groups)

    def with_average(self, memory: EngineMemory) -> EngineMemory:
        """Return the same with a running average of the weights, kept beside what the optimizer steps."""
        if self.offloads_optimizer:
            # Of master weights, two moments and two buffers of gradients one more.
            return replace(memory, host=memory.host + memory.host // 5)
        return replace(memory, optimizer=memory.optimizer + memory.optimizer // (3 if self.stage in (1, 2) else 2))

    def sent(self, groups: Sequence[Sequence[int]]) -> dict[str, int]:
        """Return the bytes a rank sends in a step, in rings, by collective; arguments as of `memory`."""
        n = self.num_ranks
        if n == 1:
            return {}
        whole = sum(map(sum, groups)) * FLOAT32
        if self.stage == 0:
            return {"all-reduce": 2 * (n - 1) * whole // n}
        if self.stage in (1, 2):
            times = self.accumulation if self.stage == 2 else 1
            padded = sum(_pad(sum(group), ALIGNMENT * n) for group in groups) * FLOAT32
            return {"all-reduce": 2 * (n - 1) * whole * times // n, "all-gather": (n - 1) * padded // n}
        parts = [(numel, -(-numel // n) * FLOAT32) for group in groups for numel in group]
        # With one micro-batch what a forward gathers serves the backward. With several, a counting forward comes first:
        # DeepSpeed's trace of a step then does not hold, and forward, backward and counting gather each.
        gathers = 1 if self.accumulation == 1 else 3 * self.accumulation
        large = sum(part for numel, part in parts if not self.is_persistent(numel))
        small = sum(part for numel, part in parts if self.is_persistent(numel))
        return {
            "reduce-scatter": (n - 1) * (large + small) * self.accumulation,
            "all-gather": (n - 1) * (large * gathers + small),
        }

    def _accelerate(self, groups: Sequence[Sequence[int]]) -> EngineMemory:
        whole = sum(map(sum, groups)) * FLOAT32
        buckets = whole if self.num_ranks > 1 else 0
        return EngineMemory(
            weights=whole,
            optimizer=2 * whole,
            gradients=whole + buckets,
            resident_gradients=buckets,
            stepping=self._temporaries(max(max(group) for group in groups) * FLOAT32),
        )

    def _temporaries(self, num_bytes: int) -> int:
        """Return the bytes of a step of AdamW over a tensor of so many: without a fused kernel two of its size."""
        return 0 if self.is_fused else 2 * num_bytes

    def _zero12(self, groups: Sequence[Sequence[int]]) -> EngineMemory:
        n = self.num_ranks
        padded = [_pad(sum(group), ALIGNMENT * n) * FLOAT32 for group in groups]
        part = sum(padded) // n
        bucket = self.bucket_numel * FLOAT32
        largest = max(max(group) for group in groups) * FLOAT32
        whole = sum(map(sum, groups)) * FLOAT32
        # A bucket's slices are joined for the collective, unless all of it is this rank's.
        joined = min(bucket, whole) if n > 1 else 0
        if self.offloads_optimizer:
            return EngineMemory(
                weights=sum(padded) + largest,
                optimizer=0,
                gradients=0,
                bucket=bucket,
                keeps_gradients=self.stage == 1,
                reducing=joined,
                host=5 * part + largest,
            )
        kept = _kept_numel(groups, [one // FLOAT32 // n for one in padded], n) * FLOAT32
        return EngineMemory(
            weights=sum(padded),
            optimizer=3 * part,
            gradients=kept,
            bucket=bucket,
            keeps_gradients=self.stage == 1,
            reducing=joined + kept,
            stepping=max(padded) // n + self._temporaries(max(padded) // n),
        )

    def _zero3(self, groups: Sequence[Sequence[int]]) -> EngineMemory:
        n = self.num_ranks
        parts = [sum(-(-numel // n) for numel in group) * FLOAT32 for group in groups]
        part, whole = sum(parts), sum(map(sum, groups)) * FLOAT32
        # A single rank's parts are the whole weights.
        copied = [numel for group in groups for numel in group if n > 1]
        persistent = sum(numel for numel in copied if self.is_persistent(numel)) * FLOAT32
        most = int(self.zero.get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS))
        gathered = min(sum(copied) * FLOAT32 - persistent, most * FLOAT32)
        bucket = self.bucket_numel * FLOAT32
        reducing = min(bucket, whole) if n > 1 else 0
        if self.offloads_optimizer:
            return EngineMemory(
                weights=part + persistent,
                optimizer=0,
                gradients=bucket,
                resident_gradients=bucket,
                gathered=gathered,
                keeps_gradients=False,
                reducing=reducing,
                host=5 * part,
            )
        return EngineMemory(
            weights=part + persistent,
            # The parts are the masters.
            optimizer=2 * part,
            gradients=part + bucket,
            resident_gradients=part + bucket,
            gathered=gathered,
            keeps_gradients=False,
            reducing=reducing,
            stepping=max(parts) + self._temporaries(max(parts)),
        )


def _kept_numel(groups: Sequence[Sequence[int]], part_numels: Sequence[int], num_ranks: int) -> int:
    """Return the elements of the gradients that ZeRO 1 and 2 keep on the rank that keeps most.

    Parameters are kept whole, also those of which only a piece lies in the rank's part.
    """
    kept = [0] * num_ranks
    for group, part in zip(groups, part_numels):
        start = 0
        for numel in group:
            for rank in range(start // part, (start + numel - 1) // part + 1):
                kept[rank] += numel
            start += numel
    return max(kept)


def _pad(numel: int, multiple: int) -> int:
    return math.ceil(numel / multiple) * multiple
