"""Load a SwinV2 over a tensor group: each member reads its own part, and all of them find out that they read the same."""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from permafrost.model.config import NOT_SPLIT
from permafrost.model.errors import BackboneError, WeightsError
from permafrost.model.split.degree import check_tensor_degree
from permafrost.model.split.fairscale_groups import TensorGroup
from permafrost.model.split.tensor_parallel import SplitSwinV2, shard
from permafrost.model.swin.load import load_swin
from permafrost.model.weights.tensor_map import add_to_fingerprint

if TYPE_CHECKING:
    from permafrost.model.config import BackboneConfig
    from permafrost.model.network import Network
    from permafrost.model.swin.v2 import SwinV2


def load_split(
    config: BackboneConfig, group: TensorGroup, *, dtype: torch.dtype, device: torch.device
) -> tuple[Network, dict[str, Any]]:
    """Load this member's part of a SwinV2. Collective over the group.

    Returns:
        As load_swin, once it has succeeded on every member; the fingerprint is that of the whole network.

    Raises:
        BackboneError: if `group` is no TensorGroup, its degree does not fit the network, or something is asked for that a split
            network cannot do.
        Exception: this member's own, whatever it is.
        WeightsError: naming what another member met, as this one would wait for it in vain.
    """
    if not isinstance(group, TensorGroup):
        raise BackboneError(
            f"tensor_group is a {type(group).__name__}; expected the TensorGroup that join_tensor_group of "
            "permafrost.model.split.fairscale_groups gives, or None for no tensor parallelism."
        )
    check_tensor_degree(config.name, group.degree)
    for field, reason in NOT_SPLIT.items():
        if getattr(config, field):
            raise BackboneError(f"backbone.{field} is {getattr(config, field)}: {reason}")
    reader = ShardReader(group)
    loaded: tuple[Network, dict[str, Any]] | None = None
    problem: Exception | None = None
    try:
        loaded = load_swin(config, dtype=dtype, device=device, share=reader)
    except Exception as error:
        problem = error
    reports = group.gather_objects(problem and (str(problem) or type(problem).__name__))
    if problem is not None:
        raise problem
    for rank, report in zip(group.world_ranks, reports, strict=True):
        if report is not None:
            raise WeightsError(f"Rank {rank} of this tensor group could not load the backbone: {report}")
    assert loaded is not None
    network, source = loaded
    return network, source | {"fingerprint": reader.fingerprint(source["weights"])}


class ShardReader:
    """One member's share of a network: its parts out of a stream of whole tensors, and whether all members read the same.

    The first member of a group reads everything, a tensor at a time, for the fingerprint; the others touch only their
    parts. So that a fingerprint vouches for every part, the first member also sums up the parts of the others, and each
    compares.

    Args:
        group: the tensor group.
    """

    def __init__(self, group: TensorGroup) -> None:
        self._group = group
        self.reads_all = group.rank == 0
        self._digest = hashlib.sha256()
        # CRC-32 of the parts of these members.
        self._sums = dict.fromkeys(range(group.degree) if self.reads_all else [group.rank], 0)

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """Return this member's part of a tensor; maybe a view. Names come in the same, sorted, order on every member."""
        own = None
        for member, total in self._sums.items():
            part = shard(name, tensor, member, self._group.degree).detach().contiguous()
            total = zlib.crc32(f"{name} {part.dtype} {tuple(part.shape)}".encode(), total)
            self._sums[member] = zlib.crc32(part.reshape(-1).view(torch.uint8).numpy().data, total)
            own = part if member == self._group.rank else own
        if self.reads_all:
            add_to_fingerprint(self._digest, name, tensor)
        assert own is not None
        return own

    def split(self, network: SwinV2) -> SplitSwinV2:
        """Reduce a network on the meta device to this member's part."""
        return SplitSwinV2(network, self._group)

    def fingerprint(self, source: str) -> str:
        """Return the fingerprint of all that was taken, whole, the same on every member. Collective.

        Raises:
            WeightsError: on every member, if one of them took parts of other weights than the first.
        """
        fingerprint, expected = self._group.gather_objects((self._digest.hexdigest(), self._sums))[0]
        (own,) = (total for member, total in self._sums.items() if member == self._group.rank)
        agreeing = self._group.exchange([own == expected[self._group.rank]])
        odd = [rank for rank, (agrees,) in zip(self._group.world_ranks, agreeing, strict=True) if not agrees]
        if odd:
            raise WeightsError(
                f"{source}: rank {', '.join(map(str, odd))} of this tensor group reads other weights than the first "
                "one; give every process the same file."
            )
        return fingerprint
