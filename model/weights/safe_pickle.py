"""Read PyTorch checkpoints without running anything that they contain.

A checkpoint is a pickle, and a pickle may call any function. torch's own `weights_only` reader is tried first; it refuses
files that hold anything but tensors and plain values, such as the configuration objects in training checkpoints. Those
are read a second time with an unpickler that resolves no name: a class it does not know becomes an inert object that
takes and forgets whatever it is given, and a name of Python's standard library that is no plain container ends the
reading. torch still does all the rest (archive, storages, memory mapping), through its documented `pickle_module`.

A plain pickle, as detectron2's model zoo has them (.pkl), goes through the same unpickler. Its numpy arrays are put together
here, from bytes and a number type of a fixed list, and come out as tensors.
"""

from __future__ import annotations

import collections
import math
import pickle
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from permafrost.model.errors import WeightsError

_BUILTIN_VALUES = {
    f"builtins.{kind.__name__}": kind
    for kind in (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, object, set, slice, str, tuple)
}
# Standard-library classes that configurations are made of. They become inert too, but are no reason to refuse a file.
_HARMLESS_MODULES = ("datetime", "decimal", "fractions", "pathlib", "uuid")
_HARMLESS_NAMES = ("argparse.Namespace", "collections.deque", "types.SimpleNamespace")


# What stands at the start of torch's older format, after the opcode of the protocol.
_TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ARRAY_TYPES = frozenset(("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"))


class Inert:
    """Stands for an object whose class is not loaded: it accepts everything that unpickling does, and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return super().__new__(cls)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Take an item, as a list does, and drop it."""

    def extend(self, items: Any) -> None:
        """Take items, as a list does, and drop them."""

    def add(self, item: Any) -> None:
        """Take an item, as a set does, and drop it."""


class _Call:
    """A function that a pickle may call. Made anew for every file: a pickle could otherwise alter the function itself."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class _NumberType:
    """A numpy.dtype as a pickle describes it."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any) -> None:
        self.code = str(code).lstrip("<>=|")
        self.order: Any = "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """A numpy.ndarray as a pickle describes it: shape, number type and bytes."""

    __slots__ = ("_content",)

    def __setstate__(self, state: Any) -> None:
        _, shape, number_type, is_fortran, content = state
        self._content: tuple[Any, Any, Any, Any] = (content, number_type, shape, "F" if is_fortran else "C")

    @classmethod
    def of(cls, content: Any, number_type: Any, shape: Any, order: str) -> _Array:
        """Return an array as numpy writes large arrays from protocol 5 on."""
        array = cls()
        array._content = (content, number_type, shape, order)
        return array

    def tensor(self) -> torch.Tensor:
        """Return the array as a tensor of its own memory.

        Raises:
            ValueError: bytes, shape and type do not fit together.
            _Refused: it is an array of anything but numbers.
        """
        content, number_type, shape, order = self._content
        if not isinstance(number_type, _NumberType) or number_type.code not in _ARRAY_TYPES:
            raise _Refused("an array of objects")
        values = np.frombuffer(content, dtype=np.dtype(number_type.code).newbyteorder(number_type.order))
        if values.size != math.prod(shape):
            raise ValueError(f"an array of shape {shape} has {values.size} numbers")
        values = values.reshape(shape, order=order)
        return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))


class _Refused(Exception):
    """A pickle names something that no weights file needs."""


def read_pickle(path: Path) -> tuple[Any, tuple[str, ...]]:
    """Read a PyTorch checkpoint, of the zip or the older format, or a plain pickle with numpy arrays.

    Args:
        path: the file. Tensors of the zip format are memory-mapped.

    Returns:
        What it holds, and the names of the classes whose objects were left inert.

    Raises:
        WeightsError: if it is damaged or names a function of the standard library, `os.system` for example.
    """
    if _is_plain_pickle(path):
        return _load_plain(path)
    mmap = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            # Of newer pickle protocols, which the second reading understands.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap), ()
    except pickle.UnpicklingError:
        # torch has found a pickle in a container it knows (it raises others for TorchScript and tar archives), and
        # something in the pickle that it refuses or cannot read.
        pass
    except Exception as error:  # torch raises half a dozen types for a file it cannot read.
        raise _damaged(path, error) from error

    inert: set[str] = set()
    try:
        loaded = torch.load(
            path, map_location="cpu", weights_only=False, pickle_module=_restricted_pickle(inert), mmap=mmap
        )
    except _Refused as error:
        raise _refused(path, error) from error
    except Exception as error:
        raise _damaged(path, error) from error
    return loaded, tuple(sorted(inert))


def _is_plain_pickle(path: Path) -> bool:
    """Return whether a file is a pickle of protocol 2 or above that torch did not write."""
    with path.open("rb") as file:
        start = file.read(32)
    return start[:1] == b"\x80" and _TORCH_MAGIC not in start


def _load_plain(path: Path) -> tuple[Any, tuple[str, ...]]:
    """Read a file that is a plain pickle, and return what `read_pickle` does."""
    inert: set[str] = set()
    try:
        with path.open("rb") as file:
            loaded = _restricted_pickle(inert).load(file)
        return _with_tensors(loaded), tuple(sorted(inert))
    except _Refused as error:
        raise _refused(path, error) from error
    except Exception as error:
        raise _damaged(path, error) from error


def _with_tensors(content: Any) -> Any:
    """Return the same dictionaries, lists and tuples, their arrays as tensors. A container within itself ends in a RecursionError."""
    if isinstance(content, _Array):
        return content.tensor()
    if isinstance(content, dict):
        return {key: _with_tensors(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_with_tensors(value) for value in content)
    return content


def _restricted_pickle(inert: set[str]) -> Any:
    """Return what `torch.load` wants of a `pickle_module`; names of classes that are not loaded are added to `inert`."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            # Up to protocol 2 names are those of Python 2.
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            return _resolve(f"{module}.{name}", inert)

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return SimpleNamespace(__name__=__name__, Unpickler=Unpickler, load=load)


def _resolve(name: str, inert: set[str]) -> Any:
    """Return what stands for a global name in a pickle; nothing is imported, whatever the name.

    Raises:
        _Refused: if it belongs to the standard library and is no plain container or value.
    """
    functions: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
        "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
        "_codecs.encode": _encode,
        "copyreg._reconstructor": Inert,
        "collections.defaultdict": lambda *_: {},
        "collections.Counter": dict,
        "numpy.dtype": lambda code, *_: _NumberType(code),
        # What `_reconstruct` is called with; its arguments say nothing, the state that follows says all.
        "numpy.ndarray": lambda *_: Inert(),
        **{f"numpy.{core}.multiarray._reconstruct": lambda *_: _Array() for core in ("core", "_core")},
        **{f"numpy.{core}.numeric._frombuffer": _Array.of for core in ("core", "_core")},
    }
    if name in functions:
        return _Call(functions[name])
    values = {
        "collections.OrderedDict": collections.OrderedDict,
        "torch.Size": torch.Size,
        "torch.device": torch.device,
        **_BUILTIN_VALUES,
    }
    if name in values:
        return values[name]
    root, _, rest = name.partition(".")
    if root == "torch" and isinstance(vars(torch).get(rest), torch.dtype):
        return vars(torch)[rest]
    harmless = name in _HARMLESS_NAMES or root in _HARMLESS_MODULES
    if (root in sys.stdlib_module_names or root == "nt") and not harmless:
        raise _Refused(name)
    inert.add(name)
    return type("Inert", (Inert,), {"__slots__": ()})


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Return bytes from the text that protocol 2 writes for them; other encodings would import a module of their name."""
    if encoding not in ("latin1", "latin-1"):
        raise _Refused(f"_codecs.encode with {encoding!r}")
    return text.encode("latin1")


def _refused(path: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"{path} holds more than tensors: reading it would execute {error}, which is refused. Weights never need "
        "that: find out where the file comes from before you open it with another program."
    )


def _damaged(path: Path, error: Exception) -> WeightsError:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return WeightsError(f"{path} is a damaged PyTorch checkpoint ({reason}); download or copy it again.")
