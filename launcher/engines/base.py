"""The engine of a head, which averages, clips and steps gradients behind one small interface.

Two implementations stand on existing engines: Accelerate (one process, or DDP on one node) and DeepSpeed (ZeRO 1, 2,
3). Both are given the head only. What they hold moves between them, and between numbers of processes, as a HeadState.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from permafrost.launcher.errors import CheckpointError, LaunchError

if TYPE_CHECKING:
    from permafrost.data.types import Batch
    from permafrost.heads.base import Head, LossCounts
    from permafrost.launcher.experiment import OptimizerConfig
    from permafrost.launcher.ranks.process_group import ProcessGroup


@dataclass
class HeadState:
    """Everything that continues a head's training, whoever trained it so far: full CPU tensors in the head's own names.

    Attributes:
        parameters: as in head.named_parameters(), float32 (the dtype of the head's parameters).
        buffers: as in head.state_dict() without the parameters, each in its own dtype.
        exp_avg: AdamW's first moments, one per parameter.
        exp_avg_sq: AdamW's second moments, one per parameter.
        step: optimizer steps taken so far; AdamW's bias correction depends on it. At 0 the moments are zero.
        ema: running averages of the parameters; None where none are kept.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    step: int
    ema: dict[str, Tensor] | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """Return what is evaluated and used: the averages where they are kept, else the parameters."""
        return self.parameters if self.ema is None else self.ema

    def require_fit(self, shapes: Mapping[str, Sequence[int]], buffer_shapes: Mapping[str, Sequence[int]]) -> None:
        """Check this state against the names and shapes of a head.

        Raises:
            CheckpointError: listing what is missing, unexpected or of another shape.
        """
        parts = (
            ("parameters", self.parameters, shapes),
            ("exp_avg", self.exp_avg, shapes),
            ("exp_avg_sq", self.exp_avg_sq, shapes),
            ("buffers", self.buffers, buffer_shapes),
            ("averages", self.weights, shapes),
        )
        for part, found, expected in parts:
            problems = [f"{name} is missing" for name in expected if name not in found]
            problems += [f"{name} is unexpected" for name in found if name not in expected]
            problems += [
                f"{name} has shape {tuple(found[name].shape)}, the head's is {tuple(shape)}"
                for name, shape in expected.items()
                if name in found and tuple(found[name].shape) != tuple(shape)
            ]
            if problems:
                shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
                raise CheckpointError(
                    f"the state's {part} do not fit this head: {shown}. A head of another configuration saved it"
                )
        if self.step < 0:
            raise CheckpointError(f"the state's step is {self.step}: it counts optimizer steps and cannot be negative")


@dataclass
class StepReport:
    """Outcome of one optimizer step.

    Attributes:
        grad_norm: global L2 norm of the gradient before clipping; None where the engine does not know it.
        skipped: the gradient was not finite, so nothing was changed.
    """

    grad_norm: float | None
    skipped: bool


class Engine(Protocol):
    """Trains one head. Every method is called by all ranks, in the same order."""

    name: str
    """For the start-up lines, e.g. "accelerate (DDP over 2 processes, bfloat16, 1 micro-batch(es) a step)"."""
    precision: str
    """Of the head's compute: "float32" or "bfloat16"."""
    head: Head
    """The raw module, for names; under ZeRO 3 its parameters are empty between steps."""

    def __call__(self, features: Sequence[Tensor], batch: Batch, counts: LossCounts) -> Any:
        """Return the head's losses (training mode) or results (evaluation mode, no gradients), under autocast by precision."""

    def train(self, mode: bool = True) -> None:
        """Switch the head between training and evaluation."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate one micro-batch's gradients, divided by the number of micro-batches."""

    def step(self, learning_rate: float) -> StepReport:
        """Clip, step with this learning rate and clear the gradients, after one `backward` per micro-batch."""

    def skip_step(self) -> None:
        """Drop the gradients of this step, after any number of its `backward` calls; nothing else changes."""

    def export_state(self) -> HeadState:
        """Return the full state, on every rank. Between steps only."""

    def masters(self) -> list[Tensor]:
        """Return what this rank's optimizer steps: the parameters, or its float32 parts of them, always in the same order.

        Whoever changes them puts them back, or calls `load_parameters`.
        """

    def export_parameters(self) -> dict[str, Tensor]:
        """Return the full parameters by name, CPU copies on every rank. Between steps only."""

    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Put full parameters in; moments and step stay. Every rank passes the same. Between steps only."""

    def import_state(self, state: HeadState) -> None:
        """Continue exactly from a state; every rank passes the same full one. Between steps only.

        Raises:
            CheckpointError: the state is another head's.
        """


def split_decay(head: nn.Module, no_decay: Sequence[str]) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return (decayed, not decayed) parameters by name: the latter have one dimension or a part of `no_decay` in the name."""
    decayed: dict[str, nn.Parameter] = {}
    not_decayed: dict[str, nn.Parameter] = {}
    for name, parameter in head.named_parameters():
        free = parameter.ndim <= 1 or any(part in name for part in no_decay)
        (not_decayed if free else decayed)[name] = parameter
    return decayed, not_decayed


@dataclass
class ParameterGroup:
    """Parameters that are stepped alike.

    Attributes:
        parameters: by name.
        decayed: whether weight decay applies.
        learning_rate_factor: of the learning rate that arrives with each step.
    """

    parameters: dict[str, nn.Parameter]
    decayed: bool
    learning_rate_factor: float


def parameter_groups(module: nn.Module, optimizer: OptimizerConfig) -> list[ParameterGroup]:
    """Return a module's parameters in groups; the one rule that optimizers, ZeRO's partitions and plans derive from.

    A module may say more about those of its parameters whose names begin alike: `learning_rate_factors` {prefix: factor},
    and `no_decay` {prefix: parts of names} besides the optimizer's. Empty groups are left out.
    """
    factors: Mapping[str, float] = getattr(module, "learning_rate_factors", {})
    more: Mapping[str, Sequence[str]] = getattr(module, "no_decay", {})

    def lookup(found: Mapping[str, Any], name: str, default: Any) -> Any:
        return next((value for prefix, value in found.items() if name.startswith(prefix)), default)

    groups: dict[tuple[bool, float], ParameterGroup] = {}
    decayed, _ = split_decay(module, optimizer.no_decay)
    factor_of = {name: lookup(factors, name, 1.0) for name, _ in module.named_parameters()}
    # The groups' order is always the same: by factor as they first occur, decayed first.
    for factor in dict.fromkeys(factor_of.values()):
        for is_decayed in (True, False):
            groups[is_decayed, factor] = ParameterGroup({}, is_decayed, factor)
    for name, parameter in module.named_parameters():
        is_decayed = name in decayed and not any(part in name for part in lookup(more, name, ()))
        groups[is_decayed, factor_of[name]].parameters[name] = parameter
    return [group for group in groups.values() if group.parameters]


def require_trainable(head: nn.Module) -> None:
    """Check that every parameter of a head is trained: ZeRO aborts over those that get no gradient.

    Raises:
        LaunchError: naming the first that is frozen, or that there is none.
    """
    num_parameters = 0
    for name, parameter in head.named_parameters():
        num_parameters += 1
        if not parameter.requires_grad:
            raise LaunchError(
                f"the head's parameter {name} is frozen: a head is what trains, so register fixed values as buffers"
            )
    if not num_parameters:
        raise LaunchError("the head has no parameters: there is nothing to train")


def resolve_precision(precision: str, device_type: str) -> str:
    """Return the precision that is meant; "auto" is bfloat16 on CUDA, and float32 on a CPU, where bfloat16 is several times slower."""
    if precision == "auto":
        return "bfloat16" if device_type == "cuda" else "float32"
    return precision


def autocast(precision: str, device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a head computes: torch's autocast for "bfloat16", nothing for "float32"."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=torch.bfloat16)


def persistent_buffers(head: nn.Module) -> list[str]:
    """Return the names of the buffers that belong into a checkpoint."""
    buffers = dict(head.named_buffers())
    return [name for name in head.state_dict() if name in buffers]


def export_buffers(head: nn.Module, names: Iterable[str], group: ProcessGroup) -> dict[str, Tensor]:
    """Return CPU copies of rank 0's buffers, on every rank. Collective."""
    return group.broadcast_object({name: head.get_buffer(name).detach().to("cpu", copy=True) for name in names})


@torch.no_grad()
def import_buffers(head: nn.Module, names: Iterable[str], state: HeadState) -> None:
    """Put a state's buffers back into the head."""
    for name in names:
        head.get_buffer(name).copy_(state.buffers[name])


def is_true(value: str | None) -> bool:
    """Return whether an environment variable says yes."""
    return (value or "").strip().lower() in ("1", "true", "yes", "y", "on")
