"""Weights of a Swin: written and read back, compared with a network, drawn at random."""

from __future__ import annotations

import pytest
import torch

from permafrost.model import WeightsError, load_backbone, save_weights
from permafrost.model.swin.v2 import SwinV2, SwinV2Classifier
from permafrost.model.swin.weights import check_fit
from permafrost.model.weights.read import read_weights


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


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
