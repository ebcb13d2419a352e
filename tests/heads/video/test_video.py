"""The video heads: parity with timm's and torch's blocks, seeded drops, losses that do not depend on how a batch is split."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from permafrost.data.types import Batch, SampleKey
from permafrost.data.video.types import ClipTarget
from permafrost.heads import GlobalVideoConfig, HeadError, LinearVideoConfig, TemporalVideoConfig
from permafrost.heads.build import build_head
from permafrost.heads.video.clip_head import ClipHead
from permafrost.heads.video.positions import make_positions
from permafrost.model.spec import FeatureSpec

SPEC = FeatureSpec(channels=(8, 32), strides=(4, 32))
CLASSES = ("left", "right", "up")
CONFIGS = (LinearVideoConfig, TemporalVideoConfig, GlobalVideoConfig)
BLOCKS = (TemporalVideoConfig, GlobalVideoConfig)


def make_head(kind, *, dtype=torch.float64, spread=0.3, **options) -> ClipHead:
    """A head with parameters of a size at which every part decides something."""
    if kind is not LinearVideoConfig:
        options = {"num_blocks": 2, "head_channels": 8, "num_frames": 4, "map_side": 3, **options}
    torch.manual_seed(3)
    head = build_head(kind(**options), spec=SPEC, classes=CLASSES).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return head


def make_clips(
    num_clips=2, *, num_frames=4, size=(3, 3), dtype=torch.float64, first=0
) -> tuple[tuple[torch.Tensor, torch.Tensor], Batch]:
    maps = []
    for index in range(first, first + num_clips):
        random = torch.Generator().manual_seed(index)
        maps.append(torch.randn(num_frames, 32, *size, generator=random, dtype=torch.float64))
    clip = torch.stack(maps).to(dtype)
    targets = [ClipTarget(i, 0, torch.tensor(i % 3)) for i in range(first, first + num_clips)]
    keys = [SampleKey(5, 1, i) for i in range(first, first + num_clips)]
    return (clip[:, :, :8], clip), Batch(torch.zeros(num_clips, num_frames, 3, 8, 8), targets, keys)


def timm_block(block) -> TimmBlock:
    """timm's block with the weights of ours."""
    width = block.norm1.normalized_shape[0]
    theirs = TimmBlock(width, block.num_heads, mlp_ratio=4.0, qkv_bias=True).double().eval()
    theirs.norm1.eps = theirs.norm2.eps = 1e-5
    names = {"projection": "attn.proj", "qkv": "attn.qkv", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    state = {}
    for name, value in block.state_dict().items():
        part, _, kind = name.rpartition(".")
        state[f"{names.get(part, part)}.{kind}"] = value
    theirs.load_state_dict(state)
    return theirs


def torch_block(block) -> nn.TransformerEncoderLayer:
    """torch's encoder layer with the weights of ours."""
    width = block.norm1.normalized_shape[0]
    theirs = nn.TransformerEncoderLayer(
        width, block.num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(block.qkv.weight)
        theirs.self_attn.in_proj_bias.copy_(block.qkv.bias)
        for ours, other in (
            (block.projection, theirs.self_attn.out_proj),
            (block.mlp[0], theirs.linear1),
            (block.mlp[2], theirs.linear2),
            (block.norm1, theirs.norm1),
            (block.norm2, theirs.norm2),
        ):
            other.load_state_dict(ours.state_dict())
    return theirs


@pytest.mark.parametrize("convert", [timm_block, torch_block])
@pytest.mark.parametrize("kind", BLOCKS)
def test_logits_and_gradients_are_those_of_an_independent_implementation_in_float64(kind, convert) -> None:
    head = make_head(kind, dropout=0.0)
    features, batch = make_clips()
    mine = features[-1].clone().requires_grad_()
    logits = head.logits((mine,), batch.keys)
    logits.square().sum().backward()

    x = features[-1].clone().requires_grad_()
    tokens = head.level_norm(x.permute(0, 1, 3, 4, 2))
    tables = head.positions.tables
    tokens = tokens + tables["frames"].view(1, 4, 1, 1, 32)
    if kind is GlobalVideoConfig:
        tokens = tokens + tables["rows"].view(1, 1, 3, 1, 32) + tables["columns"].view(1, 1, 1, 3, 32)
        sequences = tokens.reshape(2, 36, 32)
    else:
        sequences = tokens.permute(0, 2, 3, 1, 4).reshape(18, 4, 32)
    for block in head.blocks:
        sequences = convert(block)(sequences)
    expected = head.classifier(head.norm(sequences).reshape(2, 36, 32).mean(dim=1))
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, x.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", CONFIGS)
def test_float32_agrees_with_float64(kind) -> None:
    features, batch = make_clips()
    exact = make_head(kind).eval().logits(features, batch.keys)
    rough = make_head(kind).float().eval().logits([x.float() for x in features], batch.keys)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), exact, rtol=2e-4, atol=2e-4)


def test_fixed_codes_are_the_published_waves_of_each_axis() -> None:
    """Vaswani et al. 2017: PE(p, 2i) = sin(p / 10000^(2i / d)) and PE(p, 2i + 1) its cosine, here with the sines before the cosines."""
    waves = make_positions("sincos", 38, ("frames", "rows", "columns"), num_frames=1, map_side=1)((5, 3, 4))
    assert waves.shape == (5, 3, 4, 38)
    share = 12
    for place in ((0, 0, 0), (4, 2, 3), (1, 0, 2)):
        for axis, position in enumerate(place):
            expected = [
                function(position / 10_000 ** (2 * i / share)) for function in (math.sin, math.cos) for i in range(6)
            ]
            found = waves[place][axis * share : (axis + 1) * share].tolist()
            assert found == pytest.approx(expected, abs=1e-6)
        assert waves[place][36:].tolist() == [0, 0]
    temporal = make_positions("sincos", 16, ("frames",), num_frames=1, map_side=1)((5, 3, 4))
    assert temporal.shape == (5, 1, 1, 16)
    assert len({tuple(code) for code in temporal[:, 0, 0].tolist()}) == 5


def test_who_sees_the_order_of_frames() -> None:
    features, batch = make_clips()
    backwards = [x.flip(1) for x in features]
    seen = {}
    for name, kind, options in (
        ("linear", LinearVideoConfig, {}),
        ("temporal", TemporalVideoConfig, {}),
        ("global", GlobalVideoConfig, {}),
        ("waves", TemporalVideoConfig, {"position": "sincos"}),
        ("no codes", GlobalVideoConfig, {"position": "none"}),
    ):
        head = make_head(kind, **options).eval()
        difference = head.logits(features, batch.keys) - head.logits(backwards, batch.keys)
        seen[name] = difference.abs().max().item()
    assert seen["linear"] < 1e-12
    assert seen["no codes"] < 1e-12
    assert min(seen["temporal"], seen["global"], seen["waves"]) > 1e-3


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("position", ["learned", "sincos", "none"])
def test_every_parameter_gets_a_gradient_and_the_map_none(kind, position) -> None:
    options = {} if kind is LinearVideoConfig else {"position": position, "drop_path": 0.9, "width": 16}
    head = make_head(kind, **options)
    features, batch = make_clips()
    loss = head(features, batch)
    assert set(loss) == {"classification"}
    sum(loss.values()).backward()
    assert not [name for name, parameter in head.named_parameters() if parameter.grad is None]
    assert features[-1].grad is None


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_split_batch_has_the_same_loss_and_gradients(kind) -> None:
    options = {} if kind is LinearVideoConfig else {"drop_path": 0.5}
    head = make_head(kind, **options)
    features, batch = make_clips(4)
    sum(head(features, batch).values()).backward()
    whole = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    head.zero_grad()
    total = 0.0
    # Two ranks of 3 and 1 clips: each divides its sum by the mean count, and gradients are averaged.
    for first, count in ((0, 3), (3, 1)):
        part, own = make_clips(count, first=first)
        loss = sum(head(part, own, lambda name, n: torch.tensor(2.0, dtype=torch.float64)).values()) / 2
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(sum(head(features, batch).values()).item(), rel=1e-12)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-9, atol=1e-11)


def test_drops_follow_the_key_and_not_the_global_generator() -> None:
    head = make_head(TemporalVideoConfig, dropout=0.5, drop_path=0.5)
    features, batch = make_clips(4)
    torch.manual_seed(0)
    first = head.logits(features, batch.keys)
    torch.manual_seed(1)
    torch.testing.assert_close(first, head.logits(features, batch.keys), rtol=0, atol=0)
    other = head.logits(features, [SampleKey(5, 2, key.index) for key in batch.keys])
    assert (other - first).abs().amax(dim=1).min() > 1e-3
    # Evaluation draws nothing.
    head.eval()
    torch.testing.assert_close(
        head.logits(features, batch.keys), head.logits(features, batch.keys[::-1]), rtol=0, atol=0
    )


def test_a_dropped_branch_adds_nothing_and_kept_ones_are_scaled_up() -> None:
    head = make_head(GlobalVideoConfig, dropout=0.0, drop_path=0.5)
    block = head.blocks[1]
    x = torch.randn(3, 1, 6, 32, dtype=torch.float64)
    nothing = block(x, torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(nothing, x, rtol=0, atol=0)
    keys = [SampleKey(0, 0, index) for index in range(2000)]
    scales = head._drop_scales(keys, x)
    assert scales.shape == (2, 2, 2000)
    assert (scales[0] == 1).all()
    assert set(scales[1].unique().tolist()) == {0.0, 2.0}
    assert scales[1].mean(dim=1).sub(1).abs().max() < 0.1


def test_results_are_probabilities_with_the_clips_names() -> None:
    head = make_head(GlobalVideoConfig).eval()
    features, batch = make_clips(3)
    batch.targets[1] = ClipTarget(1, 7, torch.tensor(0), is_readable=False)
    results = head(features, batch)
    assert [(result.video_id, result.view, result.is_readable) for result in results] == [
        (0, 0, True),
        (1, 7, False),
        (2, 0, True),
    ]
    for result in results:
        assert result.scores.dtype == torch.float32
        assert result.scores.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_clips_and_maps_of_another_size_run(kind, position) -> None:
    head = make_head(kind, position=position).eval()
    features, batch = make_clips(num_frames=6, size=(2, 5))
    assert head.logits(features, batch.keys).shape == (2, 3)


def test_the_defaults_have_the_papers_four_blocks_of_the_maps_width() -> None:
    spec = FeatureSpec(channels=(128, 256, 512, 1024), strides=(4, 8, 16, 32))
    with torch.device("meta"):
        head = build_head(TemporalVideoConfig(), spec=spec, classes=[str(i) for i in range(400)])
    assert len(head.blocks) == 4
    width = 1024
    block = 12 * width**2 + 13 * width
    expected = 4 * block + 16 * width + 2 * (2 * width) + 400 * (width + 1)
    assert sum(parameter.numel() for parameter in head.parameters()) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearVideoConfig(dropout=1.0), "dropout is 1.0: give a share"),
        (lambda: TemporalVideoConfig(num_blocks=0), "num_blocks is 0"),
        (lambda: GlobalVideoConfig(drop_path=1.0), "drop_path is 1.0"),
        (lambda: GlobalVideoConfig(width=0), "width is 0"),
        (
            lambda: build_head(GlobalVideoConfig(width=40), spec=SPEC, classes=CLASSES),
            "width is 40 and head_channels 64",
        ),
        (lambda: build_head(LinearVideoConfig(), spec=SPEC, classes=["one"]), "given 1 classes"),
        (
            lambda: make_head(LinearVideoConfig).logits((torch.zeros(2, 32, 3, 3).double(),), []),
            r"maps of clips, \(B, T, C, h, w\), and was given \(2, 32, 3, 3\)",
        ),
    ],
)
def test_mistakes_are_named(make, message) -> None:
    with pytest.raises(HeadError, match=message):
        make()
