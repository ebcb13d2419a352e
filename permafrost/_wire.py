"""Write values as bytes and read them back without running anything: what the processes of one training tell each other.

A pickle is a program; whoever reaches a port of the process group could hand one in. Here only values travel: what JSON knows,
besides bytes, tuples, sets, paths, tensors and arrays; dataclasses, field by field, of permafrost or of a module that is imported
already; and the exceptions that say what a user can mend. The rest is MessagePack's.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

TUPLE, SET, PATH, TENSOR, ARRAY, OBJECT, ERROR, INTEGER = range(1, 9)
"""MessagePack's types of our own."""
NO_VALUE = "another process sent what is no value"
FLOATS_AND_INTEGERS = "biufc"
"""Kinds of NumPy arrays that are plain numbers."""


def to_bytes(value: Any) -> bytes:
    """Return a value as bytes.

    Raises:
        TypeError: it holds something that does not travel, named by its type.
    """
    # Here and below, since one process by itself does without it.
    import msgpack

    return msgpack.packb(value, default=_pack, strict_types=True)


def from_bytes(content: bytes) -> Any:
    """Return the value that `to_bytes` wrote. Tensors are on the CPU.

    Raises:
        ValueError: the bytes are not such a value, or name a class that is none of those that travel.
    """
    import msgpack

    try:
        return msgpack.unpackb(content, ext_hook=_unpack, strict_map_key=False)
    except Exception as error:
        # Whatever is wrong with them, it is the sender's doing.
        if str(error).startswith(NO_VALUE):
            raise
        raise ValueError(f"{NO_VALUE}: {type(error).__name__}: {error}") from error


def broadcast(value: Any, *, source: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """Return the value of one rank on every rank of a group. Collective, over bytes.

    Args:
        value: what the source has to say; passed over elsewhere.
        source: its rank in the whole world.
        group: a gloo group; None is the default one.
    """
    is_source = dist.get_rank() == source
    content = to_bytes(value) if is_source else b""
    length = torch.tensor([len(content)], dtype=torch.int64)
    dist.broadcast(length, src=source, group=group)
    buffer = _as_tensor(content) if is_source else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(buffer, src=source, group=group)
    return value if is_source else from_bytes(buffer.numpy().tobytes())


def all_gather(value: Any, *, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's value, in rank order, on every rank of a gloo group. Collective, over bytes."""
    own, lengths = _padded(value, group)
    rows = [torch.empty_like(own) for _ in lengths]
    dist.all_gather(rows, own, group=group)
    return _read(rows, lengths)


def gather(value: Any, *, target: int = 0, group: dist.ProcessGroup | None = None) -> list[Any] | None:
    """Return every rank's value, in rank order, on one rank of a gloo group; None elsewhere. Collective, over bytes."""
    own, lengths = _padded(value, group)
    rows = [torch.empty_like(own) for _ in lengths] if dist.get_rank() == target else None
    dist.gather(own, rows, dst=target, group=group)
    return None if rows is None else _read(rows, lengths)


def _padded(value: Any, group: dist.ProcessGroup | None) -> tuple[Tensor, list[int]]:
    """Return this rank's bytes, as many as the most that any rank has, and how many each has."""
    content = to_bytes(value)
    length = torch.tensor([len(content)], dtype=torch.int64)
    everyone = [torch.empty_like(length) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, length, group=group)
    lengths = [int(one) for one in everyone]
    own = torch.zeros(max(lengths), dtype=torch.uint8)
    own[: len(content)] = _as_tensor(content)
    return own, lengths


def _read(rows: list[Tensor], lengths: list[int]) -> list[Any]:
    return [from_bytes(row[:length].numpy().tobytes()) for row, length in zip(rows, lengths, strict=True)]


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _pack(value: Any) -> Any:
    if type(value) is tuple or isinstance(value, torch.Size):
        return _ext(TUPLE, list(value))
    if isinstance(value, (set, frozenset)):
        return _ext(SET, list(value))
    if isinstance(value, Path):
        return _ext(PATH, str(value))
    if isinstance(value, Tensor):
        own = value.detach().cpu().contiguous()
        flat = own.view(-1).view(torch.uint8) if own.numel() else own.new_zeros(0, dtype=torch.uint8)
        return _ext(TENSOR, [str(own.dtype).removeprefix("torch."), list(own.shape), flat.numpy().tobytes()])
    if isinstance(value, np.generic):
        return _ext(ARRAY, [value.dtype.str, None, value.tobytes()])
    if isinstance(value, np.ndarray) and value.dtype.kind in FLOATS_AND_INTEGERS:
        return _ext(ARRAY, [value.dtype.str, list(value.shape), value.tobytes()])
    if type(value) is int:
        return _ext(INTEGER, str(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _ext(OBJECT, [_name(type(value)), {field.name: getattr(value, field.name) for field in _fields(value)}])
    if isinstance(value, Exception):
        return _ext(ERROR, [_name(type(value)), list(value.args)])
    plain: type[Any]
    for plain in (dict, list, str, int, float):
        # Counters, enumerations and the like arrive as what they are kinds of.
        if isinstance(value, plain):
            return plain(value)
    raise TypeError(
        f"a {type(value).__name__} does not travel between processes: make plain values, arrays or tensors of it"
    )


def _ext(code: int, content: Any) -> Any:
    import msgpack

    return msgpack.ExtType(code, to_bytes(content))


def _unpack(code: int, data: bytes) -> Any:
    content = from_bytes(data)
    if code == TUPLE:
        return tuple(content)
    if code == SET:
        return set(content)
    if code == PATH:
        return Path(content)
    if code == INTEGER:
        return int(content)
    if code == TENSOR:
        name, shape, raw = content
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"a tensor of {name}")
        flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.zeros(0, dtype=dtype)
        return flat.view(shape)
    if code == ARRAY:
        kind, shape, raw = content
        dtype = np.dtype(kind)
        if dtype.kind not in FLOATS_AND_INTEGERS:
            raise TypeError(f"an array of {kind}")
        array = np.frombuffer(bytearray(raw), dtype=dtype)
        return array[0] if shape is None else array.reshape(shape)
    if code == OBJECT:
        cls = _class(content[0])
        if not dataclasses.is_dataclass(cls):
            raise TypeError(f"{content[0]} is not a dataclass")
        made = object.__new__(cls)
        for field in _fields(cls):
            # Past a frozen class's own refusal, and without __post_init__: the sender's has checked the values.
            object.__setattr__(made, field.name, content[1][field.name])
        return made
    if code == ERROR:
        cls = _class(content[0])
        if not issubclass(cls, Exception) or cls.__module__.partition(".")[0] not in ("permafrost", "builtins"):
            raise TypeError(f"{content[0]} is not an error of permafrost's")
        error = cls.__new__(cls, *content[1])
        error.args = tuple(content[1])
        return error
    raise TypeError(f"type {code} is not known")


def _fields(what: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(what)


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _class(name: str) -> type:
    """Return the class of that name; a module is imported only if it is permafrost's own."""
    module, _, qualname = name.partition(":")
    if module not in sys.modules and module.startswith("permafrost."):
        importlib.import_module(module)
    found: Any = sys.modules[module]
    for part in qualname.split("."):
        found = getattr(found, part)
    if not isinstance(found, type):
        raise TypeError(f"{name} is not a class")
    return found
