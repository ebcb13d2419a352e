"""Values cross from one process to another and back; a program does not."""

from __future__ import annotations

import dataclasses
import math
import pickle
import signal
from collections import Counter
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

from permafrost._wire import from_bytes, to_bytes
from permafrost.configs.paper import table5_giant_htc
from permafrost.data import DataError, ReplacementTracker, SampleKey
from permafrost.launcher.errors import USER_ERRORS


@dataclasses.dataclass(frozen=True)
class Own:
    """A user's class of a module that is imported."""

    number: int
    inner: tuple[float, ...] = ()


VALUES = [
    None, True, 0, -5, 2**63, -(2**200), 1.5, math.inf, -0.0, 5e-324, "", "äöü\n\0", b"\x00\xff", [], [1, [2.5, "x"]],
    (), (1, (2, [3])), {}, {"a": [1], 2: (3,), (4, 5): {"b": None}}, {1, 2}, {(1, 2)}, Path("a/b"),
    Own(3, (1.0, 2.0)), SampleKey(1, 2, 3), table5_giant_htc(),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_are_the_same_on_the_other_side(value: object) -> None:
    found = from_bytes(to_bytes(value))
    assert found == value
    assert type(found) is type(value)
    assert repr(found) == repr(value)


def test_kinds_of_plain_values_arrive_plain() -> None:
    found = from_bytes(to_bytes([Counter("aab"), signal.SIGTERM, True]))
    assert found == [{"a": 2, "b": 1}, 15, True]
    assert [type(one) for one in found] == [dict, int, bool]


def test_not_a_number_stays_one() -> None:
    assert math.isnan(from_bytes(to_bytes({"x": math.nan}))["x"])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    found = from_bytes(to_bytes(tensor))
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert torch.equal(found, tensor)
    found.fill_(1)  # it is the receiver's own
    turned = torch.arange(6).view(2, 3).T
    assert torch.equal(from_bytes(to_bytes(turned)), turned)


def test_arrays_and_numpys_numbers() -> None:
    for array in (
        np.arange(6.0).reshape(2, 3),
        np.zeros((0, 2), np.int16),
        np.array(5, np.uint8),
        np.array([True, False]),
    ):
        found = from_bytes(to_bytes({"x": array}))["x"]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert (found == array).all()
    number = from_bytes(to_bytes(np.float32(0.1)))
    assert (type(number), number) == (np.float32, np.float32(0.1))


@pytest.mark.parametrize("kind", USER_ERRORS)
def test_errors_arrive_as_what_they_were(kind: type[Exception]) -> None:
    found = from_bytes(to_bytes(kind("the file x is missing")))
    assert type(found) is kind
    assert str(found) == "the file x is missing"


def test_what_does_not_travel_is_named() -> None:
    for value in (object(), lambda: 1, np.array([object()]), ReplacementTracker(10, 0.1)):
        with pytest.raises(TypeError, match=f"a {type(value).__name__} does not travel between processes"):
            to_bytes(value)


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("payload_ran"),))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Payload()),
        b"",
        b"\xc1",
        msgpack.packb(msgpack.ExtType(7, msgpack.packb(["os:system", ["touch payload_ran"]]))),
        msgpack.packb(msgpack.ExtType(7, msgpack.packb(["subprocess:CalledProcessError", [1, "x"]]))),
        msgpack.packb(msgpack.ExtType(6, msgpack.packb(["subprocess:Popen", {"args": ["touch", "payload_ran"]}]))),
        msgpack.packb(msgpack.ExtType(6, msgpack.packb(["antigravity:fly", {}]))),
        msgpack.packb(msgpack.ExtType(6, msgpack.packb(["permafrost.nowhere:X", {}]))),
        msgpack.packb(msgpack.ExtType(6, msgpack.packb(["permafrost.data.types:SampleKey", {}]))),
        msgpack.packb(msgpack.ExtType(5, msgpack.packb(["|O", [1], b"12345678"]))),
        msgpack.packb(msgpack.ExtType(4, msgpack.packb(["load", [1], b"1234"]))),
        msgpack.packb(msgpack.ExtType(4, msgpack.packb(["float32", [5], b"1234"]))),
        msgpack.packb(msgpack.ExtType(99, msgpack.packb(1))),
        to_bytes([1, 2])[:-1],
        to_bytes([1, 2]) + b"\x00",
    ],
)
def test_a_strangers_bytes_run_nothing(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="another process sent what is no value"):
        from_bytes(content)
    assert not list(tmp_path.iterdir())


def test_data_error_is_among_them() -> None:
    assert DataError in USER_ERRORS
