"""Weights of a base network: every file format in, one state dict of official names out, and the writer of our own.

Nothing in a file is executed. Read are safetensors files and PyTorch checkpoints (`{"model": state_dict}`, as released
with Swin Transformer, `{"state_dict": ...}`, or a bare state dict). Files written by `save_weights` say in their header
what they are; see there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from permafrost.model.errors import WeightsError
from permafrost.model.spec import NUM_STAGES, SWINV2_SIZES
from permafrost.model.swin import INITIAL_LOGIT_SCALE, SwinV2, SwinV2Classifier
from permafrost.model.windows import Windows, is_buffer, windows_of_buffers

PRETRAINED_FOLDER = Path(__file__).parent / "pretrained"
FLOATING_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Parts of a classification checkpoint that lie behind the last feature map.
CLASSIFIER_PREFIXES = ("norm.", "head.")
_MAX_LISTED = 6


@dataclass(frozen=True)
class KnownWeights:
    """Weights that go by a name of their own.

    Attributes:
        backbone: The base network they belong to.
        file: File of this package, in its folder `pretrained`.
    """

    backbone: str
    file: str


KNOWN_WEIGHTS: dict[str, KnownWeights] = {
    "swinv2_nano_glyphs": KnownWeights("swinv2_nano", "swinv2_nano_glyphs.safetensors"),
}


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds.

    Attributes:
        source: What errors and reports call it.
        tensors: Every weight under its official name, in the file's dtype, on the CPU.
        windows: The windows the file states.
        metadata: The header's fields, decoded: name, image_size, mean, std, num_classes, extra_norm_interval, where
            given, and every other one as text.
    """

    source: str
    tensors: dict[str, Tensor]
    windows: Windows
    metadata: dict[str, Any] = field(default_factory=dict)

    def backbone_tensors(self) -> dict[str, Tensor]:
        """The tensors without the final norm and the classifier."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith(CLASSIFIER_PREFIXES)}


def read_weights(
    weights: str | os.PathLike[str], *, prefix: str | None = None, check_values: bool = True
) -> Checkpoint:
    """Reads a weights file.

    Args:
        weights: A path, or a name in KNOWN_WEIGHTS.
        prefix: Take only tensors whose names start with this, and strip it.
        check_values: Look at every value now; False leaves all of the file unread that is not asked for later.

    Raises:
        WeightsError: If there is no such file, it is no weights file, or holds something else than finite weights.
    """
    path = locate(weights)
    tensors, header = _read_file(path)
    if prefix:
        chosen = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if not chosen:
            raise WeightsError(
                f"{path}: no tensor's name starts with {prefix!r}; they start like {_listed(sorted(tensors)[:3])}."
            )
        tensors = chosen
    # SimMIM's first release called the position bias MLP by another name.
    tensors = {name.replace(".rpe_mlp.", ".cpb_mlp."): tensor for name, tensor in tensors.items()}
    metadata = _decode_header(header, path)
    windows = Windows(metadata.pop("window_size", None), metadata.pop("pretrained_window_size", None))
    if windows.window_size is None:
        windows = windows_of_buffers(tensors, source=str(path))
    parameters = {name: tensor for name, tensor in tensors.items() if not is_buffer(name)}
    _check_values(parameters, path, finite=check_values)
    return Checkpoint(str(path), parameters, windows, metadata)


def locate(weights: str | os.PathLike[str]) -> Path:
    """Finds the file behind a path or a known name.

    Raises:
        WeightsError: If there is none, naming what comes nearest.
    """
    if str(weights) in KNOWN_WEIGHTS:
        path = PRETRAINED_FOLDER / KNOWN_WEIGHTS[str(weights)].file
        if not path.is_file():
            raise WeightsError(
                f"{weights}: its file {path} is missing from this installation; install the package anew."
            )
        return path
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; give the weights file in it.")
    known = ["random", *KNOWN_WEIGHTS]
    neighbours = []
    if path.parent.is_dir():
        neighbours = [str(path.parent / entry.name) for entry in path.parent.iterdir() if entry.is_file()]
    nearest = get_close_matches(str(weights), known + neighbours, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise WeightsError(
        f"There are no weights {str(weights)!r}: no such file, and no such name (known: {', '.join(known)}).{hint}"
    )


def draw_weights(network: SwinV2, *, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Draws parameters for an untrained network in which nothing is an identity by accident, one at a time.

    Weights are normal with variance 1 / fan-in, norms are spread around 1 and 0, so that features keep their scale
    through the depth. Drawn on the CPU in float32: a seed means the same network everywhere.

    Args:
        network: Gives names and shapes; may live on the meta device.
        seed: Seed of the draw.

    Yields:
        Name and value of each parameter, by name.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(network.state_dict().items()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("logit_scale"):
            yield name, INITIAL_LOGIT_SCALE + 0.2 * noise
        elif "norm" in name.split(".")[-2] and name.endswith("weight"):
            yield name, 1.0 + 0.2 * noise.clamp(-3.0, 3.0)
        elif parameter.ndim == 1:
            yield name, 0.1 * noise
        else:
            yield name, noise / math.sqrt(parameter[0].numel())


def check_fit(network: SwinV2, name: str, checkpoint: Checkpoint) -> None:
    """Checks that a file holds exactly the tensors of a network.

    Args:
        network: The network, on any device.
        name: Its name.
        checkpoint: The file. Final norm and classifier are allowed, and passed over, in a network without them.

    Raises:
        WeightsError: If a tensor is missing, unexpected or of another shape, listing which.
    """
    stated = checkpoint.metadata.get("name")
    if stated is not None and stated != name:
        raise WeightsError(f"{checkpoint.source} holds weights of {stated!r}, but the recipe asks for {name!r}.")
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    classifier = isinstance(network, SwinV2Classifier)
    tensors = checkpoint.tensors if classifier else checkpoint.backbone_tensors()
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [
        f"{key} is {found[key]}, expected {expected[key]}"
        for key in sorted(expected.keys() & found.keys())
        if expected[key] != found[key]
    ]
    if not (missing or unexpected or shapes):
        return
    lines = [f"{checkpoint.source} does not fit {name}:"]
    for what, entries in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if entries:
            lines.append(f"  {len(entries)} {what}: {_listed(entries)}")
    hint = _hint(found, expected, missing, unexpected, shapes)
    raise WeightsError("\n".join(lines + ([f"  {hint}"] if hint else [])))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hashes tensors by name, dtype, shape and bytes; their order and device do not matter.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        add_to_fingerprint(digest, name, tensors[name])
    return digest.hexdigest()


def add_to_fingerprint(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """One tensor's share of `fingerprint`; names have to come sorted."""
    tensor = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())


def save_weights(
    model: SwinV2, path: str | os.PathLike[str], metadata: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Writes a network as safetensors under the official names, atomically.

    The header states name, window_size, pretrained_window_size, extra_norm_interval and, for a classifier, num_classes;
    `read_weights` takes them from there.

    Args:
        model: The network or the classifier.
        path: The file.
        metadata: What else the header says. `image_size`, `mean`, `std` are read back; the rest (`provenance`,
            `command`, `accuracy`, ...) is kept as text. Text is stored as it is, anything else as JSON.
        dtype: The tensors' dtype in the file.

    Raises:
        WeightsError: If metadata contradicts the model, or a weight is not finite.
    """
    names = [name for name, size in SWINV2_SIZES.items() if size == model.size]
    own: dict[str, Any] = {
        "window_size": model.window_size,
        "pretrained_window_size": model.pretrained_window_size,
        "extra_norm_interval": model.extra_norm_interval,
    }
    if names:
        own["name"] = names[0]
    if isinstance(model, SwinV2Classifier):
        own["num_classes"] = model.head.out_features

    def encoded(values: Mapping[str, Any]) -> dict[str, str]:
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}

    header = encoded(own)
    for key, value in encoded(metadata).items():
        if header.setdefault(key, value) != value:
            raise WeightsError(f"{path}: metadata says {key}={value}, but the model has {header[key]}; leave it out.")
    tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in model.state_dict().items()}
    path = Path(path)
    _decode_header(header, path)
    _check_values(tensors, path)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=header)
    partial.replace(path)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads tensors and header, telling the formats apart by content."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise WeightsError(f"{path} is empty; download it again.")
    if start.lstrip()[:1] == b"<":
        raise WeightsError(
            f"{path} is a web page, not weights: the download was answered with HTML. Download it again."
        )
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`.")
    if path.name.endswith(".index.json"):
        raise WeightsError(
            f"{path} is the index of a sharded checkpoint, which is not supported yet; give a single file."
        )
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _read_torch(path), {}
    if start[8:9] == b"{":
        return _read_safetensors(path)
    raise WeightsError(
        f"{path} is neither a safetensors file nor a PyTorch checkpoint (it starts with {start[:8]!r}); "
        "it is damaged or something else."
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"{path} is a damaged safetensors file ({error}); download or copy it again.") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises half a dozen types for a file it cannot read.
        if "Weights only load failed" in str(error) and (match := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise WeightsError(
                f"{path} holds more than tensors: reading it would execute {match[1]}, which is refused. If you trust "
                "the file, take the tensors out once, elsewhere: torch.save({'model': torch.load(FILE, "
                "weights_only=False)['model']}, NEW_FILE)."
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path} is a damaged PyTorch checkpoint ({reason}); download or copy it again.") from error
    state = loaded
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            state = loaded[key]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        what = (
            f"a dictionary with {_listed(sorted(map(str, loaded)))}"
            if isinstance(loaded, dict)
            else type(loaded).__name__
        )
        raise WeightsError(f"{path} holds {what}; expected a state dict, or one under the key 'model' or 'state_dict'.")
    return {str(name): tensor for name, tensor in state.items()}


def _decode_header(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Decodes the fields that are read back; the others stay text."""

    def integers(value: Any, count: int) -> tuple[int, ...]:
        if len(value) != count or any(type(one) is not int or one < 1 for one in value):
            raise ValueError
        return tuple(value)

    def statistics(value: Any) -> tuple[float, ...]:
        if len(value) != 3 or not all(math.isfinite(one) for one in value):
            raise ValueError
        return tuple(map(float, value))

    decoders = {
        "window_size": lambda value: integers(value, NUM_STAGES),
        "pretrained_window_size": lambda value: integers(value, NUM_STAGES),
        "image_size": lambda value: integers([value], 1)[0],
        "num_classes": lambda value: integers([value], 1)[0],
        "extra_norm_interval": lambda value: integers([value + 1], 1)[0] - 1,
        "mean": statistics,
        "std": statistics,
    }
    decoded: dict[str, Any] = {}
    for key, text in header.items():
        try:
            decoded[key] = decoders[key](json.loads(text)) if key in decoders else text
            if key == "std" and min(decoded[key]) <= 0:
                raise ValueError
        except (ValueError, TypeError) as error:
            raise WeightsError(f"{path}: its header says {key}={text}, which makes no sense; write it anew.") from error
    return decoded


def _check_values(tensors: Mapping[str, Tensor], path: Path, *, finite: bool = True) -> None:
    """Refuses tensors that are no finite floating-point weights; without `finite` only the dtype is looked at."""
    wrong = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in FLOATING_DTYPES]
    if wrong:
        raise WeightsError(f"{path}: expected floating-point weights, found {_listed(wrong)}.")
    broken = [name for name, tensor in tensors.items() if finite and not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(
            f"{path}: weights that are not finite (NaN or infinite) in {_listed(broken)}; it is of no use."
        )


def _hint(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
) -> str:
    """Says what a file that does not fit looks like, where that can be told."""
    if missing and not expected.keys() & found.keys():
        for key in found:
            prefix = key.removesuffix("patch_embed.proj.weight")
            if prefix and prefix != key:
                return f"Its names start with {prefix!r}: give prefix={prefix!r}."
    if any(key.endswith("relative_position_bias_table") for key in found):
        return "It is a Swin V1 checkpoint."
    if "layers.3.downsample.norm.weight" in found:
        return "It is in timm's format; give the original checkpoint."
    if not shapes and all(".enorm." in key for key in missing + unexpected):
        blocks = sorted({tuple(map(int, re.findall(r"\d+", key)[:2])) for key in found if ".enorm." in key})
        interval = blocks[0][1] + 1 if blocks else 0
        return f"Only extra norms differ: give extra_norm_interval={interval} if the weights are meant to be like this."
    depths = [0] * NUM_STAGES
    for key in found:
        if match := re.match(r"layers\.([0-3])\.blocks\.(\d+)\.", key):
            depths[int(match[1])] = max(depths[int(match[1])], int(match[2]) + 1)
    width = found.get("patch_embed.proj.weight", (0,))[0]
    like = [name for name, size in SWINV2_SIZES.items() if (size.embed_dim, size.depths) == (width, tuple(depths))]
    return f"It looks like {like[0]}." if like else ""


def _listed(entries: Iterable[str]) -> str:
    """The first few entries, and how many more there are."""
    entries = list(entries)
    more = f", and {len(entries) - _MAX_LISTED} more" if len(entries) > _MAX_LISTED else ""
    return ", ".join(entries[:_MAX_LISTED]) + more
