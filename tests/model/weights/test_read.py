"""Weights files: what is read from them, and what is refused, with which words."""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from permafrost.model import BackboneError, WeightsError, load_backbone, save_weights
from permafrost.model.spec import SwinV2Size
from permafrost.model.swin.v2 import SwinV2, SwinV2Classifier
from permafrost.model.swin.weights import check_fit
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


@pytest.mark.parametrize(
    ("windows", "pretrained", "used", "coordinates"),
    [
        # A model of 192 pixels: stage 4 had a map of 6, the configured window is 12.
        ((12, 12, 12, 6), (0, 0, 0, 0), (12,) * 4, (12, 12, 12, 6)),
        # Fine-tuned from 192 to 256 and to 384 pixels.
        ((16, 16, 16, 8), (12, 12, 12, 6), (16,) * 4, (12, 12, 12, 6)),
        ((24, 24, 24, 12), (12, 12, 12, 6), (24,) * 4, (12, 12, 12, 6)),
        ((8, 8, 8, 8), (0, 0, 0, 0), (8,) * 4, (8,) * 4),
        ((7, 7, 7, 1), (0, 0, 0, 1), (7,) * 4, (7, 7, 7, 1)),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_windows_are_read_from_official_buffers(official_file, windows, pretrained, used, coordinates) -> None:
    path = official_file(windows, pretrained)
    network = load_backbone("swinv2_nano", weights=path).network
    assert network.window_size == used
    assert network.pretrained_window_size == coordinates
    assert load_backbone("swinv2_nano", weights=path).describe()["trained_window_size"] == windows


def test_recipe_may_repeat_the_files_windows(official_file) -> None:
    path = official_file()
    for window_size in (12, (12, 12, 12, 12), (12, 12, 12, 6)):
        for pretrained in (None, (12, 12, 12, 6)):
            load_backbone("swinv2_nano", weights=path, window_size=window_size, pretrained_window_size=pretrained)


def test_recipe_must_not_contradict_the_files_windows(official_file) -> None:
    path = official_file()
    with pytest.raises(WeightsError, match=r"window_size=\(12, 12, 12, 6\), but the recipe asks for \(8, 8, 8, 8\)"):
        load_backbone("swinv2_nano", weights=path, window_size=8)
    for stated in (12, 8, (12, 12, 12, 12)):
        with pytest.raises(WeightsError, match=r"pretrained_window_size=\(12, 12, 12, 6\), but the recipe says"):
            load_backbone("swinv2_nano", weights=path, window_size=12, pretrained_window_size=stated)


def test_another_window_on_purpose_names_the_pretrained_one(official_file) -> None:
    backbone = load_backbone(
        "swinv2_nano", weights=official_file(), window_size=24, pretrained_window_size=(12, 12, 12, 6)
    )
    assert backbone.network.window_size == (24,) * 4
    assert backbone.network.pretrained_window_size == (12, 12, 12, 6)


def test_windows_must_be_stated_where_the_file_is_silent(official_file) -> None:
    def strip(state: dict) -> None:
        for name in [name for name in state if "relative_" in name or "attn_mask" in name]:
            del state[name]

    path = official_file(change=strip)
    for arguments in ({}, {"window_size": 12}, {"pretrained_window_size": 12}):
        with pytest.raises(WeightsError, match="does not say with which windows"):
            load_backbone("swinv2_nano", weights=path, **arguments)
    backbone = load_backbone("swinv2_nano", weights=path, window_size=12, pretrained_window_size=(12, 12, 12, 6))
    assert backbone.network.pretrained_window_size == (12, 12, 12, 6)


def test_windows_from_the_index_or_the_mask_alone(official_file) -> None:
    def strip(state: dict) -> None:
        for name in [name for name in state if "relative_coords" in name or "blocks.0.attn.relative" in name]:
            del state[name]

    path = official_file(change=strip)
    with pytest.raises(WeightsError, match="Give pretrained_window_size"):
        load_backbone("swinv2_nano", weights=path)
    with pytest.raises(WeightsError, match="Give pretrained_window_size"):
        load_backbone("swinv2_nano", weights=path, window_size=8)
    backbone = load_backbone("swinv2_nano", weights=path, pretrained_window_size=(12, 12, 12, 6))
    assert backbone.network.window_size == (12,) * 4


def test_buffers_that_disagree_are_refused(official_file) -> None:
    def swap(state: dict) -> None:
        state["layers.1.blocks.1.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)

    with pytest.raises(WeightsError, match=r"stage 2 disagree about the window: \[7, 12\]"):
        load_backbone("swinv2_nano", weights=official_file(change=swap))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_own_file_round_trip(tmp_path, randomise, images, relative_error, dtype) -> None:
    model = randomise(
        SwinV2Classifier("swinv2_nano", num_classes=7, window_size=6, pretrained_window_size=(6, 6, 6, 3))
    )
    path = tmp_path / "own.safetensors"
    extra = {"image_size": 96, "mean": (0.5, 0.4, 0.3), "std": [0.2, 0.2, 0.1], "provenance": "a test", "accuracy": 0.5}
    save_weights(model, path, extra, dtype)
    assert [entry.name for entry in tmp_path.iterdir()] == ["own.safetensors"]

    checkpoint = read_weights(path)
    assert checkpoint.windows.window_size == (6, 6, 6, 6)
    assert checkpoint.windows.pretrained_window_size == (6, 6, 6, 3)
    assert checkpoint.metadata["name"] == "swinv2_nano"
    assert checkpoint.metadata["num_classes"] == 7
    assert checkpoint.metadata["image_size"] == 96
    assert checkpoint.metadata["provenance"] == "a test"
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {dtype}
    check_fit(model, "swinv2_nano", checkpoint)

    backbone = load_backbone("swinv2_nano", weights=path)
    assert backbone.network.window_size == (6, 6, 6, 6)
    assert backbone.network.pretrained_window_size == (6, 6, 6, 3)
    assert backbone.mean.tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert backbone.std.tolist() == pytest.approx([0.2, 0.2, 0.1])
    normalised = (images / 255.0 - backbone.mean[:, None, None]) / backbone.std[:, None, None]
    rounded = {name: value.to(dtype).float() for name, value in model.state_dict().items()}
    model.load_state_dict(rounded)
    for found, expected in zip(backbone(images), model.eval().forward_features(normalised), strict=True):
        assert relative_error(found, expected) < 1e-5


def test_extra_norms_are_read_from_the_header(tmp_path, randomise) -> None:
    path = tmp_path / "own.safetensors"
    save_weights(randomise(SwinV2("swinv2_nano", extra_norm_interval=2)), path, {})
    assert load_backbone("swinv2_nano", weights=path).describe()["extra_norm_interval"] == 2
    with pytest.raises(WeightsError, match="give extra_norm_interval=2"):
        load_backbone("swinv2_nano", weights=path, extra_norm_interval=0)


def test_writing_refuses_contradictions_and_broken_weights(tmp_path, randomise) -> None:
    model = randomise(SwinV2("swinv2_nano"))
    path = tmp_path / "own.safetensors"
    with pytest.raises(WeightsError, match=r"name=swinv2_tiny, but the model has swinv2_nano"):
        save_weights(model, path, {"name": "swinv2_tiny"})
    with pytest.raises(WeightsError, match="std"):
        save_weights(model, path, {"std": [0.2, 0.0, 0.2]})
    with torch.no_grad():
        model.patch_embed.norm.weight[0] = torch.nan
    with pytest.raises(WeightsError, match=r"not finite.*patch_embed\.norm\.weight"):
        save_weights(model, path, {})
    assert not list(tmp_path.iterdir())


def test_file_of_another_size_is_refused_by_name_and_by_shape(tmp_path, official_file, randomise) -> None:
    with pytest.raises(WeightsError) as caught:
        load_backbone("swinv2_tiny", weights=official_file())
    text = str(caught.value)
    assert "does not fit swinv2_tiny" in text
    assert "layers.2.blocks.4.attn.cpb_mlp.0.bias" in text
    assert "patch_embed.proj.weight" in text or "of another shape" in text
    assert "It looks like swinv2_nano" in text
    path = tmp_path / "own.safetensors"
    save_weights(randomise(SwinV2("swinv2_nano")), path, {})
    with pytest.raises(WeightsError, match="weights of 'swinv2_nano', but the recipe asks for 'swinv2_tiny'"):
        load_backbone("swinv2_tiny", weights=path)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(official_file) -> None:
    def spoil(state: dict) -> None:
        del state["layers.0.blocks.1.attn.q_bias"]
        state["layers.0.blocks.9.attn.q_bias"] = torch.zeros(3)
        state["patch_embed.proj.weight"] = torch.zeros(32, 3, 2, 2)

    with pytest.raises(WeightsError) as caught:
        load_backbone("swinv2_nano", weights=official_file(change=spoil))
    lines = str(caught.value).splitlines()
    assert lines[1].strip() == "1 missing: layers.0.blocks.1.attn.q_bias"
    assert lines[2].strip() == "1 unexpected: layers.0.blocks.9.attn.q_bias"
    assert lines[3].strip().endswith("patch_embed.proj.weight is (32, 3, 2, 2), expected (32, 3, 4, 4)")


def renamed(rename):
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


def test_random_weights_are_seeded_and_have_no_identity(images) -> None:
    one, same, other = (load_backbone("swinv2_nano", weights=name) for name in ("random", "random:0", "random:1"))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    for name, parameter in one.named_parameters():
        assert parameter.abs().max() > 0, name
        assert parameter.numel() == 1 or parameter.max() > parameter.min(), name
    norms = [value for name, value in one.named_parameters() if "norm" in name and name.endswith("weight")]
    assert min(float(norm.min()) for norm in norms) > 0.1
    features = one(images)
    assert all(0.2 < float(feature.std()) < 20 for feature in features)
    for block in [block for stage in one.network.layers for block in stage.blocks]:
        block.norm1.weight.zero_()
        block.norm1.bias.zero_()
    assert not torch.allclose(one(images)[-1], features[-1], atol=0.1)


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
