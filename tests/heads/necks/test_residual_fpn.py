"""FPN with residual blocks: against torchvision's ResNet blocks, where they stand, and what they leave of FPN."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from permafrost.heads.necks.build import build_neck
from permafrost.heads.necks.config import ResidualFPNConfig
from permafrost.heads.necks.fpn import FPN
from permafrost.heads.necks.residual_fpn import ResidualBlock, ResidualFPN


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_block_is_resnets(kind) -> None:
    torch.manual_seed(0)
    ours = ResidualBlock(channels=16, kind=kind, norm="group").double()

    def norm(width) -> nn.GroupNorm:
        return nn.GroupNorm(width // 8 or 1, width)

    twin = (BasicBlock(16, 16, norm_layer=norm) if kind == "basic" else Bottleneck(16, 4, norm_layer=norm)).double()
    for i, (own_conv, own_norm) in enumerate(zip(ours.convs, ours.norms), start=1):
        getattr(twin, f"conv{i}").load_state_dict(own_conv.state_dict())
        getattr(twin, f"bn{i}").load_state_dict(own_norm.state_dict())
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(x), twin(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", ["merged", "lateral"])
@pytest.mark.parametrize("norm", ["group", "layer", "none"])
def test_blocks_stand_where_they_are_said_to(spec, make_features, place, norm) -> None:
    torch.manual_seed(0)
    neck = ResidualFPN(spec=spec, channels=12, num_blocks=2, place=place, norm=norm).double()
    features = make_features(dtype=torch.float64)
    levels = [conv(n(x)) for conv, n, x in zip(neck.lateral, neck.level_norms, features)]

    def summed(levels) -> list[torch.Tensor]:
        levels = list(levels)
        for i in (2, 1, 0):
            levels[i] = levels[i] + nn.functional.interpolate(levels[i + 1], size=levels[i].shape[-2:])
        return levels

    if place == "merged":
        levels = [blocks(x) for blocks, x in zip(neck.blocks, summed(levels))]
    else:
        levels = summed([blocks(x) for blocks, x in zip(neck.blocks, levels)])
    found = neck(features)
    for ours, conv, level in zip(found, neck.output, levels):
        torch.testing.assert_close(ours, conv(level), rtol=1e-12, atol=1e-12)
    assert torch.equal(found[4], found[3][:, :, ::2, ::2])
    sum((x * torch.randn_like(x)).sum() for x in found).backward()
    assert not [name for name, parameter in neck.named_parameters() if not parameter.grad.any()]


def test_parameters_beside_fpn(spec) -> None:
    """Four basic blocks of 256 channels on four levels: 32 convolutions of 3 x 3 x 256 x 256 and their norms."""
    plain, residual = FPN(spec=spec), build_neck(ResidualFPNConfig(), spec=spec)

    def count(module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(residual) - count(plain) == 4 * 4 * 2 * (9 * 256 * 256 + 2 * 256)
    assert residual.strides == plain.strides
