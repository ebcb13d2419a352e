"""backbone.fp8: the arithmetic of quantised linear layers, what it does to feature maps, and where it cannot be had."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from permafrost.launcher.cli import main
from permafrost.launcher.errors import RecipeError
from permafrost.launcher.experiment import MeshConfig
from permafrost.model import BackboneConfig, BackboneError, load_backbone
from permafrost.model.fp8 import FORMAT, LARGEST, Fp8Linear, linear_with, quantise_linears, quantise_rows, require_fp8

RECIPE = f"{Path(__file__).parents[1] / 'launcher' / 'tiny_recipe.py'}:tiny"
SIMILARITY = 0.985
"""Cosine of every feature map with that of the unquantised network, at least."""


def similarities(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> list[float]:
    pairs = zip(found, expected, strict=True)
    return [
        float(nn.functional.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0))
        for one, other in pairs
    ]


def images(height: int = 75, width: int = 106) -> torch.Tensor:
    return torch.randint(
        0, 256, (1, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(height)
    )


def test_rows_are_scaled_to_the_formats_range_and_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 96, generator=generator) * torch.logspace(-30, 30, 64)[:, None]
    # One number far above the others costs its own row only.
    x[3, 5] *= 1e4
    values, scales = quantise_rows(x)
    assert values.dtype == FORMAT
    assert scales.shape == (64, 1)
    kept = scales[:, 0] * LARGEST > 1e-11
    assert kept.sum() > 40
    assert torch.equal(values.float().abs().amax(dim=1)[kept], torch.full((64,), LARGEST)[kept])
    back = values.float() * scales
    # Three digits after the leading one, and below the smallest normal number steps of 2 ** -9.
    bound = torch.maximum(x.abs() * 2**-4, scales * 2**-10) * (1 + 1e-5)
    assert torch.all((back - x).abs()[kept] <= bound[kept])
    assert torch.isfinite(back).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_magnitude_become_zeros(dtype: torch.dtype) -> None:
    values, scales = quantise_rows(torch.tensor([[0.0, -0.0], [1e-38, -1e-30]], dtype=dtype))
    assert torch.equal(values.float().abs(), torch.zeros(2, 2))
    assert torch.isfinite(scales).all()


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_is_the_product_of_what_was_quantised(has_bias: bool, relative_error) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(96, 48, bias=has_bias)
    nn.init.normal_(linear.weight, generator=generator)
    layer = Fp8Linear(linear)
    x = torch.randn(2, 5, 7, 96, generator=generator)
    (values, scales), (weight, weight_scales) = quantise_rows(x), quantise_rows(linear.weight.detach())
    expected = (values.double() * scales) @ (weight.double() * weight_scales).t()
    assert relative_error(layer(x), expected + (linear.bias.double() if has_bias else 0)) < 1e-6
    other = torch.randn(48, generator=generator)
    assert relative_error(linear_with(layer, x, other), expected + other) < 1e-6
    # Against the layer itself: two factors with three digits each.
    assert 0.01 < relative_error(layer(x), linear(x)) < 0.05


@pytest.mark.parametrize(
    ("name", "weights", "window"),
    [
        ("swinv2_nano", "swinv2_nano_glyphs", None),
        ("swinv2_nano", "random", 6),
        ("swin_tiny", "random", 5),
    ],
)
def test_maps_stay_near_those_of_the_network(name, weights, window) -> None:
    network = load_backbone(name, weights=weights, window_size=window)
    quantised = copy.deepcopy(network)
    told = quantise_linears(quantised.network)["fp8"]
    # All but the patch embedding, norms, and what makes the position biases.
    layers = sum(isinstance(one, Fp8Linear) for one in quantised.modules())
    assert layers == 4 * sum(network.network.size.depths) + 3
    assert told.startswith(f"{layers} linear layers in E4M3")
    found = similarities(quantised(images()), network(images()))
    assert min(found) >= SIMILARITY, found
    assert max(found) < 1 - 1e-6, "nothing was quantised"
    assert quantised.checksum() != network.checksum()
    assert quantised.fingerprint == network.fingerprint
    with pytest.raises(BackboneError, match="chosen when it is loaded"):
        quantised.half()


def test_layers_of_other_sizes_stay() -> None:
    network = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 48), nn.Linear(48, 16))
    assert quantise_linears(network)["fp8"].endswith("2 of other sizes left as they are")
    assert [type(one) for one in network] == [nn.Linear, nn.Linear, Fp8Linear]


def test_without_the_hardware_it_is_an_error(tmp_path: Path, capsys, monkeypatch) -> None:
    told = r"backbone\.fp8 is True, but the backbone is on cpu: only GPUs multiply 8-bit floats; set backbone\.fp8 to False"
    with pytest.raises(BackboneError, match=told):
        load_backbone("swinv2_nano", weights="random", fp8=True)
    assert main(["train", RECIPE, "--output", str(tmp_path / "run"), "--backbone.fp8", "True"]) == 2
    assert "backbone.fp8 is True, but the backbone is on cpu" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "an older card")
    with pytest.raises(BackboneError, match=r"needs compute capability 9\.0; an older card has 8\.0"):
        require_fp8(torch.device("cuda", 0), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(BackboneError, match=r"computes in float16: .* set backbone\.dtype"):
        require_fp8(torch.device("cuda", 0), torch.float16)


def test_combinations_that_cannot_be_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"backbone\.fp8 is True, but backbone\.frozen is False"):
        BackboneConfig("swinv2_nano", "random", fp8=True, frozen=False)
    with pytest.raises(BackboneError, match=r"backbone\.fp8 is True, but timm/resnet18 is built as timm"):
        BackboneConfig("timm/resnet18", "random", fp8=True)
    from permafrost.configs.quickstart import quickstart

    experiment = quickstart()
    experiment.backbone.fp8, experiment.mesh = True, MeshConfig(tensor=2)
    with pytest.raises(RecipeError, match=r"backbone\.fp8 is True and mesh\.tensor is 2: .* not quantised"):
        experiment.__post_init__()
