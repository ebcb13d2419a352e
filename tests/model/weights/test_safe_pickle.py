"""Checkpoints with more than tensors in them: objects are left inert, and nothing in a file is ever executed."""

from __future__ import annotations

import argparse
import builtins
import collections
import copy
import datetime
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from permafrost.model import WeightsError, load_backbone
from permafrost.model.weights.read import read_weights
from permafrost.model.weights.safe_pickle import read_pickle


@pytest.fixture
def foreign_class(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type]:
    """Makes a class of a package that is importable while a file is written, and gone when it is read."""
    modules = []

    def make(module: str, name: str, *bases: type, **content: Any) -> type:
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            package = ".".join(parts[:end])
            if package not in sys.modules:
                modules.append(package)
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        made = type(name, bases, {"__module__": module, **content})
        setattr(sys.modules[module], name, made)
        return made

    make.forget = lambda: [sys.modules.pop(module, None) for module in modules]
    return make


def state() -> dict[str, Tensor]:
    """A small state dict in which two tensors share their storage."""
    weight = torch.arange(12.0).reshape(3, 4)
    return {"a.weight": weight, "a.view": weight[1:, ::2], "a.bias": torch.ones(3, dtype=torch.bfloat16)}


def check_state(loaded: dict[str, Tensor]) -> None:
    for name, tensor in state().items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].dtype == tensor.dtype


def save(content: Any, path: Path, container: str) -> Path:
    options = {
        "zip": {},
        "legacy": {"_use_new_zipfile_serialization": False},
        "protocol 4": {"pickle_protocol": 4},
    }[container]
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("container", ["zip", "legacy", "protocol 4"])
def test_training_checkpoints_are_read_without_their_classes(tmp_path, foreign_class, container: str) -> None:
    node = foreign_class("yacs.config", "CfgNode", dict)
    # As yacs: a dictionary with attributes of its own.
    config = node(MODEL=node(TYPE="swinv2", DEPTHS=[2, 2, 18, 2]))
    config.__dict__["__immutable__"] = True
    # As mmengine: reduced to a call of the class.
    config_dict = foreign_class(
        "mmengine.config", "ConfigDict", dict, __reduce_ex__=lambda self, protocol: (type(self), (dict(self),))
    )
    history = foreign_class("mmengine.logging", "HistoryBuffer")()
    history.values = np.arange(4.0)
    items = foreign_class("other", "Items", list)([1, 2, 3])
    content = {
        "model": state(),
        "config": config,
        "args": argparse.Namespace(lr=0.1, folder=Path("/data"), started=datetime.datetime(2024, 1, 1)),
        "meta": {"cfg": config_dict(a=1), "history": history, "items": items, "score": np.float64(0.5)},
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": [1, 2.5, None, True, "text", b"bytes", {1, 2}, (3,), 10**20, collections.defaultdict(list, a=[1])],
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
        "ordered": collections.OrderedDict(a=1),
    }
    path = save(content, tmp_path / "training.pth", container)
    foreign_class.forget()
    loaded, inert = read_pickle(path)
    check_state(loaded["model"])
    assert (
        loaded["model"]["a.view"].untyped_storage().data_ptr()
        == loaded["model"]["a.weight"].untyped_storage().data_ptr()
    )
    assert loaded["plain"] == content["plain"]
    assert torch.equal(loaded["parameter"], torch.ones(2))
    assert (loaded["dtype"], loaded["size"], loaded["ordered"]) == (torch.float16, torch.Size([2, 3]), {"a": 1})
    assert {"yacs.config.CfgNode", "argparse.Namespace", "mmengine.config.ConfigDict"} <= set(inert)
    assert {"mmengine.logging.HistoryBuffer", "other.Items", "datetime.datetime"} <= set(inert)
    assert "yacs" not in sys.modules
    assert not vars(type(loaded["config"])).get("__dict__")
    assert repr(type(loaded["config"])).endswith("Inert'>")


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_backbone_of_a_training_checkpoint(tmp_path, official_file, foreign_class, container: str) -> None:
    path = official_file()
    expected = load_backbone("swinv2_nano", weights=path).fingerprint
    config = foreign_class("yacs.config", "CfgNode", dict)(TAG="default")
    content = {"model": torch.load(path)["model"], "optimizer": {"state": {}}, "epoch": 3, "config": config}
    save(content, path, container)
    foreign_class.forget()
    backbone = load_backbone("swinv2_nano", weights=path)
    assert backbone.fingerprint == expected
    assert "not loaded: objects of yacs.config.CfgNode" in backbone.describe()["names"]


class Payload:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


def payloads(marker: Path) -> dict[str, tuple[Payload, str]]:
    """Ways to make a file when a checkpoint is read, and the name each is refused by."""
    code = f"open({str(marker)!r}, 'w').close()"
    command = f"touch {marker}"
    return {
        "os.system": (Payload(os.system, command), "posix.system"),
        "eval": (Payload(eval, code), "builtins.eval"),
        "exec": (Payload(exec, code), "builtins.exec"),
        "subprocess": (Payload(subprocess.check_call, ["touch", str(marker)]), "subprocess.check_call"),
        "open": (Payload(open, str(marker), "w"), "_io.open|io.open"),
        "getattr": (Payload(getattr, os, "system"), "builtins.getattr"),
        "breakpoint": (Payload(builtins.__import__, "antigravity"), "builtins.__import__"),
        "codec": (
            Payload(__import__("_codecs").encode, code, "unicode_escape"),
            "_codecs.encode with 'unicode_escape'",
        ),
    }


@pytest.mark.parametrize("container", ["zip", "legacy", "protocol 4"])
@pytest.mark.parametrize("kind", sorted(payloads(Path("unused"))))
def test_payloads_are_refused_by_name(tmp_path, kind: str, container: str) -> None:
    marker = tmp_path / "executed"
    payload, name = payloads(marker)[kind]
    if kind == "getattr":
        payload = Payload(getattr, "text", "upper")
    # torch itself refuses the object before the payload, so that ours is what meets it.
    content = {"model": state(), "config": [argparse.Namespace(), payload]}
    path = save(content, tmp_path / "bad.pth", container)
    with pytest.raises(WeightsError, match=rf"would execute ({name}), which is refused"):
        read_weights(path)
    assert not marker.exists()
    if kind in ("os.system", "eval", "exec", "subprocess"):
        torch.load(path, weights_only=False)
        assert marker.exists(), "the payload works where it is not refused"


def test_functions_of_packages_are_never_called(tmp_path) -> None:
    """A name outside the standard library resolves to nothing, not even where it is a function that is installed."""
    marker = tmp_path / "executed"
    inner = io.BytesIO()
    torch.save(Payload(os.system, f"touch {marker}"), inner)
    content = {
        "model": state(),
        "nested": Payload(torch.storage._load_from_bytes, inner.getvalue()),
        "hub": Payload(torch.hub.load, str(tmp_path), "model"),
        "numpy": Payload(np.save, str(marker), np.zeros(1)),
    }
    torch.save(content, tmp_path / "bad.pth")
    loaded, inert = read_pickle(tmp_path / "bad.pth")
    check_state(loaded["model"])
    assert {"torch.storage._load_from_bytes", "torch.hub.load", "numpy.save"} <= set(inert)
    assert not list(tmp_path.glob("executed*"))


def test_a_pickle_cannot_alter_what_it_calls(tmp_path) -> None:
    """BUILD sets attributes of whatever lies on the stack: functions included, were they the real ones."""
    rebuild = torch._utils._rebuild_tensor_v2
    before = (rebuild.__defaults__, copy.copy(rebuild.__dict__))
    pickled = (
        b"\x80\x02}(X\x05\x00\x00\x00model}X\x04\x00\x00\x00evilctorch._utils\n_rebuild_tensor_v2\n"
        b"N}X\x0c\x00\x00\x00__defaults__K\x07\x85s\x86bu."
    )
    assert pickle.loads(pickled)["evil"] is rebuild
    try:
        assert rebuild.__defaults__ == (7,)
    finally:
        rebuild.__defaults__ = before[0]
    path = tmp_path / "bad.pth"
    torch.save({"model": state(), "args": argparse.Namespace()}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "worse.pth", "w") as new:
        for entry in old.infolist():
            new.writestr(entry, pickled if entry.filename.endswith("data.pkl") else old.read(entry))
    with pytest.raises(WeightsError, match="damaged"):
        read_pickle(tmp_path / "worse.pth")
    assert (rebuild.__defaults__, rebuild.__dict__) == before


@pytest.mark.filterwarnings("ignore")
def test_other_archives_are_not_opened(tmp_path) -> None:
    script = torch.jit.script(torch.nn.Linear(1, 1))
    script.save(str(tmp_path / "script.pth"))
    with tarfile.open(tmp_path / "tar.pth", "w") as archive:
        (tmp_path / "\x80pickle").write_bytes(pickle.dumps({}))
        archive.add(tmp_path / "\x80pickle", arcname="\udc80pickle")
    for name in ("script.pth", "tar.pth"):
        with pytest.raises(WeightsError, match=r"damaged|neither"):
            read_weights(tmp_path / name)


def test_state_dict_of_inert_objects_is_no_state_dict(tmp_path, foreign_class) -> None:
    odd = foreign_class("odd", "Quantised")()
    torch.save({"model": {"a": odd}}, tmp_path / "odd.pth")
    foreign_class.forget()
    with pytest.raises(WeightsError, match="expected a state dict"):
        read_weights(tmp_path / "odd.pth")


def test_reading_changes_no_global_state(tmp_path) -> None:
    torch.save({"model": state(), "args": argparse.Namespace(a=1)}, tmp_path / "training.pth")
    before = torch.serialization.get_safe_globals()
    read_pickle(tmp_path / "training.pth")
    assert torch.serialization.get_safe_globals() == before
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(tmp_path / "training.pth", weights_only=True)
    json.dumps(read_pickle(tmp_path / "training.pth")[1])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_plain_pickle_of_arrays_is_read(tmp_path, protocol) -> None:
    """detectron2's .pkl: numpy arrays of several types and orders, text and numbers beside them."""
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "transposed": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "none": np.zeros((0, 3), dtype=np.float16),
        "foreign": np.array([5, 6], dtype=">i4"),
        "large": np.ones((600, 600), dtype=np.float32),
    }
    content = {"model": arrays, "__author__": "x", "matching_heuristics": True, "score": np.float32(0.5)}
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    loaded, inert = read_pickle(path)
    assert inert in [("numpy._core.multiarray.scalar",), ("numpy.core.multiarray.scalar",)]
    assert loaded["__author__"] == "x"
    for name, array in arrays.items():
        assert np.array_equal(loaded["model"][name].numpy(), array), name
    # Its memory is its own: it may be written to.
    loaded["model"]["a"].add_(1)


def test_arrays_of_anything_but_numbers_and_calls_are_refused(tmp_path) -> None:
    class Attack:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'done'}",)

    path = tmp_path / "model.pkl"
    for content in ({"a": np.array([Attack()], dtype=object)}, {"a": Attack()}, {"a": np.array(["text"])}):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(WeightsError, match="refused"):
            read_pickle(path)
    assert not (tmp_path / "done").exists()
    # Bytes that do not fit the shape, and half a file.
    whole = pickle.dumps({"a": np.arange(6, dtype=np.float32)}, protocol=2)
    for bad in (whole.replace(b"K\x06\x85", b"K\x07\x85"), whole[:-10]):
        assert bad != whole
        path.write_bytes(bad)
        with pytest.raises(WeightsError, match="damaged"):
            read_pickle(path)
