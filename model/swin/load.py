"""A Swin with its weights: from a file, or drawn at random; whole, or one member's part of it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from permafrost.model.errors import WeightsError
from permafrost.model.fp8 import quantise_linears
from permafrost.model.spec import SWIN_V1_SIZES
from permafrost.model.swin.v1 import SwinV1
from permafrost.model.swin.v2 import SwinV2
from permafrost.model.swin.weights import check_fit, draw_weights
from permafrost.model.weights.formats import grouped
from permafrost.model.weights.read import WeightFile, read_weights
from permafrost.model.weights.tensor_map import materialise
from permafrost.model.weights.windows import Windows, choose_windows

if TYPE_CHECKING:
    from permafrost.model.backbone import Network

# Per-channel mean and standard deviation (RGB, pixels in [0, 1]) of ImageNet, which every released Swin was trained
# with; files of our own may state others.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def load_swin(
    name: str,
    *,
    weights: str | os.PathLike[str],
    window_size: int | Sequence[int] | None,
    pretrained_window_size: int | Sequence[int] | None,
    dtype: torch.dtype,
    device: torch.device,
    tensor_group: Any,
    prefix: str | None,
    weights_key: str | None,
    extra_norm_interval: int | None,
    attention: str,
    residual_norm: str,
    gelu: str,
    learns: bool,
    fp8: bool,
) -> tuple[Network, dict[str, Any]]:
    """A Swin with its weights, or this process's part of one.

    Returns:
        The network, and where it comes from: `weights`, `mean`, `std`, `fingerprint` (of a part `shards`, which knows
        it), and `choices` for `describe`.
    """
    seed = re.fullmatch(r"random(?::(\d+))?", str(weights))
    # One member of a group reads all of a file; the others only what they hold.
    is_reader = tensor_group is None or tensor_group.rank == 0
    file = None
    if not seed:
        file = read_weights(weights, prefix=prefix, weights_key=weights_key, check_values=is_reader)
    if file is None:
        windows = Windows(window_size, pretrained_window_size)
    else:
        if extra_norm_interval is None:
            extra_norm_interval = file.metadata.get("extra_norm_interval")
        windows = choose_windows(
            file.windows,
            window_size=window_size,
            pretrained_window_size=pretrained_window_size,
            source=file.source,
            position_tables=name in SWIN_V1_SIZES,
        )
    arguments = {"window_size": windows.window_size, "pretrained_window_size": windows.pretrained_window_size}
    with torch.device("meta"):
        network = (
            SwinV1(name, **arguments)
            if name in SWIN_V1_SIZES
            else SwinV2(name, **arguments, extra_norm_interval=extra_norm_interval)
        )
    if file is None:
        number = int(seed[1] or 0)
        file = WeightFile(f"random (seed {number})", {}, Windows(None, None), rule="drawn at random")
        drawn = draw_weights(network, seed=number)
    else:
        check_fit(network, name, file)
        drawn = None
    tensors = file.backbone_tensors()

    def keep(key: str, tensor: Tensor) -> Tensor:
        return tensor.to(device, resident_dtype(key, dtype), copy=True)

    shards = None
    if tensor_group is not None:
        from permafrost.model.split.tensor_parallel import ShardReader, SplitSwinV2

        shards = ShardReader(tensor_group)
        stream = drawn or ((key, tensors[key]) for key in sorted(tensors))
        resident = {key: keep(key, shards.take(key, tensor)) for key, tensor in stream}
    elif drawn is not None:
        resident, digest = materialise(drawn, keep)
    else:
        resident, digest = file.load_backbone(keep)
    if dtype == torch.float16:
        overflowing = [key for key, tensor in resident.items() if not torch.isfinite(tensor).all()]
        if overflowing:
            raise WeightsError(f"{file.source}: {overflowing[0]} overflows in float16; use bfloat16 or float32.")
    module: Network = network if shards is None else SplitSwinV2(network, tensor_group)
    network.load_state_dict(resident, assign=True)
    quantised = quantise_linears(network) if fp8 else {}
    network.choose_kernels(attention=attention, residual_norm=residual_norm, gelu=gelu, dtype=dtype, learns=learns)
    return module, {
        "weights": file.source,
        "mean": file.metadata.get("mean", IMAGENET_MEAN),
        "std": file.metadata.get("std", IMAGENET_STD),
        **({"fingerprint": digest} if shards is None else {"shards": shards}),
        "choices": {
            "trained_window_size": file.windows.window_size,
            "names": file.rule,
            "left_out": grouped([*(file.tensors.keys() - tensors.keys()), *file.dropped]),
            **quantised,
        },
    }


def resident_dtype(key: str, dtype: torch.dtype) -> torch.dtype:
    """Keeps what the folded constants come from in float32: they are computed once, so precision costs nothing."""
    precise = ".cpb_mlp." in key or key.endswith((".logit_scale", ".relative_position_bias_table"))
    return torch.promote_types(dtype, torch.float32) if precise else dtype
