"""Draw the weights of a Swin at random, compare them with a file, and write them to one of our own."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permafrost._files import replacing
from permafrost.model.errors import WeightsError
from permafrost.model.spec import NUM_STAGES, SWIN_V1_SIZES, SWINV2_SIZES
from permafrost.model.swin.parts import Swin
from permafrost.model.swin.v2 import INITIAL_LOGIT_SCALE, SwinV2, SwinV2Classifier
from permafrost.model.weights.formats import listed, misfits
from permafrost.model.weights.header import decode_header, encode_header
from permafrost.model.weights.read import WeightFile
from permafrost.model.weights.shards import write_safetensors
from permafrost.model.weights.tensor_map import is_finite


def draw_weights(network: Swin, *, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Draw parameters for an untrained network in which nothing is an identity by accident, one at a time.

    Weights are normal with variance 1 / fan-in, norms are spread around 1 and 0, so that features keep their scale
    through the depth; position tables weigh as much as the logits they are added to. Drawn on the CPU in float32: a
    seed means the same network everywhere.

    Args:
        network: gives names and shapes; may live on the meta device.
        seed: seed of the draw.

    Yields:
        Name and value of each parameter, by name.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(network.state_dict().items()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("logit_scale"):
            yield name, INITIAL_LOGIT_SCALE + 0.2 * noise
        elif name.endswith("relative_position_bias_table"):
            yield name, noise
        elif "norm" in name.split(".")[-2] and name.endswith("weight"):
            yield name, 1.0 + 0.2 * noise.clamp(-3.0, 3.0)
        elif parameter.ndim == 1:
            yield name, 0.1 * noise
        else:
            yield name, noise / math.sqrt(parameter[0].numel())


def check_fit(network: Swin, name: str, file: WeightFile) -> None:
    """Check that a file holds exactly the tensors of a network.

    Args:
        network: the network, on any device.
        name: its name.
        file: the file. Final norm and classifier are allowed, and passed over, in a network without them.

    Raises:
        WeightsError: if a tensor is missing, unexpected or of another shape, listing which.
    """
    stated = file.metadata.get("name")
    if stated is not None and stated != name:
        raise WeightsError(f"{file.source} holds weights of {stated!r}, but the recipe asks for {name!r}.")
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    classifier = isinstance(network, SwinV2Classifier)
    tensors = file.tensors if classifier else file.backbone_tensors()
    found = tensors.shapes
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    lines = misfits(missing, unexpected, expected, found)
    if not lines:
        return
    hint = _hint(found, expected, missing, unexpected)
    raise WeightsError("\n".join([f"{file.source} does not fit {name}:", *lines, *([f"  {hint}"] if hint else [])]))


def _hint(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    missing: list[str],
    unexpected: list[str],
) -> str:
    """Say what a file that does not fit looks like, where that can be told."""
    if missing and not expected.keys() & found.keys():
        for key in found:
            prefix = key.removesuffix("patch_embed.proj.weight")
            if prefix and prefix != key:
                return f"Its names start with {prefix!r}: give prefix={prefix!r}."
    has_tables, needs_tables = (
        any(key.endswith("relative_position_bias_table") for key in keys) for keys in (found, expected)
    )
    if has_tables and not needs_tables:
        return "It is a Swin V1 checkpoint."
    if needs_tables and any(".cpb_mlp." in key for key in found):
        return "It is a SwinV2 checkpoint."
    if all(found[key] == expected[key] for key in expected.keys() & found.keys()) and all(
        ".enorm." in key for key in missing + unexpected
    ):
        blocks = sorted({tuple(map(int, re.findall(r"\d+", key)[:2])) for key in found if ".enorm." in key})
        interval = blocks[0][1] + 1 if blocks else 0
        return f"Only extra norms differ: give extra_norm_interval={interval} if the weights are meant to be like this."
    depths = [0] * NUM_STAGES
    for key in found:
        if match := re.match(r"layers\.([0-3])\.blocks\.(\d+)\.", key):
            depths[int(match[1])] = max(depths[int(match[1])], int(match[2]) + 1)
    width = found.get("patch_embed.proj.weight", (0,))[0]
    sizes = SWIN_V1_SIZES if needs_tables else SWINV2_SIZES
    like = [name for name, size in sizes.items() if (size.embed_dim, size.depths) == (width, tuple(depths))]
    return f"It looks like {like[0]}." if like else ""


def save_weights(
    model: Swin, path: str | os.PathLike[str], metadata: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a network as safetensors under the official names, atomically.

    The header states name, window_size, pretrained_window_size, for a SwinV2 extra_norm_interval and, for a classifier,
    num_classes; `read_weights` takes them from there.

    Args:
        model: the network or the classifier.
        path: the file.
        metadata: what else the header says. `image_size`, `mean`, `std` are read back; the rest (`provenance`,
            `command`, `accuracy`, ...) is kept as text. Text is stored as it is, anything else as JSON.
        dtype: the tensors' dtype in the file.

    Raises:
        WeightsError: if metadata contradicts the model, or a weight is not finite.
    """
    names = [name for name, size in (SWINV2_SIZES | SWIN_V1_SIZES).items() if size == model.size]
    own: dict[str, Any] = {
        "window_size": model.window_size,
        "pretrained_window_size": model.pretrained_window_size,
    }
    if isinstance(model, SwinV2):
        own["extra_norm_interval"] = model.extra_norm_interval
    if names:
        own["name"] = names[0]
    if isinstance(model, SwinV2Classifier):
        own["num_classes"] = model.head.out_features

    header = encode_header(own)
    for key, value in encode_header(metadata).items():
        if header.setdefault(key, value) != value:
            raise WeightsError(f"{path}: metadata says {key}={value}, but the model has {header[key]}; leave it out.")
    tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in model.state_dict().items()}
    path = Path(path)
    decode_header(header, path)
    broken = [key for key, value in tensors.items() if not is_finite(value)]
    if broken:
        raise WeightsError(
            f"{path}: weights that are not finite (NaN or infinite) in {listed(broken)}; nothing is written."
        )
    with replacing(path) as partial:
        write_safetensors(tensors, partial, header)
