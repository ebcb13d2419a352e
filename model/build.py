"""Build the network that a BackboneConfig describes: frozen or learning, whole or split over a tensor group."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from permafrost._nearest import did_you_mean
from permafrost.model.config import BackboneConfig
from permafrost.model.cuda_graph import require_graphs
from permafrost.model.errors import BackboneError
from permafrost.model.frozen import FrozenBackbone
from permafrost.model.network import Network
from permafrost.model.precision import check_dtype, choose_dtype, find_device
from permafrost.model.spec import TIMM_PREFIX
from permafrost.model.swin.load import empty_swin, load_swin
from permafrost.model.trainable import TrainableBackbone, require_gradients

if TYPE_CHECKING:
    from permafrost.model.split.fairscale_groups import TensorGroup


def load_backbone(
    name: str,
    *,
    weights: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    tensor_group: TensorGroup | None = None,
    **options: Any,
) -> FrozenBackbone | TrainableBackbone:
    """Load a base network: a frozen one, unless `frozen` is False.

    Args:
        name: a name in the table of sizes (permafrost.model.spec), or `timm/` and a timm model's.
        weights: a file or folder, a known name, "random" ("random:SEED"), or, for a timm model, "pretrained".
        device: where to put it.
        tensor_group: as of build_backbone.
        **options: the other fields of BackboneConfig, by their names. `dtype` may also be a torch.dtype, and None is "auto".

    Raises:
        BackboneError: as of build_backbone, and if there is no such option, with the nearest.
        WeightsError, KernelError: as of build_backbone.
    """
    known = [field.name for field in fields(BackboneConfig)]
    for option in options:
        if option not in known:
            raise BackboneError(f"load_backbone has no option {option!r}: {did_you_mean(option, known)}")
    if "dtype" in options:
        options["dtype"] = "auto" if options["dtype"] is None else str(options["dtype"]).removeprefix("torch.")
    config = BackboneConfig(name, os.fspath(weights) if isinstance(weights, os.PathLike) else weights, **options)
    return build_backbone(config, device, tensor_group=tensor_group)


def build_backbone(
    config: BackboneConfig, device: torch.device | str = "cpu", *, tensor_group: TensorGroup | None = None
) -> FrozenBackbone | TrainableBackbone:
    """Build the network of a config, with its weights.

    Args:
        config: what it is.
        device: where it is to run.
        tensor_group: processes to split it over (permafrost.model.split.fairscale_groups); loading and every forward are then
            collective over them. None: this process has all of it.

    Raises:
        BackboneError: if the device cannot do what is asked for, or the network cannot be split over the group.
        WeightsError: if the weights cannot be read or belong to another network, on any member of the group.
        KernelError: if a kernel is asked for by name that cannot run here.
    """
    device = find_device(device)
    dtype, reason = choose_dtype(config, device)
    check_dtype(dtype, device)
    if config.cuda_graph:
        # Before it is loaded.
        require_graphs(device)
    kind: type[FrozenBackbone] | type[TrainableBackbone] = FrozenBackbone if config.frozen else TrainableBackbone
    if tensor_group is not None:
        if not config.frozen:
            raise BackboneError("A network that is trained is not split over a tensor group: ZeRO 3 shards it.")
        # Only here: it imports fairscale.
        from permafrost.model.split.load import load_split
        from permafrost.model.split.tensor_parallel import SplitBackbone as kind

        network, source = load_split(config, tensor_group, dtype=dtype, device=device)
    elif config.name.startswith(TIMM_PREFIX):
        # Only here: a Swin does without timm.
        from permafrost.model.timm.backbone import load_timm

        network, source = load_timm(config, dtype=dtype, device=device)
    else:
        network, source = load_swin(config, dtype=dtype, device=device)
    said = {"name": config.name, "weights": source.pop("weights")}
    said |= {"dtype": str(dtype).removeprefix("torch."), "dtype_reason": reason}
    backbone = kind(network, config, **source | {"choices": said | source["choices"]})
    if isinstance(backbone, TrainableBackbone):
        require_gradients(backbone.train(), config.name)
        return backbone
    if config.compile:
        backbone.compile_forward()
    if config.cuda_graph:
        backbone.capture_forward()
    return backbone


def empty_network(config: BackboneConfig) -> Network:
    """Build a network on the meta device, without memory for its weights.

    Raises:
        BackboneError: if timm has no such model, or it is none for a backbone.
    """
    if not config.name.startswith(TIMM_PREFIX):
        return empty_swin(config)
    # Only here: a Swin does without timm.
    from permafrost.model.timm.backbone import TimmNetwork

    return TimmNetwork(config.name, taps=config.taps).to("meta")
