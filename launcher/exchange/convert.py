"""Convert weights of any known format into our own: official names, shards of safetensors, a header and a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from permafrost.model.errors import WeightsError
from permafrost.model.spec import per_stage
from permafrost.model.swin.load import resident_dtype
from permafrost.model.weights.architecture import Architecture, infer_architecture
from permafrost.model.weights.formats import grouped
from permafrost.model.weights.header import encode_header
from permafrost.model.weights.read import WeightFile, is_backbone, read_weights
from permafrost.model.weights.shards import save_sharded
from permafrost.model.weights.windows import Windows


def convert(
    weights: str,
    folder: str,
    *,
    dtype: str | None = None,
    max_shard_bytes: int,
    prefix: str | None = None,
    weights_key: str | None = None,
    window_size: tuple[int, ...] | None = None,
    pretrained_window_size: tuple[int, ...] | None = None,
) -> None:
    """Read weights, say what they are, and write them as a sharded checkpoint.

    Args:
        weights: as `permafrost.model.weights.read.read_weights` takes it.
        folder: the new folder.
        dtype: name of the dtype in the files; None leaves each tensor's. What position biases are computed from stays
            at least in float32, as it does when a backbone is loaded in that dtype.
        max_shard_bytes: most bytes of tensors in a shard.
        prefix: as in `read_weights`.
        weights_key: as in `read_weights`.
        window_size: the window of each stage in training (one number: of all), where the file does not say.
        pretrained_window_size: what scales the coordinates, likewise.

    Raises:
        WeightsError: if the weights cannot be read, are no Swin, are not finite, or the folder cannot be written.
    """
    file = read_weights(weights, prefix=prefix, weights_key=weights_key)
    file.check_shards()
    architecture = infer_architecture(file.tensors.shapes, source=file.source)
    windows = _complete(file, window_size, pretrained_window_size)
    for line in _report(file, architecture, windows):
        print(line, flush=True)

    header: dict[str, Any] = {key: value for key, value in file.metadata.items() if key != "format"}
    header |= {"name": header.get("name", architecture.name), "extra_norm_interval": architecture.extra_norm_interval}
    header |= {"num_classes": architecture.num_classes, "converted_from": Path(file.source).name}
    header |= {"window_size": windows.window_size, "pretrained_window_size": windows.pretrained_window_size}
    kind = None if dtype is None else getattr(torch, dtype)
    index = save_sharded(
        file.tensors,
        folder,
        header=encode_header({key: value for key, value in header.items() if value is not None}),
        architecture=architecture.describe() | {"window_size": windows.window_size, "rule": file.rule},
        in_fingerprint=is_backbone,
        dtype=lambda name: None if kind is None else resident_dtype(name, kind),
        max_shard_bytes=max_shard_bytes,
    )
    files = sorted(index.parent.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(f"wrote         {len(files)} shard(s), {size:,} bytes, to {index.parent}")
    if architecture.name:
        print(f"use it with   --backbone.name {architecture.name} --backbone.weights {index.parent}")


def _complete(
    file: WeightFile, window_size: tuple[int, ...] | None, pretrained_window_size: tuple[int, ...] | None
) -> Windows:
    """Return the windows that the file states, and those that were given where it does not.

    Raises:
        WeightsError: if both are there and differ.
    """

    def one(given: tuple[int, ...] | None, stated: tuple[int, ...] | None, field: str) -> tuple[int, ...] | None:
        if given is None:
            return stated
        given = per_stage(given[0] if len(given) == 1 else given, field=field)
        if stated is not None and given != stated:
            raise WeightsError(f"{file.source} says {field}={stated}, not {given}: leave it out.")
        return given

    stated = file.windows
    return Windows(
        one(window_size, stated.window_size, "window_size"),
        one(pretrained_window_size, stated.pretrained_window_size, "pretrained_window_size"),
    )


def _report(file: WeightFile, architecture: Architecture, windows: Windows) -> list[str]:
    entries = file.tensors.entries.values()
    size = sum(torch.Size(entry.shape).numel() * entry.dtype.itemsize for entry in entries)
    dtypes = ", ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in entries}))
    interval = architecture.extra_norm_interval
    unknown = "not stated; whoever loads the result has to say it"
    lines = [
        f"source        {file.source}: {len(entries)} tensors, {size:,} bytes, {dtypes}",
        f"names         {file.rule}",
        f"architecture  Swin V{architecture.version}, {architecture.name or 'of no known size'}: "
        f"width {architecture.embed_dim}, depths {architecture.depths}, heads {architecture.num_heads}",
        f"extra norms   {f'every {interval} blocks' if interval else 'none'}",
        f"windows       {windows.window_size or unknown}",
    ]
    if architecture.version == 2:
        lines.append(f"pretrained    {windows.pretrained_window_size or unknown}")
    if architecture.num_classes is not None:
        lines.append(f"classifier    {architecture.num_classes} classes")
    if file.dropped:
        lines.append(f"dropped       {', '.join(grouped(file.dropped))}")
    return lines
