"""FrozenBackbone: what a head may rely on."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from permafrost.model import BackboneError, FrozenBackbone, load_backbone
from permafrost.model.precision import check_dtype


@pytest.fixture(scope="module")
def backbone() -> FrozenBackbone:
    return load_backbone("swinv2_nano", weights="random", window_size=6)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 70, 101), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_follow_the_spec(backbone, images) -> None:
    features = backbone(images)
    assert isinstance(features, tuple)
    assert backbone.spec.channels == (32, 64, 128, 256)
    assert backbone.spec.strides == (4, 8, 16, 32)
    for feature, channels, stride in zip(features, backbone.spec.channels, backbone.spec.strides, strict=True):
        assert feature.shape == (2, channels, -(-70 // stride), -(-101 // stride))
        assert feature.is_contiguous(memory_format=torch.channels_last)
        assert feature.dtype == backbone.dtype == torch.float32
        assert feature.std() > 0.1


def test_features_are_the_networks_on_normalised_pixels(backbone, images, relative_error) -> None:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.equal(backbone.mean, mean)
    assert torch.equal(backbone.std, std)
    reference = copy.deepcopy(backbone.network).double()
    expected = reference((images / 255.0 - mean[:, None, None]).double() / std[:, None, None])
    for found, other in zip(backbone(images), expected, strict=True):
        assert relative_error(found, other) < 1e-5


def test_uint8_equals_floats_in_0_to_1(backbone, images) -> None:
    for one, two in zip(backbone(images), backbone(images.float() / 255.0), strict=True):
        assert torch.equal(one, two)


def test_a_clip_is_a_batch_of_its_frames(backbone) -> None:
    random = torch.Generator().manual_seed(1)
    clips = torch.randint(0, 256, (2, 3, 3, 40, 61), dtype=torch.uint8, generator=random)
    for found, expected in zip(backbone(clips), backbone(clips.flatten(0, 1)), strict=True):
        assert found.shape == (2, 3, *expected.shape[1:])
        assert torch.equal(found.flatten(0, 1), expected)
    with pytest.raises(BackboneError, match=r"clips of shape \(B, T, 3, H, W\), found \(2, 0, 3, 40, 61\)"):
        backbone(clips[:, :0])


@pytest.mark.parametrize("max_images", [1, 2, 4, 5, 6, 100])
def test_passes_bound_the_memory_and_change_nothing_else(backbone, max_images: int) -> None:
    random = torch.Generator().manual_seed(2)
    clips = torch.randint(0, 256, (2, 3, 3, 64, 64), dtype=torch.uint8, generator=random)
    seen = []
    hook = backbone.network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    expected = backbone(clips)
    chunked = copy.deepcopy(backbone)
    chunked.max_images = max_images
    seen.clear()
    found = chunked(clips)
    hook.remove()
    assert seen == [min(max_images, 6 - start) for start in range(0, 6, max_images)]
    for one, two in zip(found, expected, strict=True):
        assert one.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert one.is_contiguous() == two.is_contiguous()
        # A matrix product may sum in another order when its batch is smaller.
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(one, two) for one, two in zip(found, chunked(clips)))


def test_frames_embedded_together_are_an_inflated_convolution(backbone) -> None:
    inflated = copy.deepcopy(backbone)
    inflated.inflate_patches(2)
    random = torch.Generator().manual_seed(3)
    clips = torch.randint(0, 256, (2, 4, 3, 40, 61), dtype=torch.uint8, generator=random)
    seen = []
    hook = inflated.network.patch_embed.proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    found = inflated(clips)
    hook.remove()
    assert [one.shape[:2] for one in found] == [(2, 2)] * 4
    # Independently: a 3-D convolution over (T, H, W), as Video-Swin has it.
    weight = backbone.network.patch_embed.proj.weight
    pixels = (clips / 255 - backbone.mean[:, None, None]) / backbone.std[:, None, None]
    volume = nn.functional.pad(pixels.transpose(1, 2), (0, 3))
    bias = backbone.network.patch_embed.proj.bias
    whole = nn.functional.conv3d(volume, weight[:, :, None].expand(-1, -1, 2, -1, -1) / 2, bias, stride=(2, 4, 4))
    torch.testing.assert_close(seen[0], whole.transpose(1, 2).flatten(0, 1), rtol=1e-4, atol=1e-5)
    still = clips[:, :1].expand(-1, 4, -1, -1, -1)
    for one, two in zip(inflated(still), backbone(clips[:, :1]), strict=True):
        torch.testing.assert_close(one, two.expand_as(one), rtol=1e-4, atol=1e-4)
    for wrong in (clips[:, :3], clips[:, 0]):
        with pytest.raises(BackboneError, match=r"backbone\.patch_frames is 2: clips"):
            inflated(wrong)
    assert inflated.fingerprint == backbone.fingerprint


def test_features_serve_a_heads_backward(backbone, images) -> None:
    head = nn.Conv2d(32, 4, 1)
    feature = backbone(images)[0]
    assert not feature.requires_grad
    assert not feature.is_inference()
    head(feature).square().mean().backward()
    assert head.weight.grad.abs().sum() > 0


def test_nothing_trains_and_train_changes_nothing(backbone, images) -> None:
    before = [feature.clone() for feature in backbone(images)]
    assert backbone.train() is backbone
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    with pytest.raises(BackboneError, match="no trainable parameters"):
        backbone.requires_grad_()
    assert backbone.requires_grad_(False) is backbone
    nn.ModuleDict({"backbone": backbone, "head": nn.Linear(1, 1)}).train()
    assert not any(module.training for module in backbone.modules())
    assert all(torch.equal(one, two) for one, two in zip(before, backbone(images), strict=True))


def test_autocast_around_it_changes_nothing(backbone, images) -> None:
    expected = backbone(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = backbone(images)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_checksum_sees_one_bit_and_one_swap(backbone, images) -> None:
    changed = copy.deepcopy(backbone)
    assert changed.checksum() == backbone.checksum()
    backbone(images)
    assert changed.checksum() == backbone.checksum()
    weight = changed.network.layers[2].blocks[1].mlp.fc1.weight
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] ^= 1
    assert changed.checksum() != backbone.checksum()
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] ^= 1
        assert changed.checksum() == backbone.checksum()
        weight[[0, 1]] = weight[[1, 0]]
    assert changed.checksum() != backbone.checksum()
    assert changed.fingerprint == backbone.fingerprint


def test_dtype_is_fixed_at_loading_and_precision_kept_where_it_is_free(images, relative_error) -> None:
    expected = load_backbone("swinv2_nano", weights="random", dtype=torch.float64)(images)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.04), (torch.float16, 0.005)):
        backbone = load_backbone("swinv2_nano", weights="random", dtype=dtype)
        features = backbone(images)
        assert backbone.dtype == dtype
        assert all(feature.dtype == dtype for feature in features)
        assert max(relative_error(*pair) for pair in zip(features, expected, strict=True)) < tolerance
        for name, parameter in backbone.named_parameters():
            precise = "cpb_mlp" in name or "logit_scale" in name
            assert parameter.dtype == (torch.float32 if precise else dtype), name
    for cast in (backbone.float, backbone.double, backbone.half, lambda: backbone.to(torch.bfloat16)):
        with pytest.raises(BackboneError, match="chosen when it is loaded"):
            cast()
    assert backbone.to("cpu").dtype == torch.float16


def test_moving_drops_folded_constants(images) -> None:
    backbone = load_backbone("swinv2_nano", weights="random")
    expected = backbone(images)
    attention = backbone.network.layers[0].blocks[0].attn
    assert attention.folded
    backbone.to("cpu")
    assert attention.folded == {}
    assert all(torch.equal(one, two) for one, two in zip(backbone(images), expected, strict=True))


def test_default_dtype_on_a_cpu_is_float32_and_describe_says_why(backbone) -> None:
    described = backbone.describe()
    assert described["dtype"] == "float32"
    assert "cpu" in described["dtype_reason"]
    assert described["window_size"] == described["pretrained_window_size"] == (6, 6, 6, 6)
    assert described["num_parameters"] == backbone.num_parameters == sum(p.numel() for p in backbone.parameters())
    assert described["fingerprint"] == backbone.fingerprint
    json.dumps(described)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 64, 64, dtype=torch.uint8), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 4, 64, 64, dtype=torch.uint8), r"\(B, 3, H, W\)"),
        (torch.zeros(0, 3, 64, 64, dtype=torch.uint8), r"\(B, 3, H, W\)"),
        ([torch.zeros(3, 64, 64)], "list"),
        (torch.zeros(1, 3, 64, 3, dtype=torch.uint8), "smaller than one patch"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), "int64"),
        (torch.full((1, 3, 64, 64), 200.0), r"must lie in \[0, 1\], found 200"),
        (torch.full((1, 3, 64, 64), -2.1), r"must lie in \[0, 1\]"),
        (torch.full((1, 3, 64, 64), torch.nan), r"must lie in \[0, 1\]"),
    ],
)
def test_bad_images(bad, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        load_backbone("swinv2_nano", weights="random")(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "swinv2_nanoo"}, "Did you mean 'swinv2_nano'"),
        ({"taps": (1, 3)}, "taps is .*swinv2_nano always gives all its stages"),
        ({"tensor_group": object()}, "tensor parallelism"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"device": "gpu"}, "There is no device 'gpu'"),
        ({"dtype": torch.int8}, "dtype is 'int8': give one of"),
        ({"dtype": "bf16"}, "dtype is 'bf16': give one of"),
        ({"windows": 8}, "no option 'windows': did you mean window_size"),
        ({"window_size": (8, 8)}, "window_size"),
        ({"extra_norm_interval": -1}, "extra_norm_interval"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        load_backbone(**({"name": "swinv2_nano", "weights": "random"} | arguments))


def test_weights_must_be_given() -> None:
    with pytest.raises(TypeError, match="weights"):
        load_backbone("swinv2_nano")


@pytest.mark.gpu
def test_on_cuda(images, relative_error) -> None:
    expected = load_backbone("swinv2_tiny", weights="random", dtype=torch.float64)(images)
    backbone = load_backbone("swinv2_tiny", weights="random", device="cuda")
    assert backbone.dtype == torch.bfloat16
    features = backbone(images)
    assert all(feature.is_cuda and feature.is_contiguous(memory_format=torch.channels_last) for feature in features)
    assert max(relative_error(f.cpu(), e) for f, e in zip(features, expected, strict=True)) < 0.04
    precise = load_backbone("swinv2_tiny", weights="random", device="cuda", dtype=torch.float32)
    assert max(relative_error(f.cpu(), e) for f, e in zip(precise(images), expected, strict=True)) < 1e-3
    assert precise.fingerprint == backbone.fingerprint == load_backbone("swinv2_tiny", weights="random").fingerprint
    assert precise.checksum() == load_backbone("swinv2_tiny", weights="random").checksum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_cpu_computes_in_every_dtype_that_a_recipe_can_choose(dtype: torch.dtype) -> None:
    check_dtype(dtype, torch.device("cpu"))


def test_a_dtype_that_the_device_lacks_is_told() -> None:
    """A CPU stores eight-bit floats and has no arithmetic for them."""
    with pytest.raises(BackboneError, match=r"cannot compute in float8_e4m3fn on cpu \(.*\): choose another dtype"):
        check_dtype(torch.float8_e4m3fn, torch.device("cpu"))
