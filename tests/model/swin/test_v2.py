"""SwinV2 against two independent implementations, and everything about it that they do not have."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import nn

from permafrost.model.errors import BackboneError
from permafrost.model.spec import SWINV2_SIZES, SwinV2Size
from permafrost.model.swin import parts as swin_parts, v2 as swin
from permafrost.model.swin.v2 import SwinV2, SwinV2Classifier, WindowAttention

SMALL = SwinV2Size(16, (2, 2, 2, 2), (1, 2, 2, 4), extra_norm_interval=2)


def from_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm keeps the step between stages at the start of the next one."""
    moved = {}
    for key, value in state.items():
        if not key.startswith("norm."):
            moved[re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)] = value
    return moved


@pytest.mark.parametrize(
    ("theirs", "name", "window", "pretrained", "side"),
    [
        ("swinv2_tiny_window8_256", "swinv2_tiny", 8, (8, 8, 8, 8), 256),
        ("swinv2_tiny_window16_256", "swinv2_tiny", 16, (16, 16, 16, 8), 256),
        # Stage 4 of a model trained at 192 pixels had a window of 6: here the map has 8 and the coordinates stay.
        ("swinv2_base_window12to16_192to256", "swinv2_base", 16, (12, 12, 12, 6), 256),
        ("swinv2_small_window8_256", "swinv2_small", 8, (8, 8, 8, 8), 256),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("swinv2_small_window16_256", "swinv2_small", 16, (16, 16, 16, 8), 256),
                ("swinv2_base_window8_256", "swinv2_base", 8, (8, 8, 8, 8), 256),
                ("swinv2_base_window16_256", "swinv2_base", 16, (16, 16, 16, 8), 256),
                ("swinv2_base_window12_192", "swinv2_base", 12, (12, 12, 12, 6), 192),
                ("swinv2_base_window12to24_192to384", "swinv2_base", 24, (12, 12, 12, 6), 384),
                ("swinv2_large_window12_192", "swinv2_large", 12, (12, 12, 12, 6), 192),
                ("swinv2_large_window12to16_192to256", "swinv2_large", 16, (12, 12, 12, 6), 256),
                ("swinv2_large_window12to24_192to384", "swinv2_large", 24, (12, 12, 12, 6), 384),
            )
        ),
    ],
)
def test_equals_timm(randomise, relative_error, theirs, name, window, pretrained, side) -> None:
    reference = randomise(timm.create_model(theirs, pretrained=False, num_classes=0)).eval()
    model = SwinV2(name, window_size=window, pretrained_window_size=pretrained).eval()
    model.load_state_dict(from_timm(reference.state_dict()))
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(images)
        expected = reference.forward_intermediates(images, intermediates_only=True)
    errors = [relative_error(ours, other) for ours, other in zip(found, expected, strict=True)]
    assert max(errors) < 1e-5, errors


def test_every_v2_of_timm_is_compared() -> None:
    (parameters,) = [mark for mark in test_equals_timm.pytestmark if mark.name == "parametrize"]
    compared = {getattr(row, "values", row)[0] for row in parameters.args[1]}
    assert compared == {name for name in timm.list_models("swinv2_*") if not name.startswith("swinv2_cr_")}


def test_equals_transformers(randomise, relative_error) -> None:
    from transformers import Swinv2Backbone, Swinv2Config

    size = SwinV2Size(32, (2, 2, 4, 2), (1, 2, 4, 8))
    config = Swinv2Config(
        image_size=192,
        embed_dim=size.embed_dim,
        depths=list(size.depths),
        num_heads=list(size.num_heads),
        window_size=6,
        pretrained_window_sizes=[5, 5, 5, 5],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    reference = randomise(Swinv2Backbone(config)).eval()
    model = SwinV2(size, window_size=6, pretrained_window_size=5).eval()
    model.load_state_dict(from_transformers(reference.state_dict()))
    images = torch.randn(2, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = model(images), reference(images).feature_maps
    errors = [relative_error(ours, other) for ours, other in zip(found, expected, strict=True)]
    assert max(errors) < 1e-5, errors


def from_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renames = (
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("embeddings.norm", "patch_embed.norm"),
        ("encoder.layers", "layers"),
        ("attention.self.continuous_position_bias_mlp", "attn.cpb_mlp"),
        ("attention.self.logit_scale", "attn.logit_scale"),
        ("attention.output.dense", "attn.proj"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("attention.self.query.bias", "attn.q_bias"),
        ("attention.self.value.bias", "attn.v_bias"),
    )
    moved = {}
    for key, value in state.items():
        for old, new in renames:
            key = key.replace(old, new)
        moved[key] = value
    for key in [key for key in moved if key.endswith("attention.self.query.weight")]:
        parts = [moved.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        moved[key.replace("attention.self.query", "attn.qkv")] = torch.cat(parts)
    return moved


def test_state_dict_has_the_official_names_and_no_buffers() -> None:
    depths = SWINV2_SIZES["swinv2_tiny"].depths
    expected = {f"patch_embed.{part}.{kind}" for part in ("proj", "norm") for kind in ("weight", "bias")}
    expected |= {f"{part}.{kind}" for part in ("norm", "head") for kind in ("weight", "bias")}
    for stage, depth in enumerate(depths):
        if stage < 3:
            expected |= {f"layers.{stage}.downsample.{n}" for n in ("reduction.weight", "norm.weight", "norm.bias")}
        for block in range(depth):
            modules = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2", "attn.cpb_mlp.0")
            names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
            attention = ("logit_scale", "q_bias", "v_bias", "qkv.weight", "cpb_mlp.2.weight")
            names += [f"attn.{name}" for name in attention]
            expected |= {f"layers.{stage}.blocks.{block}.{name}" for name in names}
    with torch.device("meta"):
        classifier = SwinV2Classifier("swinv2_tiny", num_classes=1000)
    assert set(classifier.state_dict()) == expected
    assert classifier.state_dict()["layers.1.blocks.0.attn.logit_scale"].shape == (6, 1, 1)
    assert not list(classifier.buffers())


@pytest.mark.parametrize(
    ("name", "backbone", "classifier"),
    [
        # Millions; the published counts are of the classifiers: 28, 50, 88, 197, 658 M, 1.06 B and 3.0 B.
        ("swinv2_tiny", 27.58, 28.35),
        ("swinv2_small", 48.96, 49.73),
        ("swinv2_base", 86.89, 87.92),
        ("swinv2_large", 195.20, 196.74),
        ("swinv2_huge", 655.2, 658.0),
        ("swinv2_giant_1b", 1061.0, 1064.6),
        ("swinv2_giant", 2997.8, 3001.9),
    ],
)
def test_parameter_counts(name: str, backbone: float, classifier: float) -> None:
    with torch.device("meta"):
        models = SwinV2(name), SwinV2Classifier(name, num_classes=1000)
    counts = [sum(p.numel() for p in model.parameters()) / 1e6 for model in models]
    tolerance = 0.05 if backbone > 500 else 0.005  # of the digits given
    assert counts == pytest.approx([backbone, classifier], abs=tolerance)


def test_giant_counts_to_the_last_parameter() -> None:
    """A sum over the layers of the paper's table: no final norm, no classifier, extra norms every 6 blocks."""
    hidden = 512
    total = 3 * 4 * 4 * 512 + 512 + 2 * 512
    for stage, depth in enumerate((2, 2, 42, 4)):
        width, heads = 512 * 2**stage, 16 * 2**stage
        attention = 3 * width * width + 2 * width + width * width + width + heads + 2 * hidden + hidden + hidden * heads
        total += depth * (attention + 2 * 4 * width * width + 4 * width + width + 4 * width)
        total += (depth // 6) * 2 * width
        total += 4 * width * 2 * width + 4 * width if stage < 3 else 0
    with torch.device("meta"):
        giant = SwinV2("swinv2_giant")
    assert sum(p.numel() for p in giant.parameters()) == total
    assert round(total / 1e6, 1) == 2997.8


def test_extra_norms_are_counted_within_a_stage() -> None:
    with torch.device("meta"):
        giant = SwinV2("swinv2_giant")
        wide = SwinV2("swinv2_nano", extra_norm_interval=2)
    names = [name for name in giant.state_dict() if name.endswith("enorm.weight")]
    assert names == [f"layers.2.blocks.{block}.enorm.weight" for block in (5, 11, 17, 23, 29, 35, 41)]
    names = [name for name in wide.state_dict() if name.endswith("enorm.weight")]
    assert names == [f"layers.{s}.blocks.{b}.enorm.weight" for s, b in ((0, 1), (1, 1), (2, 1), (2, 3), (3, 1))]


def test_windows_are_clipped_stage_by_stage(monkeypatch) -> None:
    seen = []
    original = WindowAttention.forward

    def spy(self, x, window, shift) -> torch.Tensor:
        seen.append((tuple(x.shape[1:3]), window, shift))
        return original(self, x, window, shift)

    monkeypatch.setattr(WindowAttention, "forward", spy)
    model = SwinV2(SMALL, window_size=(8, 8, 8, 8)).eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, 72, 200))
    # A stage whose shorter side is no longer than the window takes that side as its window and does not shift.
    maps = ((18, 50), 8, 4), ((9, 25), 8, 4), ((5, 13), 5, 0), ((3, 7), 3, 0)
    assert seen == [entry for size, window, shift in maps for entry in ((size, window, 0), (size, window, shift))]


def test_smallest_image_and_window_of_one_are_finite(randomise) -> None:
    model = randomise(SwinV2(SMALL, window_size=1)).eval()
    with torch.no_grad():
        for size in ((4, 4), (5, 37)):
            assert all(torch.isfinite(feature).all() for feature in model(torch.randn(2, 3, *size)))


def test_outputs_follow_the_spec_on_any_size(randomise) -> None:
    model = randomise(SwinV2(SMALL, window_size=4)).eval()
    for height, width in ((64, 64), (50, 91), (7, 130)):
        with torch.no_grad():
            features = model(torch.randn(2, 3, height, width))
        for feature, channels, stride in zip(features, model.spec.channels, model.spec.strides, strict=True):
            assert feature.shape == (2, channels, -(-height // stride), -(-width // stride))
            assert feature.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(61, 90), (64, 64)])
def test_folded_equals_unfolded(randomise, size) -> None:
    model = randomise(SwinV2(SMALL, window_size=(6, 5, 4, 3), pretrained_window_size=(5, 4, 4, 3))).double().eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        model.fold()
        first, second = model(images), model(images)
    attention = model.layers[0].blocks[0].attn
    assert list(attention.folded) == [6]
    assert attention.folded[6][2].shape == (1, 121)
    for one, two, three in zip(expected, first, second, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    model.float()
    assert not attention.folded
    with torch.no_grad():
        assert model(images.float())[3].dtype == torch.float32


def test_many_windows_are_attended_in_several_calls(randomise, monkeypatch) -> None:
    model = randomise(SwinV2(SMALL, window_size=4)).double().eval()
    images = torch.randn(2, 3, 61, 90, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        monkeypatch.setattr(swin_parts, "MAX_WINDOWS_PER_CALL", 7)
        found = model(images)
    assert all(torch.allclose(one, two, rtol=0, atol=1e-12) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scale_to_length_of_tiny_and_of_zero_vectors(dtype) -> None:
    """Squares of the tiny ones vanish in half precision; zero, the key of a padded token, stays zero."""
    vectors = (torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * 1e-4).to(dtype)
    vectors[2] = 0
    vectors.requires_grad_()
    scaled = swin.scale_to_length(vectors, 10.0)
    assert scaled.dtype == dtype
    assert scaled.float().norm(dim=-1).tolist() == pytest.approx([10, 10, 0, 10, 10], rel=2e-3)
    scaled.float().sum().backward()
    assert torch.isfinite(vectors.grad).all()
    assert not vectors.grad[2].any()


def test_gradients_are_those_of_the_loss(randomise) -> None:
    """A central difference along a random direction through all parameters, on a padded and shifted size."""
    torch.manual_seed(0)
    model = randomise(SwinV2Classifier(SMALL, num_classes=5, window_size=(6, 5, 2, 2))).double()
    images = torch.randn(2, 3, 61, 90, dtype=torch.float64)
    labels = torch.tensor([1, 4])

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    loss().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    # A head beyond the clamp of its logit scale has no gradient there; everything else has one.
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if "logit_scale" not in n)
    direction = {p: torch.randn_like(p) for p in model.parameters()}
    slope = sum((p.grad * d).sum() for p, d in direction.items())
    values, step = [], 1e-6
    with torch.no_grad():
        for move in (step, -2 * step):
            for p, d in direction.items():
                p.add_(d, alpha=move)
            values.append(loss())
    assert float((values[0] - values[1]) / (2 * step)) == pytest.approx(float(slope), rel=1e-5)


def test_trains_from_its_initial_values() -> None:
    """Blocks start as the identity: their norms are zero, and a step moves them."""
    torch.manual_seed(0)
    model = SwinV2Classifier(SMALL, num_classes=3, window_size=4, drop_path_rate=0.1).train()
    assert all(not block.norm1.weight.any() for stage in model.layers for block in stage.blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_trains_under_autocast(randomise, relative_error) -> None:
    torch.manual_seed(0)
    model = randomise(SwinV2(SMALL, window_size=4))
    for stage in model.layers:
        for block in stage.blocks:
            nn.init.constant_(block.attn.logit_scale, 1.0)
    images = torch.randn(2, 3, 40, 40)
    expected = model(images)[-1]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images)[-1]
    assert relative_error(found, expected) < 0.05
    found.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_drop_path_follows_the_generator_and_is_off_in_eval(randomise) -> None:
    model = randomise(SwinV2(SMALL, window_size=4, drop_path_rate=0.5))
    images = torch.randn(4, 3, 32, 32)

    def run(seed: int) -> torch.Tensor:
        return model(images, generator=torch.Generator().manual_seed(seed))[-1]

    with torch.no_grad():
        model.train()
        assert torch.equal(run(0), run(0))
        assert not torch.equal(run(0), run(1))
        state = torch.get_rng_state()
        run(0)
        assert torch.equal(state, torch.get_rng_state())
        model.eval()
        plain = SwinV2(SMALL, window_size=4).train()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(run(0), plain(images)[-1])


def test_drop_path_rates_rise_linearly_and_keep_the_mean() -> None:
    model = SwinV2(SMALL, window_size=4, drop_path_rate=0.4).train()
    scales = model._draw_branch_scales(torch.empty(20_000, 3, 4, 4), torch.Generator().manual_seed(0))
    dropped = [float((scale == 0).float().mean()) for scale in scales]
    assert dropped == pytest.approx([0.4 * block / 7 for block in range(8)], abs=0.01)
    assert [float(scale.mean()) for scale in scales] == pytest.approx([1.0] * 8, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "swinv2_gigantic"}, "sizes are swinv2_nano"),
        ({"size": "swinv2_nano", "drop_path_rate": 1.0}, "drop_path_rate"),
        ({"size": "swinv2_nano", "window_size": (8, 8, 8)}, "window_size"),
        ({"size": "swinv2_nano", "pretrained_window_size": 0}, "pretrained_window_size"),
        ({"size": "swinv2_nano", "extra_norm_interval": -2}, "extra_norm_interval"),
    ],
)
def test_construction_errors(arguments: dict, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        SwinV2(**arguments)


def test_image_errors() -> None:
    model = SwinV2(SMALL)
    with pytest.raises(BackboneError, match="smaller than one patch"):
        model(torch.zeros(1, 3, 3, 64))
    with pytest.raises(BackboneError, match="shape"):
        model(torch.zeros(1, 1, 64, 64))
    with pytest.raises(BackboneError, match="num_classes"):
        SwinV2Classifier(SMALL, num_classes=0)
