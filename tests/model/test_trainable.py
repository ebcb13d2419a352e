"""A base network that learns: its gradients, its drop path, and that it starts as the frozen one."""

from __future__ import annotations

import pytest
import timm
import torch

from permafrost.data.types import SampleKey
from permafrost.model import build_backbone, load_backbone
from permafrost.model.config import BackboneConfig
from permafrost.model.errors import BackboneError
from permafrost.model.swin.drop_path import draw_kept
from permafrost.model.trainable import TrainableBackbone

NAMES = ("swinv2_nano", "swin_tiny", "timm/vit_tiny_patch16_224", "timm/convnextv2_atto", "timm/swin_s3_tiny_224")
DROPPING = ("swinv2_nano", "timm/vit_tiny_patch16_224")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(256, (4, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def generators(keys: list[SampleKey]) -> list[torch.Generator]:
    return [key.generator("drop_path") for key in keys]


KEYS = [SampleKey(0, 1, index) for index in range(4)]


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_reaches_every_parameter(name: str, images: torch.Tensor) -> None:
    backbone = load_backbone(name, frozen=False, weights="random").train()
    assert all(parameter.dtype == torch.float32 for parameter in backbone.parameters())
    torch.stack([one.square().mean() for one in backbone(images)]).sum().backward()
    without = [key for key, parameter in backbone.named_parameters() if parameter.grad is None]
    assert not without
    zero = [key for key, parameter in backbone.named_parameters() if not parameter.grad.any()]
    # What a ReLU or a clamp turns off, in a randomly drawn network.
    assert len(zero) <= 0.05 * len(list(backbone.parameters())), zero


@pytest.mark.parametrize("name", NAMES)
def test_in_evaluation_it_is_the_frozen_network(name: str, images: torch.Tensor, relative_error) -> None:
    trainable = load_backbone(name, frozen=False, weights="random", drop_path_rate=0.3).eval()
    frozen = load_backbone(name, weights="random")
    assert trainable.fingerprint == frozen.fingerprint
    assert trainable.spec == frozen.spec
    with torch.no_grad():
        found = trainable(images)
    # Not bitwise: torch shapes a matrix product by whether its factors could get gradients.
    errors = [relative_error(own, other) for own, other in zip(found, frozen(images), strict=True)]
    assert max(errors) < 1e-5


def test_the_frames_of_a_clip_are_images_that_share_its_drop_path(images: torch.Tensor) -> None:
    backbone = load_backbone("swinv2_nano", frozen=False, weights="random", drop_path_rate=0.5).train()
    clips = images[:1].expand(2, 3, -1, -1, -1)
    for one, two in zip(
        backbone(clips, generators(KEYS[:2])), backbone(images[:1].expand(2, -1, -1, -1), generators(KEYS[:2]))
    ):
        assert one.shape == (2, 3, *two.shape[1:])
        torch.testing.assert_close(one, two[:, None].expand_as(one), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one[0], one[1], atol=1e-2), "the clips have draws of their own"
    with pytest.raises(BackboneError, match=r"max_images is 8, but backbone.frozen is False"):
        BackboneConfig(name="swinv2_nano", weights="random", frozen=False, max_images=8)
    with pytest.raises(BackboneError, match=r"max_images is 0: give at least 1"):
        BackboneConfig(name="swinv2_nano", weights="random", max_images=0)


def test_an_inflated_embedding_learns_each_frame_by_itself() -> None:
    config = BackboneConfig(name="swinv2_nano", weights="random", frozen=False, patch_frames=2)
    backbone = build_backbone(config).train()
    clips = torch.randint(0, 256, (1, 2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    backbone(clips, generators(KEYS[:1]))[-1].square().sum().backward()
    gradient = backbone.network.patch_embed.proj.weight.grad
    assert gradient.shape[1] == 6
    assert not torch.allclose(gradient[:, :3], gradient[:, 3:])
    with pytest.raises(BackboneError, match=r"backbone\.patch_frames is 2, but timm/"):
        BackboneConfig(name="timm/resnet18", weights="random", patch_frames=2)
    with pytest.raises(BackboneError, match=r"backbone\.patch_frames is 0"):
        BackboneConfig(name="swinv2_nano", weights="random", patch_frames=0)


def test_constants_follow_the_parameters(images: torch.Tensor) -> None:
    backbone = load_backbone("swinv2_nano", frozen=False, weights="random").eval()
    assert "folded" not in backbone.describe()["attention"]
    with torch.no_grad():
        before = backbone(images)[0]
        backbone.network.layers[0].blocks[0].attn.cpb_mlp[2].weight.mul_(-1)
        assert not torch.equal(backbone(images)[0], before)


@pytest.mark.parametrize("name", DROPPING)
def test_drop_path_is_a_function_of_the_sample(name: str, images: torch.Tensor, relative_error) -> None:
    backbone = load_backbone(name, frozen=False, weights="random", drop_path_rate=0.5).train()
    with torch.no_grad():
        whole = backbone(images, generators(KEYS))[-1]
        again = backbone(images, generators(KEYS))[-1]
        halves = [backbone(images[part], generators(KEYS[part]))[-1] for part in (slice(0, 1), slice(1, 4))]
        other_epoch = backbone(images, generators([SampleKey(0, 2, key.index) for key in KEYS]))[-1]
        kept = backbone.eval()(images)[-1]
    assert torch.equal(whole, again)
    assert relative_error(torch.cat(halves), whole) < 1e-5
    assert relative_error(other_epoch, whole) > 1e-2
    assert relative_error(kept, whole) > 1e-2


def test_no_global_generator_is_asked(images: torch.Tensor) -> None:
    # timm's own Swins drop branches unless told otherwise.
    for name, rate in (("timm/swin_s3_tiny_224", 0.0), ("swinv2_nano", 0.4), ("timm/vit_tiny_patch16_224", 0.4)):
        backbone = load_backbone(name, frozen=False, weights="random", drop_path_rate=rate).train()
        assert not any(isinstance(module, timm.layers.DropPath) for module in backbone.modules())
        before = torch.get_rng_state()
        backbone(images, generators(KEYS))
        assert torch.equal(torch.get_rng_state(), before), name


def test_branches_are_dropped_as_often_as_asked() -> None:
    keep = torch.tensor([1.0, 0.75, 0.5])[:, None]
    kept = draw_kept(keep, 4000, generators([SampleKey(0, 0, index) for index in range(4000)]))
    assert kept.shape == (3, 4000)
    assert kept.float().mean(1).tolist() == pytest.approx([1.0, 0.75, 0.5], abs=0.03)


def test_frames_of_a_clip_share_their_draw() -> None:
    keep = torch.tensor([0.5, 0.5])[:, None]
    kept = draw_kept(keep, 6, generators(KEYS[:2]))
    assert torch.equal(kept, draw_kept(keep, 2, generators(KEYS[:2])).repeat_interleave(3, dim=1))


@pytest.mark.parametrize("name", DROPPING)
def test_recomputed_activations_give_the_same_gradients(name: str, images: torch.Tensor) -> None:
    gradients, saved = {}, {}
    for again in (False, True):
        backbone = load_backbone(
            name, frozen=False, weights="random", drop_path_rate=0.3, checkpoint_activations=again
        ).train()
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()  # noqa: B023 - called at once
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = torch.stack([one.square().mean() for one in backbone(images, generators(KEYS))]).sum()
        saved[again] = sum(sizes.values())
        loss.backward()
        gradients[again] = {key: parameter.grad for key, parameter in backbone.named_parameters()}
    for key, gradient in gradients[False].items():
        assert torch.allclose(gradients[True][key], gradient, rtol=1e-5, atol=1e-7), key
    assert saved[True] < 0.6 * saved[False]


def test_batch_norms_and_dropout_stay_as_in_evaluation(images: torch.Tensor) -> None:
    backbone = load_backbone("timm/resnet10t", frozen=False, weights="random").train()
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    backbone(images)
    assert all(torch.equal(value, before[key]) for key, value in backbone.named_buffers())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "bfloat16"}, r"backbone\.dtype is 'bfloat16'.*engine\.precision"),
        ({"drop_path_rate": 1.0}, r"backbone\.drop_path_rate is 1\.0"),
        ({"learning_rate_factor": 0.0}, r"backbone\.learning_rate_factor is 0\.0.*backbone\.frozen"),
        ({"learning_rate_factor": float("nan")}, r"backbone\.learning_rate_factor is nan"),
        ({"frozen": True, "drop_path_rate": 0.1}, r"backbone\.drop_path_rate is 0\.1, but backbone\.frozen is True"),
        ({"frozen": True, "learning_rate_factor": 0.1}, r"backbone\.learning_rate_factor is 0\.1, but .*frozen"),
        ({"frozen": True, "checkpoint_activations": True}, r"backbone\.checkpoint_activations is True, but .*frozen"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        BackboneConfig(**{"name": "swinv2_nano", "weights": "random", "frozen": False, **fields})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/resnet10t", {"drop_path_rate": 0.1}, "have no place for drop path"),
        ("timm/hiera_tiny_224", {"checkpoint_activations": True}, "cannot compute its blocks twice"),
    ],
)
def test_what_a_timm_model_cannot_do_is_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        load_backbone(name, frozen=False, weights="random", **options)


def test_a_parameter_that_no_gradient_reaches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from permafrost.model.swin.v2 import SwinV2

    forward = SwinV2.forward
    monkeypatch.setattr(SwinV2, "forward", lambda self, images, **given: forward(self, images, **given)[:2])
    with pytest.raises(BackboneError, match=r"do not depend on layers\.1\.downsample\.reduction\.weight.* and others"):
        load_backbone("swinv2_nano", frozen=False, weights="random")


def test_the_recipe_decides_which_is_built() -> None:
    config = BackboneConfig("swinv2_nano", "random", frozen=False, dtype="float64", drop_path_rate=0.1)
    backbone = build_backbone(config)
    assert isinstance(backbone, TrainableBackbone)
    assert {tensor.dtype for tensor in (*backbone.parameters(), *backbone.buffers())} == {torch.float64}
    assert backbone.describe()["drop_path_rate"] == 0.1
