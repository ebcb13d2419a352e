"""timm models behind the frozen contract: timm's own features, any image size, tables that are no weights, bad names."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn as resampled_vit
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.model import BackboneConfig, BackboneError, FrozenBackbone, build_backbone, load_backbone
from permafrost.model.timm.backbone import TimmNetwork

# The smallest member of each family, and the multiple that its images are padded to.
FAMILIES = {
    "vit_small_patch14_dinov2": 14,
    "vit_small_patch16_dinov3": 16,
    "eva02_tiny_patch14_224": 14,
    "convnextv2_atto": 32,
    "hiera_tiny_224": 32,
    "swinv2_cr_tiny_224": 32,
}
SINGLE = [name for name, multiple in FAMILIES.items() if multiple < 32]
# The first two stages of the others are quick to load, and hold a part of each kind.
QUICK = {name: None if name in SINGLE else (0, 1) for name in FAMILIES}


@pytest.fixture(scope="module")
def backbones() -> dict[str, FrozenBackbone]:
    return {name: load_backbone(f"timm/{name}", weights="random") for name in FAMILIES}


def make_images(height: int, width: int, *, number: int = 2) -> Tensor:
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(0))


def normalised(images: Tensor, model: nn.Module) -> Tensor:
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    return (images - mean) / std


def timm_twin(name: str, backbone: FrozenBackbone, height: int, width: int) -> nn.Module:
    """timm's own model for one fixed size (a Swin, whose windows would follow it: for any size), with our weights."""
    fixed = {} if name.startswith("convnext") else {"img_size": (height, width)}
    model = timm.create_model(name, **({"dynamic_img_size": True} if "swin" in name else fixed)).eval()
    state = dict(backbone.network.model.state_dict())
    if name.startswith("hiera"):
        grid = state["pos_embed"].unflatten(1, (56, 56)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(height // 4, width // 4), mode="bicubic", antialias=True)
        state["pos_embed"] = grid.flatten(2).transpose(1, 2)
    elif "pos_embed" in state:
        state = resampled_vit(state, model)
    loaded = model.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    assert all(key.startswith(("head.", "norm.", "fc_norm.")) for key in loaded.missing_keys)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_equals_timm_at_whole_multiples(name: str, backbones, relative_error) -> None:
    height, width = 2 * FAMILIES[name], 4 * FAMILIES[name]
    images = make_images(height, width)
    model = timm_twin(name, backbones[name], height, width)
    taps = backbones[name].network.taps
    expected = model.forward_intermediates(normalised(images, model), indices=list(taps), intermediates_only=True)
    found = backbones[name](images)
    assert len(found) == len(expected) == (1 if name in SINGLE else 4)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-6
        assert theirs.std() > 0.1


@torch.no_grad()
def test_hiera_at_its_own_size_equals_timm(relative_error) -> None:
    """With and without a position embedding for each window."""
    for name, side in (("hiera_tiny_224", 224), ("hiera_small_abswin_256", 96)):
        backbone = load_backbone(f"timm/{name}", weights="random:3", taps=(0, 1))
        model = timm.create_model(name, img_size=(side, side)).eval()
        loaded = model.load_state_dict(backbone.network.model.state_dict(), strict=False)
        assert not loaded.unexpected_keys
        images = make_images(side, side, number=1)
        expected = model.forward_intermediates(normalised(images, model), indices=[0, 1], intermediates_only=True)
        assert all(relative_error(*pair) < 1e-6 for pair in zip(backbone(images), expected, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_images_of_any_size_are_padded_with_the_mean_colour(name: str, backbones) -> None:
    backbone, multiple = backbones[name], FAMILIES[name]
    assert backbone.describe()["images_padded_to_multiples_of"] == multiple
    for height, width in ((multiple, 2 * multiple + 1), (backbone.network.min_image_size, 70)):
        images = make_images(height, width)
        sides = [-(-side // multiple) * multiple for side in (height, width)]
        whole = backbone.mean[:, None, None].expand(2, 3, *sides).clone()
        whole[:, :, :height, :width] = images
        for level, padded, stride in zip(backbone(images), backbone(whole), backbone.spec.strides, strict=True):
            rows, columns = -(-height // stride), -(-width // stride)
            assert level.shape[-2:] == (rows, columns)
            assert torch.equal(level, padded[..., :rows, :columns])
            assert level.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", FAMILIES)
def test_spec_and_statistics_are_timms(name: str, backbones) -> None:
    backbone = backbones[name]
    infos = timm.create_model(name).feature_info
    strides = (FAMILIES[name],) if name in SINGLE else (4, 8, 16, 32)
    assert backbone.spec.strides == strides
    assert backbone.spec.channels == tuple(info["num_chs"] for info in list(infos)[-len(strides) :])
    settings = timm.get_pretrained_cfg(name)
    assert torch.equal(backbone.mean, torch.tensor(settings.mean))
    assert torch.equal(backbone.std, torch.tensor(settings.std))
    described = backbone.describe()
    assert json.loads(json.dumps(described))["timm"] == timm.__version__
    assert ("rotary" in described["position_embedding"]) == name.startswith(("eva02", "vit_small_patch16_dinov3"))


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_trains(name: str, backbones) -> None:
    backbone, images = backbones[name], make_images(70, 50)
    before, checksum = [level.clone() for level in backbone(images)], backbone.checksum()
    nn.ModuleDict({"backbone": backbone}).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    levels = backbone(images)
    nn.Conv2d(levels[0].shape[1], 2, 1)(levels[0]).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(one, two) for one, two in zip(before, backbone(images), strict=True))
    assert backbone.to("cpu").checksum() == checksum
    with pytest.raises(BackboneError, match="chosen when it is loaded"):
        backbone.half()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_seed_is_one_network_whatever_is_tapped(name: str, backbones) -> None:
    again = load_backbone(f"timm/{name}", weights="random:0", taps=QUICK[name])
    images = make_images(2 * FAMILIES[name], FAMILIES[name])
    assert all(torch.equal(*pair) for pair in zip(again(images), backbones[name](images), strict=False))
    assert (again.fingerprint == backbones[name].fingerprint) == (QUICK[name] is None)
    first, second = again.network.model.state_dict(), backbones[name].network.model.state_dict()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_another_seed_is_another_network(backbones) -> None:
    other = load_backbone("timm/convnextv2_atto", weights="random:1")
    assert other.fingerprint != backbones["convnextv2_atto"].fingerprint
    mine, theirs = other.network.model.state_dict(), backbones["convnextv2_atto"].network.model.state_dict()
    assert not any(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_of_a_random_network_counts(name: str, backbones) -> None:
    """Each branch moves the features: no norm, layer scale or embedding is an identity or zero by accident."""
    for key, tensor in backbones[name].network.model.state_dict().items():
        assert tensor.abs().min() < tensor.abs().max() or tensor.numel() == 1, key
        assert tensor.float().square().mean().sqrt() > 0.01, key


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_as_close_as_it_can_be(name: str, backbones, relative_error) -> None:
    images = make_images(FAMILIES[name], 2 * FAMILIES[name])
    backbone = load_backbone(f"timm/{name}", weights="random", dtype=torch.bfloat16, taps=QUICK[name])
    assert backbone.dtype == torch.bfloat16
    for found, expected in zip(backbone(images), backbones[name](images), strict=False):
        assert found.dtype == torch.bfloat16
        assert relative_error(found, expected) < 0.04
    for key, table in backbone.network.model.named_buffers():
        assert table.dtype == (torch.float32 if key.startswith("rope") else torch.bfloat16) or "index" in key, key
    assert name not in SINGLE or backbone.fingerprint == backbones[name].fingerprint


def test_the_largest_builds_without_memory() -> None:
    if not all(parameter.is_meta for parameter in TimmNetwork("timm/vit_tiny_patch16_224").parameters()):
        pytest.skip(f"timm {timm.__version__} does not build on the meta device, and this would take 27 GB")
    network = TimmNetwork("timm/vit_7b_patch16_dinov3")
    assert all(parameter.is_meta for parameter in network.parameters())
    # Table 2 of "DINOv3" (Siméoni et al. 2025): 6,716 M parameters; here without the final norm.
    assert round((sum(parameter.numel() for parameter in network.parameters()) + 2 * 4096) / 1e6) == 6716
    assert network.spec.channels == (4096,)
    assert network.spec.strides == (16,)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_small_patch16_dinov3", 1),
        ("eva02_tiny_patch14_224", 13),
        ("swinv2_tiny_window8_256", 36),
    ],
)
def test_tables_that_are_no_weights_survive_the_meta_device(name: str, count: int) -> None:
    built = timm.create_model(name, dynamic_img_size=True)
    backbone = load_backbone(f"timm/{name}", weights="random")
    tables = {key: table for key, table in built.named_buffers() if key not in built.state_dict()}
    found = dict(backbone.network.model.named_buffers())
    assert len(tables) == count
    assert found.keys() == tables.keys()
    assert all(torch.equal(found[key], table) and found[key].dtype == table.dtype for key, table in tables.items())


@torch.no_grad()
def test_taps_choose_layers_and_join_those_of_one_stride(backbones, relative_error) -> None:
    plain = load_backbone("timm/vit_small_patch16_dinov3", weights="random", taps=(2, 5, -1))
    assert (plain.spec.channels, plain.spec.strides) == ((3 * 384,), (16,))
    images = make_images(48, 32)
    model = timm_twin("vit_small_patch16_dinov3", plain, 48, 32)
    expected = model.forward_intermediates(normalised(images, model), indices=[2, 5, 11], intermediates_only=True)
    (found,) = plain(images)
    assert relative_error(found, torch.cat(expected, dim=1)) < 1e-6
    assert torch.equal(found[:, 768:], backbones["vit_small_patch16_dinov3"](images)[0])

    stages = build_backbone(BackboneConfig("timm/convnextv2_atto", "random", taps=[1, 2]))
    assert (stages.spec.channels, stages.spec.strides) == ((80, 160), (8, 16))
    assert stages.describe()["images_padded_to_multiples_of"] == 16
    assert not any(key.startswith("stages.3") for key in stages.network.model.state_dict())
    images = make_images(64, 32)
    assert all(
        torch.equal(*pair) for pair in zip(stages(images), backbones["convnextv2_atto"](images)[1:3], strict=True)
    )


def test_a_strided_stem_is_not_tapped_unless_asked_for() -> None:
    assert TimmNetwork("timm/resnet18").spec.strides == (4, 8, 16, 32)
    assert TimmNetwork("timm/resnet18", taps=(0, 1)).spec.strides == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "timm/vit_smal_patch14_dinov2"}, "has no model .*Did you mean 'timm/vit_small_patch14_dinov2'"),
        ({"name": "timm/convnextv2_atto.fcmaee"}, "no tag 'fcmaee' of 'convnextv2_atto'.*convnextv2_atto.fcmae"),
        ({"name": "timm/levit_128s"}, "timm/levit_128s does not take images of any size: .*128 x 192"),
        ({"window_size": 7}, "window_size is 7, but timm/convnextv2_atto is built as timm"),
        ({"extra_norm_interval": 6}, "extra_norm_interval is 6"),
        ({"taps": (0, 4)}, "has 4 layers to tap: 0 to 3"),
        ({"taps": (2, 1)}, "rising order"),
        ({"taps": (3, -1)}, "each once"),
        ({"taps": ()}, "at least one number of a layer"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        load_backbone(**({"name": "timm/convnextv2_atto", "weights": "random"} | arguments))


class OwnNet(nn.Module):
    """A model as a user may register it with timm: a table of its own, and nothing said about how to compute it."""

    def __init__(self, **options) -> None:
        super().__init__()
        if options:
            raise TypeError(f"unexpected keyword argument {next(iter(options))!r}")
        self.patch = nn.Conv2d(3, 4, 4, stride=4)
        self.register_buffer("table", torch.linspace(1.0, 2.0, 4), persistent=False)
        self.feature_info = [{"num_chs": 4, "reduction": 4}]
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


class OwnNetWithMaps(OwnNet):
    def forward_intermediates(self, images: Tensor, *, indices: list[int], intermediates_only: bool) -> list[Tensor]:
        return [self.patch(images) * self.table[:, None, None]]

    def prune_intermediate_layers(self, indices: list[int], *, prune_norm: bool, prune_head: bool) -> None:
        pass


@timm.models.register_model
def permafrost_own_net(
    pretrained: bool = False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kw
) -> OwnNet:
    return OwnNet(**kw)


@timm.models.register_model
def permafrost_own_maps(
    pretrained: bool = False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kw
) -> OwnNetWithMaps:
    return OwnNetWithMaps(**kw)


def test_a_users_own_model_keeps_its_tables() -> None:
    backbone = load_backbone("timm/permafrost_own_maps", weights="random")
    images, model = make_images(8, 12), backbone.network.model
    (found,) = backbone(images)
    expected = F.conv2d((images - 0.5) / 0.25, model.patch.weight, model.patch.bias, stride=4)
    torch.testing.assert_close(found, expected * torch.tensor([1.0, 4 / 3, 5 / 3, 2.0])[:, None, None])


def test_a_model_without_maps_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"cannot be a backbone: .*no forward_intermediates"):
        load_backbone("timm/permafrost_own_net", weights="random")


def test_images_below_a_patch_are_refused(backbones) -> None:
    with pytest.raises(BackboneError, match=r"13 x 64 pixels are smaller than one patch \(14 x 14\)"):
        backbones["vit_small_patch14_dinov2"](make_images(13, 64))
    assert backbones["vit_small_patch14_dinov2"](make_images(14, 14))[0].shape[-2:] == (1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_on_cuda(name: str, backbones, relative_error) -> None:
    images, expected = make_images(70, 101), backbones[name](make_images(70, 101))
    backbone = load_backbone(f"timm/{name}", weights="random", device="cuda")
    assert backbone.dtype == torch.bfloat16
    assert all(tensor.is_cuda for tensor in (*backbone.parameters(), *backbone.buffers()))
    for found, other in zip(backbone(images), expected, strict=True):
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(found.cpu(), other) < 0.04
    assert backbone.fingerprint == backbones[name].fingerprint
