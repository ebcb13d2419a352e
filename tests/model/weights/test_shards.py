"""Sharded safetensors: what is written is read back, what is damaged is named before anything is built, and a large
network is loaded without a second copy of its weights."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from permafrost.model import WeightsError, load_backbone
from permafrost.model.swin import load as load_swin
from permafrost.model.swin.v2 import SwinV2, SwinV2Classifier
from permafrost.model.swin.weights import save_weights
from permafrost.model.weights.read import is_backbone, read_weights
from permafrost.model.weights.shards import INDEX_NAME, MANIFEST_NAME, save_sharded

HEADER = {
    "name": "swinv2_nano",
    "window_size": "[6, 6, 6, 6]",
    "pretrained_window_size": "[6, 6, 6, 3]",
    "extra_norm_interval": "0",
    "mean": "[0.5, 0.4, 0.3]",
}


@pytest.fixture
def folder(tmp_path: Path, randomise: Callable) -> Path:
    """A nano classifier in shards of 2 MB."""
    state = randomise(SwinV2Classifier("swinv2_nano", num_classes=5)).state_dict()
    save_sharded(
        state,
        tmp_path / "nano",
        header=HEADER,
        architecture={"name": "swinv2_nano"},
        in_fingerprint=is_backbone,
        max_shard_bytes=2_000_000,
    )
    return tmp_path / "nano"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def change_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_round_trip(folder: Path, randomise) -> None:
    state = randomise(SwinV2Classifier("swinv2_nano", num_classes=5)).state_dict()
    names = [path.name for path in shards(folder)]
    assert len(names) >= 5
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert not list(folder.parent.glob("*.partial"))
    for given in (folder, folder / INDEX_NAME):
        checkpoint = read_weights(given)
        assert checkpoint.windows.window_size == (6, 6, 6, 6)
        assert checkpoint.windows.pretrained_window_size == (6, 6, 6, 3)
        assert checkpoint.metadata["mean"] == (0.5, 0.4, 0.3)
        assert set(checkpoint.tensors) == set(state)
        assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in state.items())
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert manifest["fingerprint"] == load_backbone("swinv2_nano", weights=folder).fingerprint
    assert manifest["architecture"] == {"name": "swinv2_nano"}
    for path in shards(folder):
        content = path.read_bytes()
        expected = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert manifest["shards"][path.name] == expected
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= 2_000_000


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, randomise) -> None:
    before = os.umask(0o027)
    try:
        save_sharded({"a": torch.ones(1)}, tmp_path / "out", header={}, architecture={}, in_fingerprint=is_backbone)
        save_weights(randomise(SwinV2("swinv2_nano")), tmp_path / "own.safetensors", {})
    finally:
        os.umask(before)
    files = [*(tmp_path / "out").iterdir(), tmp_path / "own.safetensors"]
    assert [file.stat().st_mode & 0o777 for file in files] == [0o640] * 4


def test_transformers_reads_the_index(folder: Path) -> None:
    from transformers.utils.hub import get_checkpoint_shard_files

    files, metadata = get_checkpoint_shard_files(str(folder), str(folder / INDEX_NAME))
    assert [Path(file).name for file in files] == [path.name for path in shards(folder)]
    total = sum(tensor.nbytes for path in shards(folder) for tensor in load_file(path).values())
    assert metadata["total_size"] == total


def test_dtype_and_plan(tmp_path: Path) -> None:
    shared = torch.ones(10, 10)
    tensors = {"b": shared, "a": shared, "large": torch.zeros(1000), "view": shared[:, :3], "head.weight": shared[0]}
    index = save_sharded(
        tensors,
        tmp_path / "out",
        header={},
        architecture={},
        in_fingerprint=is_backbone,
        dtype=lambda name: None if name == "a" else torch.bfloat16,
        max_shard_bytes=700,
    )
    weight_map = json.loads(index.read_text())["weight_map"]
    assert list(weight_map) == sorted(tensors)
    # 400 and 200 bytes go together, the head's 20 too, the large one has a shard of its own, the last another.
    assert list(weight_map.values()) == [f"model-0000{number}-of-00003.safetensors" for number in (1, 1, 1, 2, 3)]
    read = read_weights(index).tensors
    assert {name: tensor.dtype for name, tensor in read.items()} == {
        name: torch.float32 if name == "a" else torch.bfloat16 for name in tensors
    }
    assert torch.equal(read["view"].float(), shared[:, :3])


def test_writing_refuses_what_it_would_spoil(tmp_path: Path, folder: Path) -> None:
    arguments = {"header": {}, "architecture": {}, "in_fingerprint": is_backbone}
    with pytest.raises(WeightsError, match="exists and is not an empty folder"):
        save_sharded({"a": torch.ones(1)}, folder, **arguments)
    with pytest.raises(WeightsError, match="exists and is not an empty folder"):
        save_sharded({"a": torch.ones(1)}, folder / INDEX_NAME, **arguments)
    with pytest.raises(WeightsError, match="a overflows in float16"):
        save_sharded({"a": torch.full((1,), 1e6)}, tmp_path / "new", dtype=lambda name: torch.float16, **arguments)
    with pytest.raises(WeightsError, match="cannot be written"):
        save_sharded({"a": torch.ones(1)}, folder / INDEX_NAME / "below", **arguments)
    assert not list(tmp_path.glob("new*"))
    (tmp_path / "empty").mkdir()
    save_sharded({"a": torch.ones(1)}, tmp_path / "empty", **arguments)
    assert read_weights(tmp_path / "empty").tensors["a"] == 1


def truncate(folder: Path) -> None:
    path = shards(folder)[2]
    path.write_bytes(path.read_bytes()[:-100])


def truncate_without_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    truncate(folder)


def remove(folder: Path) -> None:
    shards(folder)[1].unlink()


def drop_tensor(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    path = shards(folder)[0]
    content = load_file(path)
    del content[sorted(content)[0]]
    save_file(content, path)


def add_tensor(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    path = shards(folder)[0]
    save_file(load_file(path) | {"another": torch.zeros(1)}, path)


def other_manifest(folder: Path) -> None:
    change_json(folder / MANIFEST_NAME, lambda content: content["shards"].popitem())


def broken_manifest(folder: Path) -> None:
    change_json(folder / MANIFEST_NAME, lambda content: content.pop("fingerprint"))


def newer_manifest(folder: Path) -> None:
    change_json(folder / MANIFEST_NAME, lambda content: content.update(format="permafrost weights 9"))


def escape(folder: Path) -> None:
    change_json(folder / INDEX_NAME, lambda content: content["weight_map"].update(a="../../etc/passwd"))


def pickled(folder: Path) -> None:
    change_json(folder / INDEX_NAME, lambda content: content["weight_map"].update(a="pytorch_model-00001-of-00002.bin"))


def empty_index(folder: Path) -> None:
    (folder / INDEX_NAME).write_text("{}")


def half_index(folder: Path) -> None:
    text = (folder / INDEX_NAME).read_text()
    (folder / INDEX_NAME).write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model-00003-of-\d+\.safetensors has \d+ bytes, but manifest\.json says \d+: it is truncated"),
        (truncate_without_manifest, r"model-00003-of-\d+\.safetensors is a damaged safetensors file"),
        (remove, r"of which 1 are not in .*: model-00002-of-\d+\.safetensors\. Download"),
        (drop_tensor, r"model-00001-of-\d+\.safetensors lacks 1 tensors that .* says are in it: head\.bias"),
        (add_tensor, r"model-00001-of-\d+\.safetensors holds 1 tensors that .* does not say are in it: another"),
        (other_manifest, r"manifest\.json lists the shards .*, but the index beside it"),
        (broken_manifest, r"manifest\.json is damaged \(no 'fingerprint'\)"),
        (newer_manifest, r"format 'permafrost weights 9', expected 'permafrost weights 1'"),
        (escape, r"names files outside its folder: \.\./\.\./etc/passwd"),
        (pickled, r"which are not safetensors; only sharded safetensors are read"),
        (empty_index, r"has no weight_map"),
        (half_index, r"cannot be read as JSON"),
    ],
)
def test_damage_is_named_before_anything_is_built(folder: Path, monkeypatch, damage, message: str) -> None:
    damage(folder)
    monkeypatch.setattr(load_swin, "SwinV2", lambda *_, **__: pytest.fail("a network was built"))
    with pytest.raises(WeightsError, match=message):
        load_backbone("swinv2_nano", weights=folder)


def test_a_flipped_bit_is_found_and_its_shard_named(folder: Path) -> None:
    path = shards(folder)[3]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"not those that were written\. Damaged: {path.name};"):
        load_backbone("swinv2_nano", weights=folder)


def test_a_manifest_of_another_checkpoint_is_refused(folder: Path) -> None:
    change_json(folder / MANIFEST_NAME, lambda content: content.update(fingerprint="0" * 64))
    with pytest.raises(WeightsError, match="its manifest is of other tensors"):
        load_backbone("swinv2_nano", weights=folder)


def test_one_shard_is_not_the_whole(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"82 missing: layers\.2"):
        load_backbone("swinv2_nano", weights=shards(folder)[0])


LOAD_AND_MEASURE = """
import re, sys, threading, time
import torch
from permafrost.model import load_backbone

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

load_backbone("swinv2_nano", weights="random", dtype=torch.bfloat16)
peak, done, before = 0, False, anonymous()
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
backbone = load_backbone("swinv2_base", weights=sys.argv[1], dtype=torch.bfloat16)
done = True
thread.join()
final = sum(parameter.nbytes for parameter in backbone.parameters())
print(peak - before, final, backbone.fingerprint)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_loading_takes_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in SwinV2("swinv2_base").state_dict().items()}
    header = HEADER | {"name": "swinv2_base"}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4096 * 1024, generator=generator)
    tensors = {name: noise[: shape.numel()].reshape(shape) for name, shape in shapes.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size > 300e6
    index = save_sharded(
        tensors,
        tmp_path / "base",
        header=header,
        architecture={},
        in_fingerprint=is_backbone,
        max_shard_bytes=100_000_000,
    )
    code = [sys.executable, "-c", LOAD_AND_MEASURE, str(index)]
    result = subprocess.run(code, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    growth, final, digest = result.stdout.split()
    assert digest == json.loads((tmp_path / "base" / MANIFEST_NAME).read_text())["fingerprint"]
    assert int(final) < 0.55 * size
    # The constant is for what is not weights: 700 modules, the allocator's slack.
    assert 0.9 * int(final) < int(growth) < 1.1 * int(final) + 16e6
