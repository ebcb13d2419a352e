"""Read safetensors files, single or sharded, memory-mapped, and write sharded weights.

A sharded checkpoint is a folder: `model-00001-of-00003.safetensors`, ..., and `model.safetensors.index.json`, which says
which tensor is in which file (the layout that Hugging Face uses). Ours have a `manifest.json` besides: size and SHA-256
of every shard, the architecture, and the fingerprint of the backbone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from permafrost._files import replacing
from permafrost.model.errors import WeightsError
from permafrost.model.weights.formats import listed
from permafrost.model.weights.tensor_map import Entry, Tensors, add_to_fingerprint

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "permafrost weights 1"
DEFAULT_SHARD_BYTES = 2 << 30
# How safetensors spells dtypes.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        folder: where it lies.
        shards: per file its `num_bytes` and `sha256`.
        architecture: as `permafrost convert` printed it.
        fingerprint: of the backbone's tensors.
    """

    folder: Path
    shards: dict[str, dict[str, Any]]
    architecture: dict[str, Any]
    fingerprint: str

    def damaged_shards(self) -> list[str]:
        """Hash every shard; return those whose content is not what was written."""
        return [name for name, shard in self.shards.items() if _sha256(self.folder / name) != shard["sha256"]]


def read_single(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Open a safetensors file.

    Returns:
        Its tensors, to be read on demand, and its header.

    Raises:
        WeightsError: if it is damaged.
    """
    try:
        file = safe_open(path, framework="pt", device="cpu")
        entries = {}
        for name in file.keys():  # noqa: SIM118
            view = file.get_slice(name)
            dtype = _DTYPES.get(view.get_dtype())
            if dtype is None:
                raise WeightsError(f"{path}: {name} has the dtype {view.get_dtype()}, which is not supported.")
            entries[name] = Entry(tuple(view.get_shape()), dtype, _reader(file, name))
        return Tensors(entries), file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f"{path} is a damaged safetensors file ({error}); download or copy it again.") from error


def read_sharded(index: Path) -> tuple[Tensors, dict[str, str], Manifest | None]:
    """Open the shards of an index. Everything that can be told from the headers is checked here.

    Returns:
        The tensors, to be read on demand; the shards' header; the manifest, if there is one.

    Raises:
        WeightsError: if the index makes no sense, a shard is missing or damaged, or index and shards disagree.
    """
    content = _read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise WeightsError(
            f"{index} has no weight_map of tensors and files; it is not the index of a sharded checkpoint."
        )
    files = sorted(set(weight_map.values()))
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise WeightsError(f"{index} names files outside its folder: {listed(outside)}.")
    if not all(name.endswith(".safetensors") for name in files):
        raise WeightsError(
            f"{index} is the index of {files[0]} and others, which are not safetensors; only sharded safetensors are read. "
            "Save the model as safetensors."
        )
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise WeightsError(
            f"{index} names {len(files)} shards, of which {len(missing)} are not in {index.parent}: {listed(missing)}. "
            "Download or copy them again."
        )
    manifest = _read_manifest(index.parent / MANIFEST_NAME, files)

    entries: dict[str, Entry] = {}
    header: dict[str, str] = {}
    for name in files:
        tensors, header = read_single(index.parent / name)
        promised = {tensor for tensor, file in weight_map.items() if file == name}
        lacking = sorted(promised - set(tensors))
        if lacking:
            raise WeightsError(
                f"{index.parent / name} lacks {len(lacking)} tensors that {index.name} says are in it: {listed(lacking)}. "
                "The shards are of different checkpoints; copy all of them again."
            )
        extra = sorted(set(tensors) - promised)
        if extra:
            raise WeightsError(
                f"{index.parent / name} holds {len(extra)} tensors that {index.name} does not say are in it: "
                f"{listed(extra)}. The shards are of different checkpoints; copy all of them again."
            )
        entries |= tensors.entries
    return Tensors(entries), header, manifest


def write_safetensors(tensors: dict[str, Tensor], path: Path, header: Mapping[str, str]) -> None:
    """Write one file with the permissions that this process gives its files; safetensors leaves it to the owner alone."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(tensors, path, metadata=dict(header))
    path.chmod(mode)


def save_sharded(
    tensors: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    *,
    header: Mapping[str, str],
    architecture: Mapping[str, Any],
    in_fingerprint: Callable[[str], bool],
    dtype: Callable[[str], torch.dtype | None] = lambda name: None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Write tensors as a sharded checkpoint, one shard after the other: about two shards are in memory at a time.

    The folder appears when it is complete; until then it has another name.

    Args:
        tensors: tensors by official name.
        folder: the new folder; it may exist if it is empty.
        header: the header of every shard, as `read_weights` reads it.
        architecture: plain values for the manifest.
        in_fingerprint: which names belong to the backbone.
        dtype: dtype of a tensor in the file; None leaves it.
        max_shard_bytes: most bytes of tensors in one shard; a larger tensor gets a shard of its own.

    Returns:
        The index.

    Raises:
        WeightsError: if the folder holds something or cannot be written, or a tensor does not fit its new dtype.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder} exists and is not an empty folder; give another, or remove it.")
    source = Tensors.of(tensors)
    sizes = {name: _bytes(entry, dtype(name)) for name, entry in sorted(source.entries.items())}
    plan = _plan(sizes, max_shard_bytes)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder, folder=True) as partial:
            weight_map: dict[str, str] = {}
            shards: dict[str, dict[str, Any]] = {}
            digest = hashlib.sha256()
            for number, names in enumerate(plan, start=1):
                file = f"model-{number:05}-of-{len(plan):05}.safetensors"
                content = {name: _cast(name, source[name], dtype(name)) for name in names}
                for name, tensor in content.items():
                    if in_fingerprint(name):
                        add_to_fingerprint(digest, name, tensor)
                write_safetensors(content, partial / file, {"format": "pt", **header})
                weight_map |= dict.fromkeys(names, file)
                shards[file] = {"num_bytes": (partial / file).stat().st_size, "sha256": _sha256(partial / file)}
                del content
            manifest = {
                "format": MANIFEST_FORMAT,
                "architecture": dict(architecture),
                "fingerprint": digest.hexdigest(),
                "shards": shards,
                "tensors": weight_map,
            }
            _write_json(partial / MANIFEST_NAME, manifest)
            total = sum(sizes.values())
            _write_json(partial / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{folder} cannot be written ({error}); give a folder with room.") from error
    return folder / INDEX_NAME


def _reader(file: Any, name: str) -> Callable[[], Tensor]:
    return lambda: file.get_tensor(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON ({error}); download or copy it again.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected an object; download or copy it again.")
    return content


def _read_manifest(path: Path, files: list[str]) -> Manifest | None:
    """Read the manifest beside an index, and compare the sizes of the shards."""
    if not path.is_file():
        return None
    content = _read_json(path)
    if content.get("format") != MANIFEST_FORMAT:
        raise WeightsError(f"{path} is of format {content.get('format')!r}, expected {MANIFEST_FORMAT!r}.")
    try:
        shards = {
            name: {key: shard[key] for key in ("num_bytes", "sha256")} for name, shard in content["shards"].items()
        }
        manifest = Manifest(path.parent, shards, content["architecture"], content["fingerprint"])
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is damaged (no {error}); copy the folder again.") from error
    if sorted(shards) != files:
        raise WeightsError(
            f"{path} lists the shards {listed(sorted(shards))}, but the index beside it {listed(files)}; "
            "they are of different checkpoints."
        )
    for name in files:
        size = (path.parent / name).stat().st_size
        if size != shards[name]["num_bytes"]:
            raise WeightsError(
                f"{path.parent / name} has {size} bytes, but {path.name} says {shards[name]['num_bytes']}: it is "
                "truncated or another file; copy it again."
            )
    return manifest


def _plan(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Return the names of each shard, filled in the order of the names."""
    plan: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if plan[-1] and filled + size > max_bytes:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += size
    return plan


def _bytes(entry: Entry, dtype: torch.dtype | None) -> int:
    return torch.Size(entry.shape).numel() * (dtype or entry.dtype).itemsize


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    if cast.dtype == torch.float16 and not torch.isfinite(cast).all():
        raise WeightsError(f"{name} overflows in float16; use bfloat16 or float32.")
    # Two names may share one tensor, which safetensors refuses to write.
    return cast.clone() if cast.data_ptr() == tensor.data_ptr() else cast


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
