"""linear_gelu: the epilogue's place in the network, how exact it is, and where it cannot be had."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from permafrost.model import BackboneConfig, BackboneError, load_backbone
from permafrost.model.errors import KernelError
from permafrost.model.kernels.linear_gelu import linear_gelu, linear_gelu_reference
from permafrost.model.swin.parts import Mlp


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, 75, 106), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_it_is_the_layer_and_its_gelu(relative_error) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(32, 48).double()
    x = torch.randn(2, 3, 5, 32, dtype=torch.float64, generator=generator)
    # PyTorch's own GELU on a CPU is the exact one.
    assert relative_error(linear_gelu(x, layer), linear_gelu_reference(x, layer)) < 1e-14


def test_the_network_uses_it_where_it_is_chosen(relative_error) -> None:
    plain, other = (load_backbone("swinv2_nano", weights="random", dtype=torch.float64) for _ in range(2))
    for mlp in (module for module in other.modules() if isinstance(module, Mlp)):
        mlp.has_epilogue = True
    for one, two in zip(other(images()), plain(images()), strict=True):
        assert relative_error(one, two) < 1e-13


@pytest.mark.parametrize("weights", ["random", "swinv2_nano_glyphs"])
def test_its_approximation_lies_far_below_the_rounding_of_16_bits(weights, relative_error, monkeypatch) -> None:
    network = load_backbone("swinv2_nano", weights=weights, dtype=torch.float64)
    exact = network(images())
    rounded = load_backbone("swinv2_nano", weights=weights, dtype=torch.bfloat16)(images())
    gelu = nn.functional.gelu
    monkeypatch.setattr(nn.functional, "gelu", lambda x: gelu(x, approximate="tanh"))
    for found, coarse, expected in zip(network(images()), rounded, exact, strict=True):
        assert 1e-6 < relative_error(found, expected) < relative_error(coarse, expected) / 5


def test_what_is_chosen_is_said_and_what_cannot_run_is_an_error() -> None:
    plain = load_backbone("swinv2_nano", weights="random")
    assert plain.describe()["gelu"] == "exact (kernels are for GPUs, the network is on cpu)"
    with pytest.raises(KernelError, match=r"backbone\.gelu is 'epilogue', which does not run here: it runs on a GPU"):
        load_backbone("swin_tiny", weights="random", gelu="epilogue")
    learning = load_backbone("swinv2_nano", frozen=False, weights="random", gelu="epilogue")
    assert learning.describe()["gelu"].startswith("exact (a gradient is wanted")
    with pytest.raises(BackboneError, match=r"backbone\.gelu is 'tanh': give one of auto, epilogue, exact"):
        BackboneConfig("swinv2_nano", "random", gelu="tanh")
    with pytest.raises(BackboneError, match=r"backbone\.gelu is 'exact', but timm/resnet18"):
        BackboneConfig("timm/resnet18", "random", gelu="exact")


def test_more_precise_networks_and_gradients_are_refused() -> None:
    mlp = Mlp(32)
    with pytest.raises(KernelError, match="too much for float32"):
        mlp.attempt(torch.float32)
    with pytest.raises(KernelError, match="has no gradient"):
        linear_gelu(torch.zeros(1, 32), mlp.fc1)
