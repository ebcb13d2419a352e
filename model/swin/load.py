"""Load a Swin with its weights: from a file, or drawn at random; whole, or one member's share of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from permafrost.model.errors import WeightsError
from permafrost.model.fp8 import quantise_linears, require_fp8
from permafrost.model.spec import SWIN_V1_SIZES
from permafrost.model.swin.v1 import SwinV1
from permafrost.model.swin.v2 import SwinV2
from permafrost.model.swin.weights import check_fit, draw_weights
from permafrost.model.weights.formats import grouped
from permafrost.model.weights.read import WeightFile, read_weights
from permafrost.model.weights.tensor_map import Tensors, materialise
from permafrost.model.weights.windows import Windows, choose_windows

if TYPE_CHECKING:
    from permafrost.model.config import BackboneConfig
    from permafrost.model.network import Network

# Per-channel mean and standard deviation (RGB, pixels in [0, 1]) of ImageNet, which every released Swin was trained
# with; files of our own may state others.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Share(Protocol):
    """The part that one of several processes keeps of a network they hold together, as permafrost.model.split.load makes it."""

    reads_all: bool
    """True if it reads every tensor of a file whole."""

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """Return this process's part of a tensor; maybe a view."""

    def split(self, network: SwinV2) -> Network:
        """Reduce a network on the meta device to this process's part."""


def load_swin(
    config: BackboneConfig, *, dtype: torch.dtype, device: torch.device, share: Share | None = None
) -> tuple[Network, dict[str, Any]]:
    """Load a Swin with its weights, or this process's share of one.

    Returns:
        The network, and where it comes from: `weights`, `mean`, `std`, `fingerprint` (but of a share), and `choices` for
        `describe`.

    Raises:
        BackboneError: if this device cannot do what is asked for.
        WeightsError: if the weights cannot be read, or belong to another network.
    """
    if config.fp8:
        require_fp8(device, dtype)
    seed, drawn = config.random_seed, None
    if seed is None:
        file, config = read_swin(config, check_values=share is None or share.reads_all)
        network = empty_swin(config)
        check_fit(network, config.name, file)
    else:
        file = WeightFile(f"random (seed {seed})", Tensors.of({}), Windows(None, None), rule="drawn at random")
        network = empty_swin(config)
        drawn = draw_weights(network, seed=seed)
    tensors = file.backbone_tensors()

    def keep(key: str, tensor: Tensor) -> Tensor:
        return tensor.to(device, resident_dtype(key, dtype), copy=True)

    source: dict[str, Any] = {}
    if share is not None:
        stream = drawn or ((key, tensors[key]) for key in sorted(tensors))
        resident = {key: keep(key, share.take(key, tensor)) for key, tensor in stream}
    elif drawn is not None:
        resident, source["fingerprint"] = materialise(drawn, keep)
    else:
        resident, source["fingerprint"] = file.load_backbone(keep)
    if dtype == torch.float16:
        overflowing = [key for key, tensor in resident.items() if not torch.isfinite(tensor).all()]
        if overflowing:
            raise WeightsError(f"{file.source}: {overflowing[0]} overflows in float16; use bfloat16 or float32.")
    module: Network = network
    if share is not None:
        assert isinstance(network, SwinV2)
        module = share.split(network)
    network.load_state_dict(resident, assign=True)
    quantised = quantise_linears(network) if config.fp8 else {}
    network.choose_kernels(config, dtype=dtype)
    return module, source | {
        "weights": file.source,
        "mean": file.metadata.get("mean", IMAGENET_MEAN),
        "std": file.metadata.get("std", IMAGENET_STD),
        "choices": {
            "trained_window_size": file.windows.window_size,
            "names": file.rule,
            "left_out": grouped([*(file.tensors.keys() - tensors.keys()), *file.dropped]),
            **quantised,
        },
    }


def read_swin(config: BackboneConfig, *, check_values: bool = True) -> tuple[WeightFile, BackboneConfig]:
    """Read the file of a Swin's weights, as far as names, shapes and windows go.

    Args:
        config: whose weights are no random ones.
        check_values: as of read_weights.

    Returns:
        The file, and the config with what the file states where the config leaves it open: windows and extra norms.

    Raises:
        WeightsError: if it cannot be read, or contradicts the config.
    """
    file = read_weights(config.weights, check_values=check_values, **config.file_options)
    is_v1 = config.name in SWIN_V1_SIZES
    windows = choose_windows(
        file.windows,
        window_size=config.window_size,
        pretrained_window_size=config.pretrained_window_size,
        source=file.source,
        position_tables=is_v1,
    )
    found: dict[str, Any] = vars(windows)
    if config.extra_norm_interval is None and not is_v1:
        found = found | {"extra_norm_interval": file.metadata.get("extra_norm_interval")}
    return file, replace(config, **found)


def empty_swin(config: BackboneConfig) -> SwinV1 | SwinV2:
    """Build a Swin on the meta device, without memory for its weights."""
    windows = {"window_size": config.window_size, "pretrained_window_size": config.pretrained_window_size}
    with torch.device("meta"):
        if config.name in SWIN_V1_SIZES:
            return SwinV1(config.name, **windows)
        return SwinV2(config.name, **windows, extra_norm_interval=config.extra_norm_interval)


def resident_dtype(key: str, dtype: torch.dtype) -> torch.dtype:
    """Return float32 for what the folded constants come from: they are computed once, so precision costs nothing."""
    precise = ".cpb_mlp." in key or key.endswith((".logit_scale", ".relative_position_bias_table"))
    return torch.promote_types(dtype, torch.float32) if precise else dtype
