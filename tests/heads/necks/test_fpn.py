"""The feature pyramid against torchvision's, and the trained norm in front of it."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from permafrost.heads.errors import HeadError
from permafrost.heads.necks.fpn import FPN
from permafrost.heads.necks.level_norm import LevelNorm
from permafrost.model.spec import FeatureSpec


def torchvision_twin(fpn, spec, channels) -> FeaturePyramidNetwork:
    twin = FeaturePyramidNetwork(list(spec.channels), channels, extra_blocks=LastLevelMaxPool())
    state = {}
    for i in range(len(spec.channels)):
        for part in ("weight", "bias"):
            state[f"inner_blocks.{i}.0.{part}"] = getattr(fpn.lateral[i], part).detach()
            state[f"layer_blocks.{i}.0.{part}"] = getattr(fpn.output[i], part).detach()
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("side", [96, 90])
def test_equals_torchvision(spec, make_features, side) -> None:
    torch.manual_seed(0)
    fpn = FPN(spec=spec, channels=10, level_norm=False).double()
    features = make_features(side=side, dtype=torch.float64)
    expected = torchvision_twin(fpn, spec, 10).double()(OrderedDict((str(i), x) for i, x in enumerate(features)))
    found = fpn(features)
    assert fpn.strides == (4, 8, 16, 32, 64)
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected.values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_extra_levels_halve(spec, make_features) -> None:
    fpn = FPN(spec=spec, channels=4, num_extra_levels=2)
    pyramid = fpn(make_features())
    assert fpn.strides == (4, 8, 16, 32, 64, 128)
    assert [tuple(x.shape[-2:]) for x in pyramid] == [(24, 24), (12, 12), (6, 6), (3, 3), (2, 2), (1, 1)]
    assert torch.equal(pyramid[4], pyramid[3][:, :, ::2, ::2])


def test_level_norm_is_layer_norm_over_channels() -> None:
    torch.manual_seed(0)
    norm = LevelNorm(6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 3, 5) * 4 + 1
    wide = x.double()
    mean = wide.mean(dim=1, keepdim=True)
    variance = ((wide - mean) ** 2).mean(dim=1, keepdim=True)
    expected = (wide - mean) / (variance + 1e-5).sqrt()
    expected = expected * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert norm(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("level_norm", [True, False])
def test_takes_bf16_features(spec, make_features, level_norm) -> None:
    """Parameters stay float32; the compute dtype is theirs, or autocast's."""
    torch.manual_seed(0)
    fpn = FPN(spec=spec, channels=8, level_norm=level_norm)
    features = make_features(dtype=torch.bfloat16)
    plain = fpn(features)
    assert {x.dtype for x in plain} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fpn(features)
    assert {x.dtype for x in mixed} == {torch.bfloat16}
    for a, b in zip(plain, mixed):
        assert (a - b.float()).norm() / a.norm() < 0.02
    sum(x.float().square().sum() for x in mixed).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in fpn.parameters())


def test_level_norm_can_be_switched_off(spec) -> None:
    with_norm = {name for name, _ in FPN(spec=spec, channels=4).named_parameters()}
    without = {name for name, _ in FPN(spec=spec, channels=4, level_norm=False).named_parameters()}
    assert with_norm - without == {f"level_norms.{i}.{part}" for i in range(4) for part in ("weight", "bias")}


def test_errors_name_the_cause(spec, make_features) -> None:
    with pytest.raises(HeadError, match="3 feature maps came in, the head was built for 4"):
        FPN(spec=spec, channels=4)(make_features()[:3])
    with pytest.raises(HeadError, match=r"strides are \(4, 16\)"):
        FPN(spec=FeatureSpec(channels=(4, 4), strides=(4, 16)), channels=4)
