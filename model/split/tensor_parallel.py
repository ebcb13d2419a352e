"""Split a frozen SwinV2 over a tensor group.

Only stages 3 and 4 are split; SPLIT_STAGES names them. Each member runs the patch embedding and the stages before on its
own images. At the entry of stage 3 the group gathers its members' maps, of whatever sizes and counts, runs the split
stages on all of them together, and each member keeps its own images' slice. Within a split block a member has some of
the attention heads and some of the hidden channels of the MLP; the partial results of `proj` and `fc2` are summed over
the group before their bias, the norms and the residual, which every member computes on all channels. The step from
stage 3 to 4 is split by output channels, which are gathered before its norm.

model/swin/v2.py knows nothing of this: its modules are built whole, without memory, and get slices and other linear layers
from here.

Shapes: B images of this member, H W map size, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.model.errors import BackboneError
from permafrost.model.frozen import FrozenBackbone
from permafrost.model.network import Network
from permafrost.model.precision import full_precision
from permafrost.model.split.degree import SPLIT_STAGES, check_tensor_degree
from permafrost.model.split.fairscale_groups import TensorGroup
from permafrost.model.swin.v2 import Block, PatchMerging, SwinV2

_STAGES = "".join(map(str, SPLIT_STAGES))
_QKV = re.compile(rf"layers\.[{_STAGES}]\.blocks\.\d+\.attn\.qkv\.weight")
_ROWS = re.compile(
    rf"layers\.[{_STAGES}]\.blocks\.\d+\.(attn\.(q_bias|v_bias|logit_scale|cpb_mlp\.2\.weight)|mlp\.fc1\.(weight|bias))"
    # The step that leads into a split stage from an unsplit one is not split.
    rf"|layers\.[{_STAGES[:-1]}]\.downsample\.reduction\.weight"
)
_COLUMNS = re.compile(rf"layers\.[{_STAGES}]\.blocks\.\d+\.(attn\.proj|mlp\.fc2)\.weight")


def is_split(name: str) -> bool:
    """Return whether the members of a group hold different parts of this parameter; the others are whole on each."""
    return any(pattern.fullmatch(name) for pattern in (_QKV, _ROWS, _COLUMNS))


def shard(name: str, tensor: Tensor, rank: int, degree: int) -> Tensor:
    """Return one member's part of a parameter.

    Args:
        name: official name of the parameter.
        tensor: the whole parameter, on any device; of one that is mapped from a file only the part is read.
        rank: the member's place in its group.
        degree: members of the group.

    Returns:
        The heads' rows of q, of k and of v for the joined projection, rows or columns for other split parameters, and
        the tensor itself for those that are not split. A view where that is possible.
    """
    if _QKV.fullmatch(name):
        return _part(tensor.unflatten(0, (3, -1)), 1, rank, degree).flatten(0, 1)
    if _ROWS.fullmatch(name):
        return _part(tensor, 0, rank, degree)
    if _COLUMNS.fullmatch(name):
        return _part(tensor, 1, rank, degree)
    return tensor


def _part(tensor: Tensor, dim: int, rank: int, degree: int) -> Tensor:
    length, rest = divmod(tensor.shape[dim], degree)
    assert not rest, f"{tuple(tensor.shape)} does not divide by {degree} along {dim}"
    return tensor.narrow(dim, rank * length, length)


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module


class ReducedLinear(nn.Module):
    """A linear layer split by input channels: partial products are summed over the group, then the bias is added."""

    def __init__(self, linear: nn.Linear, group: TensorGroup) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C_in / degree) to (..., C_out), the same on every member."""
        return self.group.reduce(F.linear(x, self.weight)) + self.bias


class GatheredLinear(nn.Module):
    """A linear layer without bias split by output channels, which are gathered over the group."""

    def __init__(self, linear: nn.Linear, group: TensorGroup) -> None:
        super().__init__()
        self.weight = linear.weight
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C_in) to (..., C_out), the same on every member."""
        return self.group.gather_channels(F.linear(x, self.weight))


class SplitSwinV2(Network):
    """One member's part of a SwinV2.

    The network given is taken apart: its split parameters become this member's slices, on whatever device they are,
    the meta device included. Names of parameters stay.

    Args:
        network: the whole network.
        group: the group; only its `rank` and `degree` are read here.

    Raises:
        BackboneError: if the heads of the split stages do not divide by the degree.
    """

    def __init__(self, network: SwinV2, group: TensorGroup) -> None:
        super().__init__()
        check_tensor_degree("this SwinV2", group.degree, network.size)
        self.group = group
        self.num_whole_parameters = sum(parameter.numel() for parameter in network.parameters())
        for name, parameter in list(network.named_parameters()):
            if is_split(name):
                owner_name, _, own_name = name.rpartition(".")
                owner = network.get_submodule(owner_name)
                part = shard(name, parameter.detach(), group.rank, group.degree).clone(
                    memory_format=torch.contiguous_format
                )
                setattr(owner, own_name, nn.Parameter(part, requires_grad=False))
                if isinstance(owner, nn.Linear):
                    owner.out_features, owner.in_features = owner.weight.shape
        for stage in (network.layers[index] for index in SPLIT_STAGES):
            for block in stage.blocks:
                assert isinstance(block, Block)
                block.attn.num_heads //= group.degree
                # What was folded belongs to all heads.
                block.attn.folded = None
                block.attn.proj = ReducedLinear(_linear(block.attn.proj), group)
                block.mlp.fc2 = ReducedLinear(_linear(block.mlp.fc2), group)
            if isinstance(stage.downsample, PatchMerging):
                stage.downsample.reduction = GatheredLinear(_linear(stage.downsample.reduction), group)
        self.network = network
        self.spec, self.min_image_size = network.spec, network.min_image_size

    def fold(self) -> None:
        """Fold as SwinV2 does; of the split blocks, this member's heads."""
        self.network.fold()

    def describe(self) -> dict[str, Any]:
        """Return what the whole network says, and how it is split."""
        return self.network.describe() | {
            "tensor_degree": self.group.degree,
            "resident_parameters": sum(parameter.numel() for parameter in self.parameters()),
        }

    def forward(self, images: Tensor, shapes: Sequence[tuple[int, int, int]]) -> tuple[Tensor, ...]:
        """Compute the raw output of every stage for this member's images. Collective over the group.

        Args:
            images: (B, 3, H, W), normalised; B may be 0.
            shapes: (B, H, W) of every member's images, in rank order.

        Returns:
            Four maps (B, C_i, ceil(H / s_i), ceil(W / s_i)) in channels_last.
        """
        spec, first = self.spec, SPLIT_STAGES[0]
        features, x = self._own_stages(images)
        entries = [
            (count, *(-(-side // spec.strides[first]) for side in sides), spec.channels[first])
            for count, *sides in shapes
        ]
        maps = self.group.gather_maps(x, entries) if any(count for count, *_ in entries) else []
        # Maps of one size make one batch; padding them to a common size would move their windows.
        members_of: dict[tuple[int, int], list[int]] = {}
        for member, (count, height, width, _) in enumerate(entries):
            if count:
                members_of.setdefault((height, width), []).append(member)
        for members in members_of.values():
            x = torch.cat([maps[member] for member in members])
            is_own = self.group.rank in members
            start = sum(entries[member][0] for member in members if member < self.group.rank)
            for stage in self.network.layers[first:]:
                x = stage(x, [None] * len(stage.blocks))
                if is_own:
                    # A copy: a slice would keep every member's maps alive for as long as the head needs its own.
                    features.append(x[start : start + len(images)].permute(0, 3, 1, 2).clone())
                if stage.downsample is not None:
                    x = stage.downsample(x)
        return (*features, *self._empty_maps(images, range(len(features), spec.num_levels)))

    def _own_stages(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps of the unsplit stages, and what enters the first split one, (B, H, W, C)."""
        first = SPLIT_STAGES[0]
        if not len(images):
            (entry,) = self._empty_maps(images, [first])
            return list(self._empty_maps(images, range(first))), entry.permute(0, 2, 3, 1)
        features = []
        x = self.network.patch_embed(images)
        for stage in self.network.layers[:first]:
            x = stage(x, [None] * len(stage.blocks))
            features.append(x.permute(0, 3, 1, 2))
            assert stage.downsample is not None
            x = stage.downsample(x)
        return features, x

    def _empty_maps(self, images: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """Return what no images give on some levels: (0, C_i, H_i, W_i)."""
        assert not levels or not len(images)
        maps = []
        for level in levels:
            sides = (-(-side // self.spec.strides[level]) for side in images.shape[2:])
            empty = images.new_empty(0, self.spec.channels[level], *sides)
            maps.append(empty.contiguous(memory_format=torch.channels_last))
        return maps


class SplitBackbone(FrozenBackbone):
    """A FrozenBackbone of which each member of a tensor group holds a part.

    Its forward is collective over the group: every member calls it equally often, each with its own images, of any
    size, down to none at all (0, 3, H, W), and gets its own features.
    """

    min_batch = 0
    network: SplitSwinV2

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the whole network."""
        return self.network.num_whole_parameters

    def compile_forward(self) -> None:
        """Refuse: a forward that waits for other processes is neither compiled nor captured.

        Raises:
            BackboneError: Always.
        """
        raise BackboneError("A backbone that is split over a tensor group is neither compiled nor captured.")

    capture_forward = compile_forward

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute as FrozenBackbone does; an error of one member is an error on all, since the others would wait for it.

        Raises:
            BackboneError: if the images of any member cannot be used.
        """
        problem = None
        try:
            self._check_images(images)
        except BackboneError as error:
            problem = error
        group = self.network.group
        shape = (0, 0, 0) if problem else (images.shape[:-3].numel() // self.patch_frames, *images.shape[-2:])
        reports = group.exchange((problem is not None, *shape))
        if problem is not None:
            raise problem
        refusing = [member for member, (is_bad, *_) in enumerate(reports) if is_bad]
        if refusing:
            ranks = group.world_ranks
            raise BackboneError(
                f"The backbone refuses the images of rank {', '.join(str(ranks[member]) for member in refusing)} of this "
                "tensor group; see the error there."
            )
        return self._folded(
            images,
            lambda flat: self._maps_together(flat, [(count, height, width) for _, count, height, width in reports]),
        )

    def _maps_together(self, images: Tensor, shapes: Sequence[tuple[int, int, int]]) -> tuple[Tensor, ...]:
        """Return maps of images (N, 3, H, W), in as many passes as the member with most images needs.

        Args:
            images: this member's.
            shapes: (N, H, W) of every member's, in rank order.
        """
        most = max(count for count, *_ in shapes)
        size = self.max_images or max(1, most)
        parts = []
        with full_precision(self.device):
            for start in range(0, max(1, most), size):
                entries = [(min(max(0, count - start), size), *sides) for count, *sides in shapes]
                parts.append(self.network(self._normalise(images[start : start + size]), entries))
        # A join with maps of no images would not be channels_last.
        own = [part for part in parts if len(part[0])] or parts[:1]
        return own[0] if len(own) == 1 else tuple(torch.cat(maps) for maps in zip(*own))
