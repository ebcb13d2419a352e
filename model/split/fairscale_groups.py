"""Form tensor groups: the processes that share one base network, and what they send each other.

Every import of fairscale is in this file, for the library is no longer maintained. Its process groups and the mappings
over them are used; its linear layers are not, as they ignore the meta device and fill a whole weight before they split
it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale
from fairscale.nn.model_parallel.mappings import (
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor

from permafrost._wire import all_gather
from permafrost.model.errors import BackboneError


@dataclass(frozen=True, eq=False)
class TensorGroup:
    """The processes over which one base network is split: consecutive ranks of the world.

    Every method is collective over the group. None builds a graph: the network is frozen.

    Attributes:
        group: the group that tensors travel in, on the device's backend; fairscale's mappings use it.
        control: group of the same processes for what lives on the host: sizes, errors, small objects.
        rank: 0-based place of this process in the group.
        degree: number of processes.
    """

    group: dist.ProcessGroup
    control: dist.ProcessGroup
    rank: int
    degree: int

    @property
    def world_ranks(self) -> list[int]:
        """Rank of each member in the world."""
        return dist.get_process_group_ranks(self.group)

    def reduce(self, x: Tensor) -> Tensor:
        """Sum tensors of one shape over the group; may overwrite `x`."""
        self._require_current()
        return reduce_from_model_parallel_region(x.contiguous())

    def gather_channels(self, x: Tensor) -> Tensor:
        """Join (..., C / degree) of all members, in rank order, to (..., C)."""
        self._require_current()
        return gather_from_model_parallel_region(x.contiguous())

    def gather_maps(self, x: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return every member's tensor on every member.

        Args:
            x: this member's, of the shape `shapes` says; any may be empty.
            shapes: shape of each member's tensor, in rank order.

        Returns:
            One tensor per member, in rank order.
        """
        lengths = [torch.Size(shape).numel() for shape in shapes]
        flat = x.new_zeros(max(lengths))
        flat[: x.numel()] = x.reshape(-1)
        rows = self.gather_channels(flat).chunk(self.degree)
        return [row[:length].view(shape) for row, length, shape in zip(rows, lengths, shapes, strict=True)]

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return every member's numbers, equally many each, in rank order; the device is not waited for."""
        own = torch.tensor(list(numbers), dtype=torch.int64)
        everyone = [torch.empty_like(own) for _ in range(self.degree)]
        dist.all_gather(everyone, own, group=self.control)
        return [row.tolist() for row in everyone]

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every member's value on every member, in rank order: anything that `permafrost._wire` sends."""
        return all_gather(value, group=self.control)

    def _require_current(self) -> None:
        # The mappings act on the one group that fairscale knows.
        if not fairscale.model_parallel_is_initialized() or fairscale.get_model_parallel_group() is not self.group:
            raise BackboneError(
                "This backbone's tensor group has been left; load the backbone again in the group that is in use."
            )


# The group in use, and the world it belongs to: after a world is taken down, a group of it still looks whole.
_joined: tuple[dist.ProcessGroup | None, TensorGroup] | None = None


def join_tensor_group(degree: int) -> TensorGroup:
    """Divide the world into tensor groups of consecutive ranks and return this process's.

    Collective over the whole world. Asked for again with the same degree it returns the same group; with another one it
    leaves the old groups, whose backbones cannot be used any longer.

    Raises:
        BackboneError: if there is no process group, or its size is not a multiple of the degree.
    """
    global _joined
    if not (dist.is_available() and dist.is_initialized()):
        raise BackboneError(f"A tensor group of {degree} needs torch.distributed to be initialised first.")
    world_size = dist.get_world_size()
    if degree < 1 or world_size % degree:
        raise BackboneError(f"{world_size} processes do not divide into tensor groups of {degree}.")
    if _joined is not None and _joined[0] is dist.group.WORLD and _joined[1].degree == degree:
        return _joined[1]
    leave_tensor_group()
    # It prints its sizes on rank 0; a run says what its mesh is at its own place.
    with contextlib.redirect_stdout(io.StringIO()):
        fairscale.initialize_model_parallel(degree)
    group = control = fairscale.get_model_parallel_group()
    if dist.get_backend(group) != "gloo":
        for first in range(0, world_size, degree):
            candidate = dist.new_group(list(range(first, first + degree)), backend="gloo")
            if first <= dist.get_rank() < first + degree:
                control = candidate
    joined = TensorGroup(group, control, dist.get_rank(group), degree)
    _joined = (dist.group.WORLD, joined)
    return joined


def leave_tensor_group() -> None:
    """Forget the groups; for the end of a world. Safe to call twice."""
    global _joined
    _joined = None
    fairscale.destroy_model_parallel()
