"""Swin V1 from files to features: windows read from its position tables, strict loading, and the frozen contract."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from permafrost.model import (
    BackboneConfig,
    BackboneError,
    SwinV1,
    WeightsError,
    build_backbone,
    load_backbone,
    save_weights,
)
from permafrost.model.weights.read import read_weights

DEPTHS = (2, 2, 6, 2)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (1, 3, 70, 101), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tensors(randomise) -> Callable[..., dict[str, Tensor]]:
    """The state dict of a tiny Swin V1 classifier with 10 classes, once drawn for each choice of windows."""
    drawn: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def draw(windows: tuple[int, ...]) -> dict[str, Tensor]:
        if windows not in drawn:
            model = randomise(SwinV1("swin_tiny", window_size=windows))
            classifier = {"norm.weight": (768,), "norm.bias": (768,), "head.weight": (10, 768), "head.bias": (10,)}
            drawn[windows] = dict(model.state_dict()) | {name: torch.ones(shape) for name, shape in classifier.items()}
        return dict(drawn[windows])

    return draw


def official_buffers(windows: tuple[int, ...]) -> dict[str, Tensor]:
    """Return what official files carry beside the weights: an index per block, a mask where windows are shifted."""
    buffers = {}
    for stage, (depth, window) in enumerate(zip(DEPTHS, windows, strict=True)):
        axis = torch.arange(window)
        places = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
        offsets = places[:, :, None] - places[:, None, :] + window - 1
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            buffers[f"{name}.attn.relative_position_index"] = offsets[0] * (2 * window - 1) + offsets[1]
            if block % 2 and stage < 3:
                buffers[f"{name}.attn_mask"] = torch.zeros(4, window**2, window**2)
    return buffers


@pytest.fixture
def official_file(tmp_path, tensors) -> Callable[..., Path]:
    """Writes a tiny classification checkpoint as the official training code would."""

    def write(
        windows: tuple[int, ...] = (7, 7, 7, 7), change: Callable[[dict[str, Tensor]], None] = lambda state: None
    ) -> Path:
        state = tensors(windows) | official_buffers(windows)
        change(state)
        path = tmp_path / "swin_tiny_official.pth"
        torch.save({"model": state}, path)
        return path

    return write


def features_of(model: SwinV1, backbone, images: Tensor) -> tuple[Tensor, ...]:
    normalised = (images / 255.0 - backbone.mean[:, None, None]) / backbone.std[:, None, None]
    with torch.no_grad():
        return model.eval()(normalised)


def test_official_file_gives_the_features_of_its_network(official_file, tensors, images, relative_error) -> None:
    backbone = load_backbone("swin_tiny", weights=official_file())
    model = SwinV1("swin_tiny", window_size=7)
    model.load_state_dict({key: value for key, value in tensors((7, 7, 7, 7)).items() if key in model.state_dict()})
    features = backbone(images)
    assert backbone.spec.channels == (96, 192, 384, 768)
    for found, expected, stride in zip(features, features_of(model, backbone, images), (4, 8, 16, 32), strict=True):
        assert relative_error(found, expected) < 1e-5
        assert found.shape[2:] == (-(-70 // stride), -(-101 // stride))
        assert found.is_contiguous(memory_format=torch.channels_last)
    described = backbone.describe()
    assert described["window_size"] == described["trained_window_size"] == (7, 7, 7, 7)
    assert described["position_tables"] == "as trained"
    assert "extra_norm_interval" not in described
    assert described["left_out"] == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    # The published 28,288,354 of the classifier, without its final norm and its 1000 classes.
    assert described["num_parameters"] == 28_288_354 - 2 * 768 - 1000 * 769
    json.dumps(described)


def test_fingerprint_depends_on_the_weights_alone(tmp_path, official_file) -> None:
    path = official_file()
    expected = load_backbone("swin_tiny", weights=path).fingerprint
    resampled = load_backbone("swin_tiny", weights=path, window_size=12, pretrained_window_size=7, dtype=torch.bfloat16)
    assert resampled.fingerprint == expected
    state = torch.load(path)["model"]
    bare = {name: value for name, value in state.items() if "index" not in name and "mask" not in name}
    save_file(bare, tmp_path / "bare.safetensors")
    assert load_backbone("swin_tiny", weights=tmp_path / "bare.safetensors").fingerprint == expected
    state["layers.2.blocks.5.attn.relative_position_bias_table"][84, 11] += 1e-3
    torch.save(state, tmp_path / "changed.pth")
    assert load_backbone("swin_tiny", weights=tmp_path / "changed.pth").fingerprint != expected


def test_windows_of_14_as_esvit_trained_them(tmp_path, randomise, relative_error) -> None:
    """224 pixels: the last map is 7 x 7 and its table is for windows of 7. Such files have no buffers."""
    reference = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, window_size=14)
    state = randomise(reference).eval().state_dict()
    state = {
        re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key): value
        for key, value in state.items()
    }
    path = tmp_path / "teacher.pth"
    torch.save({"model": state}, path)
    backbone = load_backbone("swin_tiny", weights=path)
    assert backbone.network.window_size == backbone.network.pretrained_window_size == (14, 14, 14, 7)
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        normalised = (images / 255.0 - backbone.mean[:, None, None]) / backbone.std[:, None, None]
        expected = reference.forward_intermediates(normalised, intermediates_only=True)
    assert max(relative_error(*pair) for pair in zip(backbone(images), expected, strict=True)) < 1e-5

    # A window of 14 in the last stage is another window than that of its table.
    with pytest.raises(WeightsError, match=r"\(14, 14, 14, 7\), but the recipe asks for \(14, 14, 14, 14\)"):
        load_backbone("swin_tiny", weights=path, window_size=14)
    load_backbone("swin_tiny", weights=path, window_size=(14, 14, 14, 7))
    widened = load_backbone("swin_tiny", weights=path, window_size=14, pretrained_window_size=(14, 14, 14, 7))
    assert widened.describe()["position_tables"] == "resampled (bicubic): stage 4 from window 7 to 14"
    found = widened(images)
    assert all(torch.equal(one, two) for one, two in zip(found[:3], backbone(images)[:3], strict=True))
    assert not torch.allclose(found[3], backbone(images)[3], atol=1e-3)


def test_another_window_must_be_said_and_resamples_the_tables(official_file, tensors, images, relative_error) -> None:
    path = official_file()
    for window in (12, 6, (7, 7, 7, 6)):
        with pytest.raises(
            WeightsError, match=r"pretrained_window_size=\(7, 7, 7, 7\); its position tables are then re"
        ):
            load_backbone("swin_tiny", weights=path, window_size=window)
    with pytest.raises(WeightsError, match=r"pretrained_window_size=\(7, 7, 7, 7\), but the recipe says \(12, 12"):
        load_backbone("swin_tiny", weights=path, window_size=12, pretrained_window_size=12)
    load_backbone("swin_tiny", weights=path, window_size=7)
    load_backbone("swin_tiny", weights=path, pretrained_window_size=7)

    backbone = load_backbone("swin_tiny", weights=path, window_size=(12, 7, 6, 7), pretrained_window_size=7)
    described = backbone.describe()
    assert described["position_tables"] == (
        "resampled (bicubic): stage 1 from window 7 to 12, stage 3 from window 7 to 6"
    )
    # The same with tables resampled by hand, in a network that knows no other window.
    model = SwinV1("swin_tiny", window_size=(12, 7, 6, 7))
    state = {key: value for key, value in tensors((7, 7, 7, 7)).items() if key in model.state_dict()}
    for key in state:
        if key.endswith("_table") and key.startswith(("layers.0", "layers.2")):
            side = 23 if key.startswith("layers.0") else 11
            table = state[key].double().view(13, 13, -1).permute(2, 0, 1)[None]
            state[key] = F.interpolate(table, size=(side, side), mode="bicubic")[0].permute(1, 2, 0).flatten(0, 1)
    model.load_state_dict(state)
    expected = features_of(model, backbone, images)
    assert max(relative_error(*pair) for pair in zip(backbone(images), expected, strict=True)) < 1e-5


def test_tables_and_indices_that_disagree_are_refused(official_file) -> None:
    def swap(state: dict) -> None:
        state["layers.1.blocks.1.attn.relative_position_index"] = torch.zeros(144, 144, dtype=torch.int64)

    with pytest.raises(WeightsError, match=r"stage 2 disagree about the window: \[7, 12\]"):
        load_backbone("swin_tiny", weights=official_file(change=swap))

    def enlarge(state: dict) -> None:
        state["layers.3.blocks.1.attn.relative_position_bias_table"] = torch.zeros(23 * 23, 24)

    with pytest.raises(WeightsError, match=r"stage 4 disagree about the window: \[7, 12\]"):
        load_backbone("swin_tiny", weights=official_file(change=enlarge))


def test_missing_unexpected_and_misshapen_tensors_are_all_named(official_file) -> None:
    def spoil(state: dict) -> None:
        del state["layers.0.blocks.1.attn.qkv.bias"]
        del state["layers.2.blocks.1.attn.relative_position_bias_table"]
        state["layers.0.blocks.0.attn.relative_position_bias_table"] = torch.zeros(170, 3)
        state["layers.3.blocks.1.attn.relative_position_bias_table"] = torch.zeros(169, 23)
        state["absolute_pos_embed"] = torch.zeros(1, 3136, 96)

    with pytest.raises(WeightsError) as caught:
        load_backbone("swin_tiny", weights=official_file(change=spoil))
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[1] == (
        "2 missing: layers.0.blocks.1.attn.qkv.bias, layers.2.blocks.1.attn.relative_position_bias_table"
    )
    assert lines[2] == "1 unexpected: absolute_pos_embed"
    assert lines[3] == (
        "2 of another shape: layers.0.blocks.0.attn.relative_position_bias_table is (170, 3), expected (169, 3), "
        "layers.3.blocks.1.attn.relative_position_bias_table is (169, 23), expected (169, 24)"
    )


def test_a_file_without_tables_is_refused_by_what_it_lacks(official_file) -> None:
    def strip(state: dict) -> None:
        for name in [name for name in state if "relative_position" in name or "attn_mask" in name]:
            del state[name]

    with pytest.raises(WeightsError, match=r"12 missing: layers\.0\.blocks\.0\.attn\.relative_position_bias_table"):
        load_backbone("swin_tiny", weights=official_file(change=strip))


def test_files_of_other_networks_are_recognised(tmp_path, official_file, randomise) -> None:
    path = official_file()
    with pytest.raises(WeightsError, match=r"(?s)does not fit swin_small.*It looks like swin_tiny\."):
        load_backbone("swin_small", weights=path)
    with pytest.raises(WeightsError, match=r"(?s)does not fit swinv2_tiny.*It is a Swin V1 checkpoint\."):
        load_backbone("swinv2_tiny", weights=path)
    with pytest.raises(WeightsError, match=r"weights of 'swinv2_nano', but the recipe asks for 'swin_tiny'"):
        load_backbone("swin_tiny", weights="swinv2_nano_glyphs")
    bare = tmp_path / "v2.pth"
    torch.save(dict(read_weights("swinv2_nano_glyphs").tensors), bare)
    with pytest.raises(WeightsError, match=r"(?s)does not fit swin_tiny.*It is a SwinV2 checkpoint\."):
        load_backbone("swin_tiny", weights=bare)

    def wrap(state: dict) -> None:
        for name in list(state):
            state[f"backbone.{name}"] = state.pop(name)

    expected = load_backbone("swin_tiny", weights=path).fingerprint
    path = official_file(change=wrap)
    for prefix in (None, "backbone."):
        assert load_backbone("swin_tiny", weights=path, prefix=prefix).fingerprint == expected


@pytest.mark.parametrize(("windows", "trained"), [((14, 14, 14, 7), None), ((12, 12, 12, 12), (7, 7, 7, 7))])
def test_own_file_round_trip(tmp_path, randomise, images, relative_error, windows, trained) -> None:
    """A network that uses resampled tables is stored with the tables it was trained with, and says so."""
    model = randomise(SwinV1("swin_tiny", window_size=windows, pretrained_window_size=trained))
    path = tmp_path / "own.safetensors"
    save_weights(model, path, {"mean": (0.5, 0.4, 0.3)}, torch.float32)
    checkpoint = read_weights(path)
    assert checkpoint.windows.window_size == windows
    assert checkpoint.windows.pretrained_window_size == (trained or windows)
    assert checkpoint.metadata["name"] == "swin_tiny"
    assert "extra_norm_interval" not in checkpoint.metadata
    backbone = load_backbone("swin_tiny", weights=path)
    assert backbone.network.window_size == windows
    assert backbone.mean.tolist() == pytest.approx([0.5, 0.4, 0.3])
    expected = features_of(model, backbone, images)
    assert max(relative_error(*pair) for pair in zip(backbone(images), expected, strict=True)) < 1e-5


def test_random_weights_are_seeded_and_have_no_identity(images) -> None:
    one, same, other = (load_backbone("swin_tiny", weights=name) for name in ("random", "random:0", "random:1"))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.network.window_size == (7, 7, 7, 7)
    for name, parameter in one.named_parameters():
        assert parameter.max() > parameter.min(), name
    features = one(images)
    assert all(0.2 < float(feature.std()) < 20 for feature in features)
    # The bias of a pair depends on its offset strongly enough to show when it is wrong.
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            source = dict(same.named_parameters())[name]
            parameter.copy_(source.flip(0) if name.endswith("_table") else source)
    assert all(not torch.allclose(one, two, atol=0.1) for one, two in zip(other(images), features, strict=True))


def test_position_tables_stay_precise_in_every_dtype(images, relative_error) -> None:
    expected = load_backbone("swin_tiny", weights="random", dtype=torch.float64)(images)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.04), (torch.float16, 0.005)):
        backbone = load_backbone("swin_tiny", weights="random", dtype=dtype)
        features = backbone(images)
        assert all(feature.dtype == dtype for feature in features)
        assert max(relative_error(*pair) for pair in zip(features, expected, strict=True)) < tolerance
        for name, parameter in backbone.named_parameters():
            assert parameter.dtype == (torch.float32 if name.endswith("_table") else dtype), name


def test_it_is_frozen(images) -> None:
    backbone = load_backbone("swin_tiny", weights="random")
    checksum = backbone.checksum()
    before = [feature.clone() for feature in backbone(images)]
    assert backbone.train() is backbone
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    attention = backbone.network.layers[0].blocks[0].attn
    assert attention.folded[7][2].shape == (3, 169)
    backbone.to("cpu")
    assert attention.folded == {}
    with torch.autocast("cpu", torch.bfloat16):
        after = backbone(images)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert backbone.checksum() == checksum
    with pytest.raises(BackboneError, match="smaller than one patch"):
        backbone(images[:, :, :3])


def test_extra_norms_are_not_for_swin_v1() -> None:
    with pytest.raises(BackboneError, match=r"extra_norm_interval is 6, but swin_tiny is a Swin V1"):
        load_backbone("swin_tiny", weights="random", extra_norm_interval=6)
    load_backbone("swin_tiny", weights="random", extra_norm_interval=0)


def test_config_builds_what_it_says() -> None:
    config = BackboneConfig("swin_tiny", "random", window_size=12, pretrained_window_size=7, dtype="bfloat16")
    network = build_backbone(config, "cpu").network
    assert isinstance(network, SwinV1)
    assert network.window_size == (12,) * 4
    assert network.pretrained_window_size == (7,) * 4
    assert network.layers[0].blocks[0].attn.relative_position_bias_table.shape == (169, 3)
