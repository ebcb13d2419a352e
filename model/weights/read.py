"""Read the weights of a base network: every file format in, one state dict of official names out.

Nothing in a file is executed. Read are safetensors files, single or sharded, and PyTorch checkpoints; with the names of
the official code, of SimMIM, EsViT and the detection code, of timm and of Hugging Face (permafrost.model.weights.formats).
Tensors are read when they are used, from memory-mapped files. Files of our own say in their header what they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permafrost._nearest import nearest
from permafrost.model.errors import WeightsError
from permafrost.model.spec import NUM_STAGES
from permafrost.model.weights.download import fetch
from permafrost.model.weights.formats import Reading, choose_state_dict, listed, to_official_names
from permafrost.model.weights.header import decode_header
from permafrost.model.weights.known import PUBLIC_WEIGHTS, find_public, windows_on
from permafrost.model.weights.safe_pickle import read_pickle
from permafrost.model.weights.shards import INDEX_NAME, SINGLE_NAME, Manifest, read_sharded, read_single
from permafrost.model.weights.tensor_map import Entry, Tensors, is_finite, materialise
from permafrost.model.weights.windows import Windows, is_buffer, windows_of_buffers

PRETRAINED_FOLDER = Path(__file__).parents[1] / "pretrained"
FLOATING_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Parts of a classification checkpoint that lie behind the last feature map.
CLASSIFIER_PREFIXES = ("norm.", "head.")
# What a folder may hold, the first that is there.
_FOLDER_NAMES = (INDEX_NAME, SINGLE_NAME, "pytorch_model.bin")


@dataclass(frozen=True)
class KnownWeights:
    """Weights that go by a name of their own.

    Attributes:
        backbone: the base network they belong to.
        file: file of this package, in its folder `pretrained`.
    """

    backbone: str
    file: str


KNOWN_WEIGHTS: dict[str, KnownWeights] = {
    "swinv2_nano_glyphs": KnownWeights("swinv2_nano", "swinv2_nano_glyphs.safetensors"),
}


@dataclass(frozen=True)
class WeightFile:
    """The content of a weights file.

    Attributes:
        source: what errors and reports call it.
        tensors: every weight under its official name, in the file's dtype, on the CPU. They are read on demand, and
            refused then if they are not finite; a plain dictionary may be given.
        windows: the windows the file states.
        metadata: the header's fields, decoded: name, image_size, mean, std, num_classes, extra_norm_interval, where
            given, and every other one as text.
        rule: how the file's names became the official ones.
        dropped: names in the file of what is no part of the network.
        manifest: the manifest of a sharded checkpoint that has one.
    """

    source: str
    tensors: Tensors
    windows: Windows
    metadata: dict[str, Any] = field(default_factory=dict)
    rule: str = "official names"
    dropped: tuple[str, ...] = ()
    manifest: Manifest | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", Tensors.of(self.tensors))

    def backbone_tensors(self) -> Tensors:
        """Return the tensors without the final norm and the classifier."""
        return self.tensors.select(name for name in self.tensors if is_backbone(name))

    def load_backbone(self, keep: Callable[[str, Tensor], Tensor]) -> tuple[dict[str, Tensor], str]:
        """Read the backbone's tensors, each once.

        Args:
            keep: makes of a name and its tensor what is to stay in memory; it must copy.

        Returns:
            What was kept, and the fingerprint.

        Raises:
            WeightsError: if a tensor is not finite, or not what the manifest says was written.
        """
        tensors = self.backbone_tensors()
        kept, digest = materialise(((name, tensors[name]) for name in sorted(tensors)), keep)
        if self.manifest is not None and digest != self.manifest.fingerprint:
            self.check_shards()
            raise WeightsError(f"{self.source}: its manifest is of other tensors; copy the folder again.")
        return kept, digest

    def check_shards(self) -> None:
        """Hash the shards of a checkpoint that has a manifest.

        Raises:
            WeightsError: if one is not what was written, naming it.
        """
        damaged = self.manifest.damaged_shards() if self.manifest else []
        if damaged:
            raise WeightsError(
                f"{self.source}: the tensors are not those that were written. Damaged: {listed(damaged)}; copy the "
                "folder again."
            )


def is_backbone(name: str) -> bool:
    """Return whether a tensor of this official name lies before the last feature map."""
    return not name.startswith(CLASSIFIER_PREFIXES)


def read_weights(
    weights: str | os.PathLike[str],
    *,
    prefix: str | None = None,
    weights_key: str | None = None,
    check_values: bool = True,
) -> WeightFile:
    """Read a weights file, as far as names, shapes and windows go: tensors are read when they are used.

    Args:
        weights: a file, a folder that holds one, the index of a sharded checkpoint, a name in KNOWN_WEIGHTS, or one in
            permafrost.model.weights.known, which is downloaded once.
        prefix: take only tensors whose names start with this, and strip it; "" takes all names as they are. None finds
            the prefix.
        weights_key: the entry of a PyTorch checkpoint that holds the weights. None finds it.
        check_values: refuse a tensor that is not finite when it is read. False, for a reader of parts, leaves all of
            the file unread that is not asked for.

    Raises:
        WeightsError: if there is no such file, it is no weights file, or holds something else than weights.
    """
    path = locate(weights)
    public = None if Path(weights).expanduser().exists() else find_public(weights)
    tensors, header, manifest, note = read_file(path, weights_key)
    reading = to_official_names(tensors, path=path, prefix=prefix)
    if note:
        reading = replace(reading, rule=f"{reading.rule}; {note}")
    metadata = decode_header(header, path)
    windows = Windows(metadata.pop("window_size", None), metadata.pop("pretrained_window_size", None))
    if windows.window_size is None:
        windows = _find_windows(reading, path)
    if public is not None:
        windows = Windows(
            windows.window_size or public.window_size, windows.pretrained_window_size or public.pretrained_window_size
        )
    parameters = {name: entry for name, entry in reading.tensors.entries.items() if not is_buffer(name)}
    wrong = [f"{name} ({entry.dtype})" for name, entry in parameters.items() if entry.dtype not in FLOATING_DTYPES]
    if wrong:
        raise WeightsError(f"{path}: expected floating-point weights, found {listed(wrong)}.")
    if check_values:
        parameters = {name: _checked(name, entry, path) for name, entry in parameters.items()}
    return WeightFile(str(path), Tensors(parameters), windows, metadata, reading.rule, reading.dropped, manifest)


def locate(weights: str | os.PathLike[str]) -> Path:
    """Find the file behind a path or a known name; of a folder, the file or index in it. Public files are downloaded.

    Raises:
        WeightsError: if there is none, naming what comes nearest.
    """
    if str(weights) in KNOWN_WEIGHTS:
        path = PRETRAINED_FOLDER / KNOWN_WEIGHTS[str(weights)].file
        if not path.is_file():
            raise WeightsError(f"{weights}: its file {path} is missing from this installation; reinstall the package.")
        return path
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in _FOLDER_NAMES:
            if (path / name).is_file():
                return path / name
        raise WeightsError(
            f"{path} is a folder without {', '.join(_FOLDER_NAMES)}; give the weights file in it by its name."
        )
    public = find_public(weights)
    if public is not None:
        return fetch(public.url, file=public.file, sha256=public.sha256)
    known = ["random", *KNOWN_WEIGHTS]
    neighbours = list(PUBLIC_WEIGHTS)
    if path.parent.is_dir():
        neighbours += [str(path.parent / entry.name) for entry in path.parent.iterdir() if entry.is_file()]
    close = nearest(str(weights), known + neighbours, cutoff=0.6)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise WeightsError(
        f"There are no weights {str(weights)!r}: no such file, and no such name (known: {', '.join(known)}, "
        f"and {len(PUBLIC_WEIGHTS)} public files, listed in permafrost.model.weights.known).{hint}"
    )


def read_file(path: Path, weights_key: str | None) -> tuple[Tensors, dict[str, str], Manifest | None, str | None]:
    """Open a file, telling the formats apart by content.

    Returns:
        Tensors, header, manifest if there is one, and what is worth saying about the reading.
    """
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
    # A safetensors file starts with the length of its header, whose first byte may be a pickle's too: ask it first.
    is_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8
    if not is_safetensors and (start[:2] == b"PK" or start[:1] == b"\x80"):
        loaded, inert = read_pickle(path)
        state, key = choose_state_dict(loaded, path=path, weights_key=weights_key)
        notes = [f"entry {key!r} of the checkpoint"] if key else []
        notes += [f"not loaded: objects of {listed(inert)}"] if inert else []
        return Tensors.of(state), {}, None, "; ".join(notes)
    if weights_key is not None:
        raise WeightsError(f"{path} is no PyTorch checkpoint, so it has no entry {weights_key!r}: drop weights_key.")
    if path.name.endswith(".index.json"):
        return *read_sharded(path), None
    if start[8:9] == b"{":
        return *read_single(path), None, None
    raise WeightsError(
        f"{path} is neither a safetensors file nor a PyTorch checkpoint (it starts with {start[:8]!r}); "
        "it is damaged or of another kind."
    )


def _checked(name: str, entry: Entry, path: Path) -> Entry:
    """Return an entry that refuses values that are not finite, whenever it is read."""

    def read() -> Tensor:
        tensor = entry.read()
        if not is_finite(tensor):
            raise WeightsError(f"{path}: weights that are not finite (NaN or infinite) in {name}; use another file.")
        return tensor

    return Entry(entry.shape, entry.dtype, read)


def _find_windows(reading: Reading, path: Path) -> Windows:
    """Return the windows of a file without a header of ours: from its buffers, its V1 tables, or the configuration beside it."""
    telling = [name for name in reading.tensors if is_buffer(name) or name.endswith("relative_position_bias_table")]
    windows = windows_of_buffers({name: reading.tensors[name] for name in telling}, source=str(path))
    if windows.window_size is None and reading.rule.startswith("Hugging Face"):
        windows = _windows_of_configuration(path.with_name("config.json"))
    return windows


def _windows_of_configuration(path: Path) -> Windows:
    """Return windows of a Hugging Face model, from its config.json: no stage has a window larger than its map in training."""
    try:
        config = json.loads(path.read_text())
        if config["model_type"] != "swinv2":
            return Windows(None, None)
        windows = windows_on(config["image_size"], config["window_size"])
        pretrained = config.get("pretrained_window_sizes") or [0] * NUM_STAGES
        trained = [given or own for given, own in zip(pretrained, windows, strict=True)]
    except FileNotFoundError:
        return Windows(None, None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path} does not say the windows of a Swin ({error!r}); copy it again, or remove it."
        ) from error
    return Windows(windows, tuple(trained))
