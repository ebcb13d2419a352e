"""Swin V1 against two independent implementations, and everything about it that they do not have."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import nn

from permafrost.model.errors import BackboneError
from permafrost.model.spec import SWIN_V1_SIZES, SwinV1Size
from permafrost.model.swin import parts as swin_parts
from permafrost.model.swin.v1 import SwinV1, WindowAttention, resample_table

SMALL = SwinV1Size(16, (2, 2, 2, 2), (1, 2, 2, 4))


def from_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm keeps the step between stages at the start of the next one."""
    moved = {}
    for key, value in state.items():
        if not key.startswith("norm."):
            moved[re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)] = value
    return moved


@pytest.mark.parametrize(
    ("theirs", "name", "window", "side"),
    [
        ("swin_tiny_patch4_window7_224", "swin_tiny", 7, 224),
        # Here the last map has 14 x 14 places, so that its windows are shifted as well.
        ("swin_tiny_patch4_window7_224", "swin_tiny", 7, 448),
        # As EsViT was trained: windows of 14 cover the third map, and the last one, 7 x 7, has a table of 7.
        ("swin_tiny_patch4_window7_224", "swin_tiny", (14, 14, 14, 7), 224),
        ("swin_small_patch4_window7_224", "swin_small", 7, 224),
        ("swin_base_patch4_window7_224", "swin_base", 7, 224),
        # 2 GB, and a quarter of this file's time.
        pytest.param("swin_large_patch4_window7_224", "swin_large", 7, 224, marks=pytest.mark.slow),
    ],
)
def test_equals_timm(randomise, relative_error, theirs, name, window, side) -> None:
    configured = window if isinstance(window, int) else max(window)
    reference = timm.create_model(theirs, pretrained=False, num_classes=0, img_size=side, window_size=configured)
    reference = randomise(reference).eval()
    with torch.device("meta"):
        model = SwinV1(name, window_size=window).eval()
    model.load_state_dict(from_timm(reference.state_dict()), assign=True)
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(images)
        expected = reference.forward_intermediates(images, intermediates_only=True)
    errors = [relative_error(ours, other) for ours, other in zip(found, expected, strict=True)]
    assert max(errors) < 1e-5, errors


def test_equals_transformers_on_a_size_that_needs_padding(randomise, relative_error) -> None:
    """It pads as this project does, but never clips a window: no map here is smaller than 7."""
    from transformers import SwinBackbone, SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    reference = randomise(SwinBackbone(SwinConfig(window_size=7, out_features=stages))).eval()
    with torch.device("meta"):
        model = SwinV1("swin_tiny").eval()
    model.load_state_dict(from_transformers(reference.state_dict()), assign=True)
    images = torch.randn(2, 3, 233, 391, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = model(images), reference(images).feature_maps
        # Theirs come with a norm per map.
        found = [reference.hidden_states_norms[s](x.permute(0, 2, 3, 1)) for s, x in zip(stages, found, strict=True)]
    assert [x.shape[1:3] for x in found] == [(59, 98), (30, 49), (15, 25), (8, 13)]
    errors = [relative_error(x.permute(0, 3, 1, 2), other) for x, other in zip(found, expected, strict=True)]
    assert max(errors) < 1e-5, errors


def from_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their names before and after version 5, without the norms of their own."""
    renames = (
        (r"^swin\.", ""),
        (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^embeddings\.norm", "patch_embed.norm"),
        (r"^encoder\.", ""),
        (
            r"attention\.(self|relative_position_bias)\.relative_position_bias_table",
            "attn.relative_position_bias_table",
        ),
        (r"attention\.(output\.dense|o_proj)", "attn.proj"),
        (r"attention\.(self\.)?(query|key|value|q_proj|k_proj|v_proj)", lambda m: f"attn.{m[2][0]}"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"(?<!attn\.)output\.dense", "mlp.fc2"),
    )
    moved = {}
    for key, value in state.items():
        for old, new in renames:
            key = re.sub(old, new, key)
        moved[key] = value
    for key in [key for key in moved if ".attn.q." in key]:
        moved[key.replace(".q.", ".qkv.")] = torch.cat([moved.pop(key.replace(".q.", f".{part}.")) for part in "qkv"])
    return {key: value for key, value in moved.items() if key.startswith(("patch_embed.", "layers."))}


def test_state_dict_has_the_official_names_and_no_buffers() -> None:
    depths = SWIN_V1_SIZES["swin_tiny"].depths
    expected = {f"patch_embed.{part}.{kind}" for part in ("proj", "norm") for kind in ("weight", "bias")}
    for stage, depth in enumerate(depths):
        if stage < 3:
            expected |= {f"layers.{stage}.downsample.{n}" for n in ("reduction.weight", "norm.weight", "norm.bias")}
        for block in range(depth):
            modules = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
            names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
            names.append("attn.relative_position_bias_table")
            expected |= {f"layers.{stage}.blocks.{block}.{name}" for name in names}
    with torch.device("meta"):
        model = SwinV1("swin_tiny")
    assert set(model.state_dict()) == expected
    assert model.state_dict()["layers.1.blocks.0.attn.relative_position_bias_table"].shape == (169, 6)
    assert model.state_dict()["layers.2.downsample.norm.weight"].shape == (4 * 384,)
    assert not list(model.buffers())


@pytest.mark.parametrize(
    ("name", "window", "classifier"),
    [
        # Parameters of the published classifiers of 1000 classes.
        ("swin_tiny", 7, 28_288_354),
        ("swin_small", 7, 49_606_258),
        ("swin_base", 7, 87_768_224),
        # Of the same depth, the tables of 376 heads grow from 13 x 13 to 23 x 23.
        ("swin_base", 12, 87_768_224 + 376 * (23**2 - 13**2)),
        ("swin_large", 7, 196_532_476),
    ],
)
def test_parameter_counts(name: str, window: int, classifier: int) -> None:
    with torch.device("meta"):
        model = SwinV1(name, window_size=window)
    width = model.spec.channels[-1]
    assert sum(p.numel() for p in model.parameters()) + 2 * width + 1000 * (width + 1) == classifier


def test_windows_are_clipped_stage_by_stage(monkeypatch) -> None:
    seen = []
    original = WindowAttention.forward

    def spy(self, x, window, shift) -> torch.Tensor:
        seen.append((tuple(x.shape[1:3]), window, shift))
        return original(self, x, window, shift)

    monkeypatch.setattr(WindowAttention, "forward", spy)
    model = SwinV1(SMALL, window_size=8).eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, 72, 200))
    maps = ((18, 50), 8, 4), ((9, 25), 8, 4), ((5, 13), 5, 0), ((3, 7), 3, 0)
    assert seen == [entry for size, window, shift in maps for entry in ((size, window, 0), (size, window, shift))]


def test_a_clipped_window_takes_the_middle_of_the_table(randomise) -> None:
    """It works as if the table had been made for the smaller window, with the same bias for the same offset."""
    model = randomise(SwinV1(SMALL, window_size=(7, 7, 7, 7))).double().eval()
    small = SwinV1(SMALL, window_size=(7, 5, 3, 2)).double().eval()
    state = model.state_dict()
    for stage, window in enumerate((7, 5, 3, 2)):
        for block in range(2):
            name = f"layers.{stage}.blocks.{block}.attn.relative_position_bias_table"
            # Row of the 13 x 13 table for each offset (row, column), counted from -6.
            offsets = range(-(window - 1), window)
            state[name] = state[name][[(row + 6) * 13 + column + 6 for row in offsets for column in offsets]]
    small.load_state_dict(state)
    images = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        assert all(torch.equal(one, two) for one, two in zip(model(images), small(images), strict=True))


def cubic_weights(old: int, new: int) -> torch.Tensor:
    """Cubic convolution with a = -0.75 (Keys, IEEE TASSP 1981) from `old` samples to `new`, as a (new, old) matrix."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for index in range(new):
        place = (index + 0.5) * old / new - 0.5
        for sample in range(int(place // 1) - 1, int(place // 1) + 3):
            x = abs(place - sample)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[index, min(max(sample, 0), old - 1)] += near if x <= 1 else far
    return weights


@pytest.mark.parametrize(("old", "new"), [(7, 12), (7, 14), (14, 7), (3, 2), (2, 9), (1, 4), (4, 1)])
def test_tables_are_resampled_with_cubic_convolution(relative_error, old: int, new: int) -> None:
    table = torch.randn(3, 2 * old - 1, 2 * old - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(old))
    weights = cubic_weights(2 * old - 1, 2 * new - 1)
    assert torch.allclose(weights.sum(1), torch.ones(2 * new - 1, dtype=torch.float64))
    resampled = resample_table(table, new)
    assert resampled.shape == (3, 2 * new - 1, 2 * new - 1)
    assert relative_error(resampled, weights @ table @ weights.T) < 1e-12
    # The offset 0 stays where it is, and so does the symmetry of the two axes.
    assert torch.allclose(resample_table(table.flip(1, 2), new), resampled.flip(1, 2))
    assert torch.allclose(resampled[:, new - 1, new - 1], table[:, old - 1, old - 1], rtol=0, atol=1e-12)
    assert torch.allclose(resample_table(table.transpose(1, 2), new), resampled.transpose(1, 2))
    half = table.to(torch.bfloat16)
    assert resample_table(half, old) is half
    assert resample_table(half, new).dtype == torch.float32
    assert torch.equal(resample_table(half, new), resample_table(half.float(), new))


def test_outputs_follow_the_spec_on_any_size(randomise) -> None:
    model = randomise(SwinV1(SMALL, window_size=4, pretrained_window_size=(7, 4, 2, 1))).eval()
    for height, width in ((64, 64), (50, 91), (7, 130), (4, 4)):
        with torch.no_grad():
            features = model(torch.randn(2, 3, height, width))
        for feature, channels, stride in zip(features, model.spec.channels, model.spec.strides, strict=True):
            assert feature.shape == (2, channels, -(-height // stride), -(-width // stride))
            assert feature.is_contiguous(memory_format=torch.channels_last)
            assert torch.isfinite(feature).all()


@pytest.mark.parametrize("size", [(61, 90), (64, 64)])
def test_folded_equals_unfolded(randomise, size) -> None:
    model = randomise(SwinV1(SMALL, window_size=(6, 5, 6, 3), pretrained_window_size=(5, 5, 7, 3))).double().eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        model.fold()
        first, second = model(images), model(images)
    # Stage 1 was resampled from 5 to 6; the map of stage 3 is 4 high, so its window is clipped.
    assert list(model.layers[0].blocks[0].attn.folded) == [6]
    assert model.layers[0].blocks[0].attn.folded[6][2].shape == (1, 121)
    assert list(model.layers[2].blocks[0].attn.folded) == [4]
    assert model.layers[2].blocks[0].attn.folded[4][2].shape == (2, 49)
    for one, two, three in zip(expected, first, second, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    model.float()
    assert not model.layers[0].blocks[0].attn.folded
    with torch.no_grad():
        assert model(images.float())[3].dtype == torch.float32


def test_many_windows_are_attended_in_several_calls(randomise, monkeypatch) -> None:
    model = randomise(SwinV1(SMALL, window_size=4)).double().eval()
    images = torch.randn(2, 3, 61, 90, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        monkeypatch.setattr(swin_parts, "MAX_WINDOWS_PER_CALL", 7)
        found = model(images)
    assert all(torch.allclose(one, two, rtol=0, atol=1e-12) for one, two in zip(found, expected, strict=True))


def test_gradients_are_those_of_the_loss(randomise) -> None:
    """A central difference along a random direction through all parameters: padded, shifted, clipped, resampled."""
    torch.manual_seed(0)
    model = randomise(SwinV1(SMALL, window_size=(6, 5, 4, 3), pretrained_window_size=(6, 4, 5, 3))).double()
    images = torch.randn(2, 3, 61, 90, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return sum(feature.sin().mean() for feature in model(images))

    loss().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
    direction = {p: torch.randn_like(p) for p in model.parameters()}
    slope = sum((p.grad * d).sum() for p, d in direction.items())
    values, step = [], 1e-6
    with torch.no_grad():
        for move in (step, -2 * step):
            for p, d in direction.items():
                p.add_(d, alpha=move)
            values.append(loss())
    assert float((values[0] - values[1]) / (2 * step)) == pytest.approx(float(slope), rel=1e-5)


def test_trains_from_its_initial_values_with_drop_path() -> None:
    torch.manual_seed(0)
    model = SwinV1(SMALL, window_size=4, drop_path_rate=0.1).train()
    head = nn.Linear(SMALL.channels[-1], 3)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(30):
        last = model(images, generator=generator)[-1]
        loss = nn.functional.cross_entropy(head(last.mean(dim=(2, 3))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_drop_path_scales_whole_branches(randomise) -> None:
    """The factors of a block's two branches, one per image: 0 drops what the branch adds."""
    model = randomise(SwinV1(SMALL, window_size=4, drop_path_rate=0.5)).double().train()
    block = model.layers[3].blocks[1]
    x = torch.randn(2, 3, 3, 128, dtype=torch.float64)
    scales = torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=torch.float64)[..., None, None, None]
    with torch.no_grad():
        found = block(x, 3, 0, scales)
        attended = x + 2 * block.attn(block.norm1(x), 3, 0)
        assert torch.allclose(found[1], attended[1])
        assert torch.allclose(found[0], (x + 2 * block.mlp(block.norm2(x)))[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "swinv2_tiny"}, "No Swin V1 is called 'swinv2_tiny'; the sizes are swin_tiny"),
        ({"size": "swin_tiny", "drop_path_rate": 1.0}, "drop_path_rate"),
        ({"size": "swin_tiny", "window_size": (7, 7, 7)}, "window_size"),
        ({"size": "swin_tiny", "pretrained_window_size": 0}, "pretrained_window_size"),
    ],
)
def test_construction_errors(arguments: dict, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        with torch.device("meta"):
            SwinV1(**arguments)


def test_image_errors() -> None:
    model = SwinV1(SMALL)
    with pytest.raises(BackboneError, match="smaller than one patch"):
        model(torch.zeros(1, 3, 3, 64))
    with pytest.raises(BackboneError, match="shape"):
        model(torch.zeros(1, 1, 64, 64))
