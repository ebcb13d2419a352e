"""Weights files: what is read from them, and what is refused, with which words."""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from permafrost.model import BackboneError, WeightsError, load_backbone, save_weights
from permafrost.model.spec import SwinV2Size
from permafrost.model.swin.v2 import SwinV2, SwinV2Classifier
from permafrost.model.weights import read as weights_module
from permafrost.model.weights.read import KNOWN_WEIGHTS, PRETRAINED_FOLDER, read_weights
from permafrost.model.weights.tensor_map import fingerprint


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_official_file_gives_the_features_of_its_classifier(official_file, images, relative_error) -> None:
    path = official_file(windows=(12, 12, 8, 4), pretrained=(0, 0, 6, 3))
    backbone = load_backbone("swinv2_nano", weights=path)
    model = SwinV2Classifier("swinv2_nano", num_classes=10, window_size=12, pretrained_window_size=(12, 12, 6, 3))
    state = torch.load(path)["model"]
    model.load_state_dict({name: value for name, value in state.items() if name in model.state_dict()})
    normalised = (images / 255.0 - backbone.mean[:, None, None]) / backbone.std[:, None, None]
    for found, expected in zip(backbone(images), model.eval().forward_features(normalised), strict=True):
        assert relative_error(found, expected) < 1e-5
    assert backbone.describe()["left_out"] == ["head.bias", "head.weight", "norm.bias", "norm.weight"]


def renamed(rename) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        for name in list(state):
            state[rename(name)] = state.pop(name)

    return change


def test_prefix_of_an_unknown_wrapper_is_suggested_and_taken(official_file) -> None:
    expected = load_backbone("swinv2_nano", weights=official_file()).fingerprint

    def wrap(state: dict) -> None:
        renamed(lambda name: f"my_net.{name}")(state)
        state["decoder.0.weight"] = torch.zeros(3)

    path = official_file(change=wrap)
    with pytest.raises(WeightsError, match=r"give prefix='my_net\.'"):
        load_backbone("swinv2_nano", weights=path)
    assert load_backbone("swinv2_nano", weights=path, prefix="my_net.").fingerprint == expected
    with pytest.raises(WeightsError, match=r"no tensor's name starts with 'module\.'"):
        load_backbone("swinv2_nano", weights=path, prefix="module.")
    with pytest.raises(WeightsError, match=r"Its names start with 'my_net\.'"):
        load_backbone("swinv2_nano", weights=path, prefix="")


def test_the_old_name_of_the_position_bias_is_understood(official_file) -> None:
    expected = load_backbone("swinv2_nano", weights=official_file()).fingerprint
    path = official_file(change=renamed(lambda name: name.replace("cpb_mlp", "rpe_mlp")))
    assert load_backbone("swinv2_nano", weights=path).fingerprint == expected


@pytest.mark.parametrize(
    ("rename", "hint"),
    [
        (lambda name: name.replace(".attn.", ".attn.w_msa."), "names of mmdetection"),
        (lambda name: name.replace("cpb_mlp.0.weight", "relative_position_bias_table"), "Swin V1"),
    ],
)
def test_other_formats_are_recognised(official_file, rename, hint: str) -> None:
    with pytest.raises(WeightsError, match=hint):
        load_backbone("swinv2_nano", weights=official_file(change=renamed(rename)))


def test_fingerprint_depends_on_the_tensors_alone(tmp_path, official_file) -> None:
    path = official_file()
    expected = load_backbone("swinv2_nano", weights=path).fingerprint
    assert load_backbone("swinv2_nano", weights=path, dtype=torch.bfloat16).fingerprint == expected
    state = torch.load(path)["model"]

    other = tmp_path / "other.safetensors"
    reverse = {name: value.contiguous() for name, value in reversed(state.items()) if not name.startswith("head.")}
    save_file(reverse, other)
    assert load_backbone("swinv2_nano", weights=other).fingerprint == expected
    torch.save(OrderedDict(reversed(state.items())), tmp_path / "bare.pth")
    assert load_backbone("swinv2_nano", weights=tmp_path / "bare.pth").fingerprint == expected

    state["patch_embed.proj.bias"][0] += 1e-3
    torch.save(state, tmp_path / "changed.pth")
    assert load_backbone("swinv2_nano", weights=tmp_path / "changed.pth").fingerprint != expected


def test_fingerprint_sees_name_dtype_and_shape() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    others = (
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.ones(1)},
        {"c": torch.zeros(2, 3), "b": torch.ones(1)},
    )
    assert fingerprint(dict(reversed(base.items()))) == fingerprint(base)
    assert len({fingerprint(tensors) for tensors in (base, *others)}) == 4
    # The definition must not move: its value is stored in every head checkpoint.
    content = b"a torch.float32 (2, 3)\n" + bytes(24) + b"b torch.float32 (1,)\n" + struct.pack("<f", 1.0)
    assert fingerprint(base) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", KNOWN_WEIGHTS)
def test_known_weights_ship_with_the_package(name: str, images) -> None:
    known = KNOWN_WEIGHTS[name]
    path = PRETRAINED_FOLDER / known.file
    assert path.stat().st_size < 6e6
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    backbone = load_backbone(known.backbone, weights=name)
    assert all(torch.isfinite(feature).all() for feature in backbone(images))
    assert read_weights(name).metadata["command"].startswith("permafrost pretrain ")


def test_known_name_finds_its_file_and_says_if_the_installation_lacks_it(tmp_path, monkeypatch, randomise) -> None:
    monkeypatch.setattr(weights_module, "PRETRAINED_FOLDER", tmp_path)
    with pytest.raises(WeightsError, match="missing from this installation"):
        load_backbone("swinv2_nano", weights="swinv2_nano_glyphs")
    save_weights(randomise(SwinV2("swinv2_nano")), tmp_path / "swinv2_nano_glyphs.safetensors", {})
    assert load_backbone("swinv2_nano", weights="swinv2_nano_glyphs").num_parameters > 2e6


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("swinv2_nano_glyph", "swinv2_nano_glyphs"), ("randon", "random"), ("{folder}/mode.pth", "model.pth")],
)
def test_a_typo_is_answered_with_the_nearest_name(tmp_path, given: str, nearest: str) -> None:
    (tmp_path / "model.pth").touch()
    with pytest.raises(WeightsError, match=rf"known: random, swinv2_nano_glyphs.*Did you mean '.*{nearest}'"):
        load_backbone("swinv2_nano", weights=given.format(folder=tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "is a web page"),
        (b"\n  <html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"just some words that are no weights at all", "neither a safetensors file nor a PyTorch checkpoint"),
        (b"PK\x03\x04 but no archive", "damaged PyTorch checkpoint"),
        (b"\x80\x02 but no pickle", "damaged PyTorch checkpoint"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{but no header", "damaged safetensors file"),
    ],
)
def test_files_that_are_no_weights(tmp_path, content: bytes, message: str) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        load_backbone("swinv2_nano", weights=path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_truncated_files(tmp_path, official_file, kind: str) -> None:
    path = official_file()
    if kind == "safetensors":
        state = {name: value.contiguous() for name, value in torch.load(path)["model"].items()}
        path = tmp_path / "file.safetensors"
        save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="damaged"):
        load_backbone("swinv2_nano", weights=path)


def test_a_folder_without_weights_is_refused(tmp_path) -> None:
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(WeightsError, match=r"is a folder without model\.safetensors\.index\.json"):
        load_backbone("swinv2_nano", weights=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds list; expected a state dict"),
        ({"optimizer": {}, "epoch": 3}, "a dictionary with epoch, optimizer"),
        ({"model": {"a": "text"}}, "expected a state dict"),
        ({"model": {}}, "expected a state dict"),
        ({"model": {"a": torch.zeros(2, dtype=torch.int8)}}, r"floating-point weights, found a \(torch.int8\)"),
        ({"model": {"a": torch.tensor([1.0, torch.inf])}}, "not finite .* in a;"),
        ({"model": {"a": torch.tensor([torch.nan])}}, "not finite"),
    ],
)
def test_contents_that_are_no_weights(tmp_path, content, message: str) -> None:
    path = tmp_path / "file.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=message):
        dict(read_weights(path).tensors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("window_size", "8"),
        ("window_size", "[8, 8, 8]"),
        ("pretrained_window_size", "[8, 8, 8, 0]"),
        ("mean", "[0.1, 0.2]"),
        ("std", "[0.1, 0.2, 0.0]"),
        ("image_size", '"big"'),
        ("num_classes", "{"),
    ],
)
def test_headers_that_make_no_sense(tmp_path, key: str, value: str) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={key: value})
    with pytest.raises(WeightsError, match=f"its header says {key}="):
        read_weights(path)


def test_weights_that_overflow_float16_are_refused(official_file) -> None:
    def enlarge(state: dict) -> None:
        state["layers.0.blocks.0.mlp.fc1.weight"][0, 0] = 1e6

    path = official_file(change=enlarge)
    with pytest.raises(WeightsError, match=r"fc1\.weight overflows in float16"):
        load_backbone("swinv2_nano", weights=path, dtype=torch.float16)
    load_backbone("swinv2_nano", weights=path, dtype=torch.bfloat16)


def test_errors_are_value_errors() -> None:
    assert issubclass(WeightsError, BackboneError)
    assert issubclass(BackboneError, ValueError)


def test_a_header_whose_length_begins_like_a_pickle(tmp_path) -> None:
    """One file in 32: the first byte of the header's length, a multiple of 8, is that of a pickle (0x80)."""
    network = SwinV2(SwinV2Size(16, (2, 2, 2, 2), (1, 2, 2, 4)))
    path = tmp_path / "own.safetensors"
    for padding in range(256):
        save_weights(network, path, {"note": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[:9].endswith(b"{")
    assert path.read_bytes()[0] == 0x80
    checkpoint = read_weights(path)
    assert checkpoint.windows.window_size == network.window_size
    assert set(checkpoint.metadata["note"]) <= {"x"}
