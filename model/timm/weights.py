"""Draw a timm model's weights, read them from a file, or fetch them from timm's own hub; under timm's names in any case."""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from permafrost.model.errors import WeightsError
from permafrost.model.weights.formats import listed, misfits
from permafrost.model.weights.read import locate, read_file

if TYPE_CHECKING:
    from permafrost.model.config import BackboneConfig

PRETRAINED = "pretrained"
TimmModel = Any
"""A module of timm's, whose models have methods in common but no type that declares them."""
_INITIAL_LOGIT_SCALE = math.log(10.0)


@dataclass(frozen=True)
class TimmWeights:
    """Weights that belong to a timm model.

    Attributes:
        source: what errors and reports call them.
        tensors: every tensor under timm's name and in the model's shape, on the CPU.
        originals: those of them that timm resampled, as the source has them.
    """

    source: str
    tensors: dict[str, Tensor]
    originals: dict[str, Tensor] = field(default_factory=dict)

    def source_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return what a fingerprint is made of: these tensors as the source has them. Counters of batches are none."""
        chosen = {name: self.originals.get(name, self.tensors[name]) for name in names}
        return {name: tensor for name, tensor in chosen.items() if tensor.is_floating_point()}


def find_weights(name: str, config: BackboneConfig, *, model: nn.Module, build: Callable[[], TimmModel]) -> TimmWeights:
    """Return the weights that a config names, converted to timm's names and the model's shapes.

    Args:
        name: what the model is called in timm, with its tag if it has one.
        config: its `weights` are "random", "random:SEED", "pretrained", or a file.
        model: the model, as far as it is used.
        build: makes the whole model on the meta device: what timm's conversions ask for shapes.

    Raises:
        WeightsError: if they cannot be had, or belong to another network.
    """
    if config.random_seed is not None:
        return TimmWeights(f"random (seed {config.random_seed})", random_tensors(model, seed=config.random_seed))
    if config.weights == PRETRAINED:
        source, tensors = _download(name)
    else:
        path, prefix = locate(config.weights), config.prefix
        source, tensors = str(path), dict(read_file(path, config.weights_key)[0])
        if prefix:
            chosen = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            if not chosen:
                raise WeightsError(
                    f"{source}: no tensor's name starts with {prefix!r}; they start like {listed(sorted(tensors)[:3])}."
                )
            tensors = chosen
    whole = build()
    file = _converted(source, tensors, whole)
    check_fit(file, name, model=model, whole=whole)
    return file


def random_tensors(model: nn.Module, *, seed: int) -> dict[str, Tensor]:
    """Draw parameters for an untrained network in which nothing is an identity or zero by accident.

    Weights are normal with variance 1 / fan-in; norms and layer scales are spread around 1, so that every branch counts;
    embeddings of places and tokens are as large as to matter beside the patches. Every tensor is drawn on the CPU in
    float32 from a generator of its own, seeded by the seed and the tensor's name: the same on every machine, and whatever
    layers are tapped.

    Args:
        model: gives names, shapes and kinds of modules; may live on the meta device.
        seed: seed of the draw.
    """
    wanted = model.state_dict().keys()
    tensors = {}
    for path, module in model.named_modules():
        for own_name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            name = _named(path, own_name)
            if name in wanted:
                tensors[name] = _drawn(name, tensor, module, seed)
    return tensors


def _drawn(name: str, tensor: Tensor, module: nn.Module, seed: int) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    noise = torch.randn(tensor.shape, generator=generator)
    own_name = name.rpartition(".")[2]
    if own_name == "logit_scale":
        return _INITIAL_LOGIT_SCALE + 0.2 * noise
    is_norm = "Norm" in type(module).__name__ and own_name == "weight"
    if is_norm or own_name == "running_var" or "gamma" in own_name or "scale" in own_name:
        return 1.0 + 0.2 * noise.clamp(-3.0, 3.0)
    if (tensor.ndim >= 3 and tensor.shape[0] == 1) or own_name == "relative_position_bias_table":
        return 0.2 * noise
    if tensor.ndim < 2:
        return 0.1 * noise
    return noise / math.sqrt(tensor[0].numel())


def check_fit(file: TimmWeights, name: str, *, model: nn.Module, whole: TimmModel) -> None:
    """Check that weights hold every tensor that is used, and none that the whole model does not know.

    Args:
        file: after timm's conversion.
        name: the model's name, for the error.
        model: the model as far as it is used.
        whole: the model with what lies behind the last tapped layer; such tensors, and a classifier of any size, may be
            there or not.

    Raises:
        WeightsError: if a tensor is missing, unexpected, of another shape or not finite, listing which.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in file.tensors.items()}
    classifiers = whole.pretrained_cfg.get("classifier") or ()
    classifiers = tuple(f"{prefix}." for prefix in ([classifiers] if isinstance(classifiers, str) else classifiers))
    known = whole.state_dict().keys()
    missing = sorted(key for key in expected.keys() - found.keys() if not key.endswith("num_batches_tracked"))
    unexpected = sorted(key for key in found.keys() - known if not classifiers or not key.startswith(classifiers))
    lines = [f"{file.source} does not fit {name}:", *misfits(missing, unexpected, expected, found)]
    if len(lines) > 1:
        if len(missing) == len(expected):
            lines.append("  It is a file of another model, or its names have a prefix: give prefix=... then.")
        raise WeightsError("\n".join(lines))
    used = {key: file.tensors[key] for key in sorted(expected.keys() & found.keys())}
    is_float = {key: tensor.is_floating_point() for key, tensor in model.state_dict().items()}
    wrong = [key for key, tensor in used.items() if tensor.is_floating_point() != is_float[key]]
    if wrong:
        raise WeightsError(
            f"{file.source}: expected floating-point weights, found {file.tensors[wrong[0]].dtype} in {listed(wrong)}."
        )
    broken = [key for key, tensor in used.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(
            f"{file.source}: weights that are not finite (NaN or infinite) in {listed(broken)}; use another file."
        )


def fill(model: nn.Module, tensors: Mapping[str, Tensor], *, dtype: torch.dtype) -> nn.Module:
    """Give a model on the meta device its weights, in a dtype, on the CPU.

    Tables that are no weights (rotary frequencies, indices of relative positions) are computed anew by the modules that
    own them and cast with the weights, but for rotary frequencies: as in timm (not in all its versions), those stay float32.

    Args:
        model: the model; changed in place.
        tensors: at least the tensors of its state dict, but for counters of batches.
        dtype: what floating-point tensors are cast to.
    """
    resident = {}
    for key, expected in model.state_dict().items():
        tensor = tensors.get(key)
        if tensor is None:  # check_fit lets only counters of batches be absent
            tensor = torch.zeros(expected.shape, dtype=expected.dtype)
        resident[key] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    model.load_state_dict(resident, assign=True)
    for path, module in model.named_modules():
        tables = {key: table for key, table in module.named_buffers(recurse=False) if _named(path, key) not in resident}
        unfilled = {key: table for key, table in tables.items() if table.is_meta}
        for key, table in unfilled.items():
            setattr(module, key, torch.empty_like(table, device="cpu"))
        if unfilled:
            module.init_non_persistent_buffers()
        for key, table in tables.items():
            if table.is_floating_point() and "rope" not in path.split("."):
                setattr(module, key, getattr(module, key).to(dtype))
    return model


def tables_can_be_rebuilt(model: nn.Module) -> bool:
    """Return whether every module with tables outside the state dict says how they are computed."""
    weights = model.state_dict().keys()
    return all(
        hasattr(module, "init_non_persistent_buffers")
        for path, module in model.named_modules()
        for key, _ in module.named_buffers(recurse=False)
        if _named(path, key) not in weights
    )


def _converted(source: str, tensors: dict[str, Tensor], whole: TimmModel) -> TimmWeights:
    """Return weights in any format that timm's own conversion of this model knows, in timm's names and this model's shapes."""
    convert = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return TimmWeights(source, tensors)
    try:
        takes_model = len(inspect.signature(convert).parameters) > 1
        converted = convert(dict(tensors), whole) if takes_model else convert(dict(tensors))
    except Exception as error:  # A foreign file makes a conversion fail in any way.
        raise WeightsError(
            f"{source} does not fit {whole.pretrained_cfg.get('architecture', 'the model')}: timm's conversion fails on it "
            f"({type(error).__name__}: {error}). It holds {len(tensors)} tensors like {listed(sorted(tensors)[:3])}."
        ) from error
    # What is renamed, reshaped or cut out still lies in the source's memory; what is resampled does not. Names alone do not
    # tell: a conversion may move one layer's tensors to the name that another's had.
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    originals = {
        key: tensors[key]
        for key, tensor in converted.items()
        if key in tensors and tensor.untyped_storage().data_ptr() not in memory
    }
    return TimmWeights(source, converted, originals)


def _download(name: str) -> tuple[str, dict[str, Tensor]]:
    """Return the state dict that timm has for a model, through its hub client and cache.

    Raises:
        WeightsError: if there is none, it is not in PyTorch's format, or cannot be reached.
    """
    import timm
    from timm.models import load_state_dict_from_hf

    settings = timm.get_pretrained_cfg(name)
    if settings is None or not settings.has_weights:
        tags = [other for other in timm.list_pretrained(f"{name.partition('.')[0]}*") if "." in other]
        hint = f" It has some for {listed(tags)}." if tags else ""
        raise WeightsError(f"timm has no pretrained weights for {name!r}: give a file, or 'random'.{hint}")
    where = str(settings.hf_hub_id or settings.url)
    if settings.custom_load == "hf" or (settings.custom_load and not settings.hf_hub_id):
        raise WeightsError(
            f"timm's weights for {name!r} ({where}) are in a format of their own, which is not read: take another tag, or "
            "save timm's model as a state dict once and give that file."
        )
    try:
        if settings.hf_hub_id:
            chosen = {"filename": settings.hf_hub_filename} if settings.hf_hub_filename else {}
            tensors = load_state_dict_from_hf(where, weights_only=True, **chosen)
        else:
            tensors = torch.hub.load_state_dict_from_url(where, map_location="cpu", weights_only=True)
    except Exception as error:  # Hub, proxy, disk: the client raises a dozen types.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(
            f"The pretrained weights of {name!r} could not be fetched from {where} ({type(error).__name__}: {reason[:200]}). "
            "On a machine without a network, fetch the file elsewhere and give its path as weights."
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(tensors.get(key), dict):
            tensors = tensors[key]
            break
    return where, tensors


def _named(path: str, key: str) -> str:
    """Return the full name of a module's own tensor."""
    return f"{path}.{key}" if path else key
