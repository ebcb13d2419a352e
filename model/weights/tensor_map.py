"""Read named tensors when they are asked for: a giant's weights never lie in memory twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """A tensor that can be read.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        read: reads it; from a memory-mapped file that costs no memory of its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Tensors(Mapping[str, Tensor]):
    """Named tensors, read on demand and not kept; names, shapes and dtypes are known without reading.

    Args:
        entries: the tensors by name.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Tensors:
        """Wrap tensors that are at hand already; a Tensors is returned as it is."""
        if isinstance(tensors, Tensors):
            return tensors
        return cls({name: _at_hand(tensor) for name, tensor in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def select(self, names: Iterable[str]) -> Tensors:
        """Return some of the tensors."""
        return Tensors({name: self.entries[name] for name in names})


def joined(entries: list[Entry]) -> Entry:
    """Join several entries along their first dimension, as one."""
    shape = (sum(entry.shape[0] for entry in entries), *entries[0].shape[1:])
    return Entry(shape, entries[0].dtype, lambda: torch.cat([entry.read() for entry in entries]))


def materialise(
    tensors: Iterable[tuple[str, Tensor]], keep: Callable[[str, Tensor], Tensor]
) -> tuple[dict[str, Tensor], str]:
    """Read every tensor once, hash it, and keep what is made of it.

    Args:
        tensors: names and tensors, in the order of the names.
        keep: makes of a name and its tensor what is to stay; it must copy, for the tensor may be a view into a file.

    Returns:
        What was kept, and the fingerprint of the tensors as they were read.
    """
    digest = hashlib.sha256()
    kept = {}
    for name, tensor in tensors:
        add_to_fingerprint(digest, name, tensor)
        kept[name] = keep(name, tensor)
    return kept, digest.hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors by name, dtype, shape and bytes; their order and device do not matter.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        add_to_fingerprint(digest, name, tensors[name])
    return digest.hexdigest()


def add_to_fingerprint(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Add one tensor; they are added in the order of their sorted names."""
    tensor = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite; unlike torch.isfinite(...).all() without copies of the tensor's size."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _at_hand(tensor: Tensor) -> Entry:
    return Entry(tuple(tensor.shape), tensor.dtype, tensor.detach)
