"""Turn the names in a weights file into the official names: which entry of a checkpoint, which prefix, which convention.

Every convention holds the same numbers in the same order, so a mapping of names is all there is, save that Hugging Face
files keep query, key and value apart:

- official (microsoft/Swin-Transformer), also with a prefix: SimMIM's `encoder.`, the detection code's `backbone.`, the
  `module.` of a data-parallel wrapper. SimMIM's first release called the position bias MLP `rpe_mlp`.
- timm: the step to the next resolution belongs to the stage after it, the classifier is `head.fc`.
- Hugging Face: `embeddings`, `encoder.layers`, `layernorm_before`, ...
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from permafrost.model.errors import WeightsError
from permafrost.model.weights.tensor_map import Entry, Tensors, joined

_MAX_LISTED = 6
_MAX_NAMED = 12
# Where the weights lie in a checkpoint, the first that is there. EsViT keeps student and teacher, and evaluates the
# teacher.
_STATE_KEYS = ("model", "state_dict", "teacher")
# The name that every convention has exactly once: what stands before it is the prefix.
_HUGGING_FACE_ANCHOR = "embeddings.patch_embeddings.projection.weight"
_ANCHORS = ("patch_embed.proj.weight", _HUGGING_FACE_ANCHOR)
# Wrappers around a backbone that are taken off without being asked: none of these words can mean another network.
_KNOWN_WRAPPERS = frozenset(
    ("_orig_mod", "backbone", "body", "bottom_up", "encoder", "model", "module", "swin", "swinv2", "teacher", "student")
)
# Beside the backbone, under its own prefix: mask token and decoder of SimMIM, the projection heads of EsViT (and DINO),
# the norms that the detection code puts on its outputs (a head's, here), Hugging Face's likewise.
_NO_PART_OF_BACKBONE = re.compile(
    r"(mask_token|decoder\.|head_dense\.|head\.mlp\.|head\.last_layer\.|norm[0-3]\."
    r"|embeddings\.mask_token|hidden_states_norms\.|(swin|swinv2)\.layernorm\.)"
)
_HUGGING_FACE = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.attention\.(?:self\.)?(?:query|q_proj)\.", ".attn.query."),
    (r"\.attention\.(?:self\.)?(?:key|k_proj)\.", ".attn.key."),
    (r"\.attention\.(?:self\.)?(?:value|v_proj)\.", ".attn.value."),
    (r"\.continuous_position_bias_mlp\.", ".cpb_mlp."),
    (r"\.attention\.(?:self\.)?(?:relative_position_bias\.)?", ".attn."),
)


@dataclass(frozen=True)
class Reading:
    """A file's tensors under official names, and how they came by them.

    Attributes:
        tensors: parameters and buffers.
        rule: in words, what was done to the names.
        dropped: names in the file of what is no part of the network.
    """

    tensors: Tensors
    rule: str
    dropped: tuple[str, ...]


def choose_state_dict(loaded: Any, *, path: Path, weights_key: str | None) -> tuple[Mapping[str, Tensor], str | None]:
    """Find the weights in what a PyTorch checkpoint holds.

    Args:
        loaded: the checkpoint: a state dict, or a dictionary with one.
        path: the file, for errors.
        weights_key: the entry to take; None takes `model`, `state_dict` or `teacher`, the first that is there.

    Returns:
        The state dict, and the entry it was found under (None: the checkpoint itself).

    Raises:
        WeightsError: if there is none.
    """
    key = weights_key
    if key is None and isinstance(loaded, dict):
        key = next((key for key in _STATE_KEYS if isinstance(loaded.get(key), dict)), None)
    elif key is not None and (not isinstance(loaded, dict) or key not in loaded):
        found = listed(sorted(map(str, loaded))) if isinstance(loaded, dict) else type(loaded).__name__
        raise WeightsError(f"{path} has no entry {key!r}, which weights_key asks for; it holds {found}.")
    state = loaded if key is None else loaded[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        what = (
            f"a dictionary with {listed(sorted(map(str, loaded)))}"
            if isinstance(loaded, dict)
            else type(loaded).__name__
        )
        raise WeightsError(
            f"{path} holds {what}; expected a state dict, or one under the key {', '.join(map(repr, _STATE_KEYS))}. "
            "If it is under another, name that with weights_key."
        )
    return {str(name): tensor for name, tensor in state.items()}, key


def to_official_names(tensors: Tensors, *, path: Path, prefix: str | None) -> Reading:
    """Give tensors their official names.

    Args:
        tensors: all of the file.
        path: the file, for errors.
        prefix: take only names that start with this, without it ("": all). None finds the prefix itself.

    Raises:
        WeightsError: if no name starts with the prefix, or it cannot be told which prefix is meant.
    """
    if any(".attn.w_msa." in name for name in tensors):
        raise WeightsError(
            f"{path} has the names of mmdetection, which also orders the downsampling weights differently; give "
            "the original checkpoint."
        )
    done = []
    found = _find_prefix(tensors, path) if prefix is None else prefix
    entries = {name.removeprefix(found): entry for name, entry in tensors.entries.items() if name.startswith(found)}
    if not entries:
        raise WeightsError(
            f"{path}: no tensor's name starts with {prefix!r}; they start like {listed(sorted(tensors)[:3])}."
        )
    dropped = [name for name in tensors if not name.startswith(found)]
    if found:
        done.append(f"prefix {found!r} taken off")
    if _HUGGING_FACE_ANCHOR in entries:
        convention = "Hugging Face names"
        for name in [name for name in dropped if name.startswith("classifier.")]:
            entries[name] = tensors.entries[name]
            dropped.remove(name)
    elif "layers.3.downsample.reduction.weight" in entries:
        convention = "timm names"
    else:
        convention = "official names"
    # Before they are renamed: `decoder.`, for one, is a prefix of its own.
    beside = [name for name in entries if _NO_PART_OF_BACKBONE.match(name)]
    dropped += [found + name for name in beside]
    entries = {name: entry for name, entry in entries.items() if name not in beside}

    if convention == "Hugging Face names":
        entries = _from_hugging_face(entries, path)
    elif convention == "timm names":
        entries = _renamed(entries, _from_timm, path)
    renamed = _renamed(entries, lambda name: name.replace(".rpe_mlp.", ".cpb_mlp."), path)
    if renamed.keys() != entries.keys():
        done.append("rpe_mlp read as cpb_mlp")
    return Reading(Tensors(renamed), "; ".join([convention, *done]), tuple(sorted(dropped)))


def listed(entries: Iterable[str]) -> str:
    """Return the first few entries, and how many more there are."""
    entries = list(entries)
    more = f", and {len(entries) - _MAX_LISTED} more" if len(entries) > _MAX_LISTED else ""
    return ", ".join(entries[:_MAX_LISTED]) + more


def misfits(
    missing: list[str],
    unexpected: list[str],
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """Return a line for each way in which a file does not fit a network: what is missing, unexpected, of another shape.

    Args:
        missing: names of the network that the file lacks.
        unexpected: names of the file that the network does not know.
        expected: shape of each of the network's tensors.
        found: shape of each of the file's.
    """
    shapes = [
        f"{key} is {found[key]}, expected {expected[key]}"
        for key in sorted(expected.keys() & found.keys())
        if expected[key] != found[key]
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return [f"  {len(entries)} {what}: {listed(entries)}" for what, entries in kinds if entries]


def grouped(names: Iterable[str]) -> list[str]:
    """Return sorted names; where there are many, only what they begin with, and how many begin so."""
    names = sorted(names)
    if len(names) <= _MAX_NAMED:
        return names
    return [f"{start}.* ({count})" for start, count in Counter(name.partition(".")[0] for name in names).items()]


def _find_prefix(names: Iterable[str], path: Path) -> str:
    """Return what stands before the names of the backbone; "" where that cannot be seen, which fails later with its names."""
    prefixes = sorted(
        {
            name.removesuffix(anchor)
            for name in names
            for anchor in _ANCHORS
            if name == anchor or name.endswith("." + anchor)
        }
    )
    if len(prefixes) > 1:
        raise WeightsError(
            f"{path} holds several networks: the prefixes {', '.join(map(repr, prefixes))} all fit. Say which is meant, "
            f"for example with prefix={prefixes[-1]!r}."
        )
    prefix = prefixes[0] if prefixes else ""
    if not _KNOWN_WRAPPERS.issuperset(prefix.split(".")[:-1]):
        raise WeightsError(f"{path}: its names start with {prefix!r}: give prefix={prefix!r} if that is the backbone.")
    return prefix


def _renamed(entries: Mapping[str, Entry], rename: Callable[[str], str], path: Path) -> dict[str, Entry]:
    """Return entries under new names; two names must not become one.

    Raises:
        WeightsError: if they would.
    """
    renamed: dict[str, Entry] = {}
    for name, entry in entries.items():
        official = rename(name)
        if official in renamed:
            raise WeightsError(f"{path} holds {official} twice, under names of two conventions ({name} is one).")
        renamed[official] = entry
    return renamed


def _from_timm(name: str) -> str:
    name = re.sub(r"^head\.fc\.", "head.", name)
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample.", name)


def _from_hugging_face(entries: dict[str, Entry], path: Path) -> dict[str, Entry]:
    """Return entries under official names, with query, key and value joined.

    V2 has biases for query and value alone (official `q_bias`, `v_bias`), V1 for all three (`qkv.bias`).
    """

    def rename(name: str) -> str:
        for pattern, replacement in _HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        return name

    renamed = _renamed(entries, rename, path)
    for query in [name for name in renamed if name.endswith(".attn.query.weight")]:
        attention = query.removesuffix("query.weight")
        parts = [f"{attention}{part}.weight" for part in ("query", "key", "value")]
        missing = [name for name in parts if name not in renamed]
        if missing:
            raise WeightsError(f"{path} has a query without {', '.join(missing)}; the file is damaged or incomplete.")
        renamed[f"{attention}qkv.weight"] = joined([renamed.pop(name) for name in parts])
        biases = [f"{attention}{part}.bias" for part in ("query", "key", "value")]
        if biases[1] in renamed and biases[0] in renamed and biases[2] in renamed:
            renamed[f"{attention}qkv.bias"] = joined([renamed.pop(name) for name in biases])
            continue
        for name, official in ((biases[0], "q_bias"), (biases[2], "v_bias")):
            if name in renamed:
                renamed[attention + official] = renamed.pop(name)
    return renamed
