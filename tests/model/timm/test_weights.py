"""Weights of timm models: files in timm's and other formats, timm's own hub, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from permafrost.model import WeightsError, load_backbone
from permafrost.model.weights.tensor_map import fingerprint

NET = "convnextv2_atto"
VIT = "eva02_tiny_patch14_224"


def random_state(name: str, **options) -> dict[str, Tensor]:
    """A whole model's state dict, every tensor drawn."""
    generator = torch.Generator().manual_seed(5)
    with torch.device("meta"):
        shapes = timm.create_model(name, **options).state_dict()
    return {key: 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in shapes.items()}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state(NET)


def used(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if not key.startswith(("head.", "norm.", "fc_norm."))}


def test_files_of_every_kind_are_the_same_network(state, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("net.safetensors", "net.pth", "nested.pth", "prefixed.pth")}
    save_file(state, files["net.safetensors"])
    torch.save(state, files["net.pth"])
    torch.save({"epoch": 3, "state_dict": state}, files["nested.pth"])
    torch.save(
        {f"backbone.{key}": tensor for key, tensor in state.items()} | {"neck": torch.ones(1)}, files["prefixed.pth"]
    )
    images = torch.rand(1, 3, 64, 40, generator=torch.Generator().manual_seed(0))
    model = timm.create_model(NET).eval()
    model.load_state_dict(state)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    padded = torch.zeros(1, 3, 64, 64)
    padded[..., :40] = (images - mean) / std
    with torch.no_grad():
        expected = model.forward_intermediates(padded, intermediates_only=True)
    for name, file in files.items():
        backbone = load_backbone(
            f"timm/{NET}", weights=file, prefix="backbone." if name.startswith("prefixed") else None
        )
        assert backbone.fingerprint == fingerprint(used(state))
        for found, theirs in zip(backbone(images), expected, strict=True):
            torch.testing.assert_close(found, theirs[..., : found.shape[-1]], rtol=1e-5, atol=1e-6)
        described = backbone.describe()
        assert described["weights"] == str(file)
        assert described["left_out"] == sorted(state.keys() - used(state).keys())
        assert described["resampled"] == []


def test_a_head_of_any_size_or_none_is_passed_over(state, tmp_path: Path) -> None:
    for number, change in enumerate(({"head.fc.weight": torch.ones(7, 320), "head.fc.bias": torch.ones(7)}, None)):
        file = tmp_path / f"{number}.safetensors"
        save_file({**state, **change} if change else used(state), file)
        assert load_backbone(f"timm/{NET}", weights=file).fingerprint == fingerprint(used(state))


def test_timms_conversions_are_applied(tmp_path: Path, relative_error) -> None:
    """The original ConvNeXt-V2 names, and a ViT of another image and patch size."""
    state = random_state(NET)
    original = {}
    for key, tensor in state.items():
        for theirs, ours in (("downsample_layers.0.", "stem."), ("norm.", "head.norm."), ("head.", "head.fc.")):
            if key.startswith(ours):
                key = key.replace(ours, theirs, 1)
                break
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace("mlp.grn.bias", "grn.beta")
        key = key.replace("mlp.grn.weight", "grn.gamma")
        if key.startswith("stages."):
            stage = key.split(".")[1]
            key = key.replace(f"stages.{stage}.downsample", f"downsample_layers.{stage}").replace(".blocks", "")
        original[key] = tensor
    torch.save({"model": original}, tmp_path / "original.pth")
    found = load_backbone(f"timm/{NET}", weights=tmp_path / "original.pth")
    assert found.fingerprint == fingerprint(used(state))

    small = random_state(VIT, img_size=80, patch_size=16)
    assert small["pos_embed"].shape[1] == 1 + 5 * 5
    save_file(small, tmp_path / "small.safetensors")
    backbone = load_backbone(f"timm/{VIT}", weights=tmp_path / "small.safetensors")
    assert backbone.describe()["resampled"] == ["patch_embed.proj.weight", "pos_embed"]
    expected = resample_abs_pos_embed(small["pos_embed"], [16, 16], num_prefix_tokens=1)
    assert relative_error(backbone.network.model.pos_embed, expected) < 1e-6
    assert backbone.network.model.patch_embed.proj.weight.shape[-2:] == (14, 14)
    # What the file holds is what counts, not what was made of it.
    assert backbone.fingerprint == fingerprint(used(small))


def test_a_tensor_that_moves_to_anothers_name_is_no_resampled_one(tmp_path: Path) -> None:
    """The original Swin files keep the step between stages at the end of a stage, timm at the start of the next."""
    name = "swinv2_tiny_window8_256"
    wanted = ("patch_embed.", "layers.0.", "layers.1.", "layers.2.downsample.")
    state = {key: tensor for key, tensor in random_state(name).items() if key.startswith(wanted)}
    original = {
        key.replace(".1.downsample", ".0.downsample").replace(".2.downsample", ".1.downsample"): tensor
        for key, tensor in state.items()
    }
    assert {"layers.0.downsample.norm.weight", "layers.1.downsample.norm.weight"} <= original.keys()
    found = []
    for number, tensors in enumerate((state, original)):
        torch.save({"model": tensors}, tmp_path / f"{number}.pth")
        backbone = load_backbone(f"timm/{name}", weights=tmp_path / f"{number}.pth", taps=(0, 1))
        assert backbone.describe()["resampled"] == []
        assert backbone.describe()["left_out"] == sorted(key for key in state if "layers.2" in key)
        found.append((backbone.fingerprint, backbone.checksum()))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if "stages.2" not in k},
            r"does not fit convnextv2_atto:\n.*missing: stages.2",
        ),
        (lambda s: s | {"stages.9.extra": torch.ones(2)}, "1 unexpected: stages.9.extra"),
        (
            lambda s: s | {"stem.0.bias": torch.ones(41)},
            r"1 of another shape: stem.0.bias is \(41,\), expected \(40,\)",
        ),
        (lambda s: s | {"stem.0.bias": torch.full((40,), torch.nan)}, "not finite .*stem.0.bias"),
        (
            lambda s: s | {"stem.0.bias": torch.ones(40, dtype=torch.int32)},
            "expected floating-point.*int32 in stem.0.bias",
        ),
        (lambda s: {f"net.{k}": v for k, v in s.items()}, "does not fit convnextv2_atto.*(prefix|conversion fails)"),
        (lambda s: {"net.weight": torch.ones(3, 3)}, "does not fit convnextv2_atto.*net.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, message: str, state, tmp_path: Path) -> None:
    file = tmp_path / "net.pth"
    torch.save(change(dict(state)), file)
    with pytest.raises(WeightsError, match=f"(?s)net.pth.*{message}"):
        load_backbone(f"timm/{NET}", weights=file)


def test_a_file_of_another_model_is_refused(tmp_path: Path, state) -> None:
    save_file(random_state(VIT), tmp_path / "vit.safetensors")
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match=r"vit.safetensors does not fit .*blocks.0.attn"):
        load_backbone(f"timm/{NET}", weights=tmp_path / "vit.safetensors")
    with pytest.raises(WeightsError, match=r"(?s)net.safetensors does not fit .*missing: blocks.0"):
        load_backbone(f"timm/{VIT}", weights=tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match=r"no tensor's name starts with 'encoder.'"):
        load_backbone(f"timm/{NET}", weights=tmp_path / "net.safetensors", prefix="encoder.")
    with pytest.raises(WeightsError, match=r"no weights .*net.safetensor'.*Did you mean '.*net.safetensors'"):
        load_backbone(f"timm/{NET}", weights=tmp_path / "net.safetensor")


def test_what_overflows_in_float16_is_refused(state, tmp_path: Path) -> None:
    save_file(state | {"stem.0.bias": torch.full((40,), 1e6)}, tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match=r"stem.0.bias overflows in float16"):
        load_backbone(f"timm/{NET}", weights=tmp_path / "net.safetensors", dtype=torch.float16)


@pytest.fixture
def offline_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub's client in its offline mode, over an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_pretrained_weights_come_through_the_hubs_cache(offline_hub: Path, state) -> None:
    repository = offline_hub / f"models--timm--{NET}.fcmae"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    save_file(state, repository / "snapshots" / "abc" / "model.safetensors")
    backbone = load_backbone(f"timm/{NET}.fcmae", weights="pretrained")
    assert backbone.fingerprint == fingerprint(used(state))
    assert backbone.describe()["weights"] == f"timm/{NET}.fcmae"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"timm/{NET}.fcmae", f"'{NET}.fcmae' could not be fetched from timm/{NET}.fcmae .*give its path as weights"),
        ("timm/convnextv2_small", "timm has no pretrained weights for 'convnextv2_small': give a file, or 'random'"),
    ],
)
def test_without_a_network_the_error_says_what_to_do(name: str, message: str, offline_hub: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        load_backbone(name, weights="pretrained")
