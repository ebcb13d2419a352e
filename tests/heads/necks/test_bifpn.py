"""BiFPN against a derivation in plain float64 numpy that shares no code with it; its levels, gradients and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from permafrost.heads.errors import HeadError
from permafrost.heads.necks.bifpn import BiFPN
from permafrost.heads.necks.build import build_neck
from permafrost.heads.necks.config import BiFPNConfig
from permafrost.model.spec import FeatureSpec


def shaken(neck, *, seed=0) -> BiFPN:
    """The neck in float64 with every parameter random; fusion weights of both signs."""
    torch.manual_seed(seed)
    neck.double()
    with torch.no_grad():
        for name, parameter in neck.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.7 if name.endswith(".weights") else 0.0))
    return neck


def conv(x, weight, bias=None) -> np.ndarray:
    """(C, H, W) -> (O, H, W): stride 1, zeros around; weight (O, C / groups, k, k)."""
    out_channels, per_group, k, _ = weight.shape
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    out = np.zeros((out_channels, *x.shape[1:]))
    groups = len(x) // per_group
    for o in range(out_channels):
        first = (o // (out_channels // groups)) * per_group
        for c in range(per_group):
            for i in range(k):
                for j in range(k):
                    out[o] += weight[o, c, i, j] * padded[first + c, i : i + x.shape[1], j : j + x.shape[2]]
    return out if bias is None else out + bias[:, None, None]


def normalise(x, kind, weight, bias) -> np.ndarray:
    if kind == "none":
        return x
    if kind == "layer":
        mean, variance = x.mean(0), x.var(0)
        x = (x - mean) / np.sqrt(variance + 1e-5)
    else:
        groups = math.gcd(32, len(x) // 8)
        parts = x.reshape(groups, -1)
        x = ((parts - parts.mean(1)[:, None]) / np.sqrt(parts.var(1) + 1e-5)[:, None]).reshape(x.shape)
    return x * weight[:, None, None] + bias[:, None, None]


def halve(x) -> np.ndarray:
    """Largest of each 3x3 window around every second cell."""
    channels, height, width = x.shape
    out = np.empty((channels, -(-height // 2), -(-width // 2)))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            rows, columns = slice(max(0, 2 * i - 1), 2 * i + 2), slice(max(0, 2 * j - 1), 2 * j + 2)
            out[:, i, j] = x[:, rows, columns].max(axis=(1, 2))
    return out


def enlarge(x, like) -> np.ndarray:
    rows = np.arange(like.shape[1]) * x.shape[1] // like.shape[1]
    columns = np.arange(like.shape[2]) * x.shape[2] // like.shape[2]
    return x[:, rows][:, :, columns]


def derive(state, features, *, num_layers, num_extra, norm, separable) -> list[np.ndarray]:
    """The whole neck over one image's (C, H, W) maps."""

    def node(name, *inputs) -> np.ndarray:
        weights = np.maximum(state[f"{name}.weights"], 0)
        x = sum(w * x for w, x in zip(weights, inputs, strict=True)) / (weights.sum() + 1e-4)
        x = x / (1 + np.exp(-x))
        x = conv(x, state[f"{name}.conv.0.weight"], state.get(f"{name}.conv.0.bias"))
        if separable:
            x = conv(x, state[f"{name}.conv.1.weight"], state.get(f"{name}.conv.1.bias"))
        return normalise(x, norm, state.get(f"{name}.norm.weight"), state.get(f"{name}.norm.bias"))

    p = []
    for i, x in enumerate(features):
        x = normalise(x, "layer", state[f"level_norms.{i}.weight"], state[f"level_norms.{i}.bias"])
        p.append(conv(x, state[f"lateral.{i}.weight"], state[f"lateral.{i}.bias"]))
    for _ in range(num_extra):
        p.append(halve(p[-1]))
    top = len(p) - 1
    for layer in range(num_layers):
        down = {top: p[top]}
        for i in range(top - 1, -1, -1):
            down[i] = node(f"layers.{layer}.down.{i}", p[i], enlarge(down[i + 1], p[i]))
        out = {0: down[0]}
        for i in range(1, top):
            out[i] = node(f"layers.{layer}.up.{i - 1}", p[i], down[i], halve(out[i - 1]))
        out[top] = node(f"layers.{layer}.up.{top - 1}", p[top], halve(out[top - 1]))
        p = [out[i] for i in range(top + 1)]
    return p


@pytest.mark.parametrize(
    ("fields", "first", "sizes"),
    [
        ({"num_layers": 2, "norm": "group"}, 0, [(13, 10), (7, 5), (4, 3)]),
        ({"num_layers": 1, "norm": "none", "separable": True}, 0, [(8, 8), (4, 4), (2, 2)]),
        ({"num_layers": 3, "norm": "layer", "separable": True, "num_extra_levels": 2, "finest_stride": 8}, 1, None),
    ],
    ids=["odd-sizes", "separable", "p3-p7"],
)
def test_equals_a_plain_derivation(fields, first, sizes) -> None:
    spec = FeatureSpec(channels=(3, 5, 4), strides=(4, 8, 16))
    sizes = sizes or [(12, 9), (6, 5), (3, 3)]
    neck = shaken(build_neck(BiFPNConfig(channels=16, **{"num_extra_levels": 1, **fields}), spec=spec))
    random = np.random.default_rng(3)
    maps = [random.normal(size=(2, channels, *size)) for channels, size in zip(spec.channels, sizes)]
    found = neck([torch.from_numpy(x) for x in maps])
    state = {name: value.numpy() for name, value in neck.state_dict().items()}
    for image in range(2):
        expected = derive(
            state,
            [x[image] for x in maps[first:]],
            num_layers=fields["num_layers"],
            num_extra=fields.get("num_extra_levels", 1),
            norm=fields["norm"],
            separable=fields.get("separable", False),
        )
        assert len(found) == len(expected) == len(neck.strides)
        for ours, theirs in zip(found, expected):
            np.testing.assert_allclose(ours[image].detach().numpy(), theirs, rtol=1e-10, atol=1e-10)


def test_levels_and_strides(spec, make_features) -> None:
    neck = BiFPN(spec=spec, channels=8, num_layers=2)
    assert neck.strides == (4, 8, 16, 32, 64)
    assert neck.num_backbone_levels == 4
    assert [tuple(x.shape[-2:]) for x in neck(make_features(side=90))] == [(23, 23), (12, 12), (6, 6), (3, 3), (2, 2)]
    high = BiFPN(spec=spec, channels=8, num_layers=1, finest_stride=8, num_extra_levels=2)
    assert high.strides == (8, 16, 32, 64, 128)
    assert high.num_backbone_levels == 3
    # The map that is left out costs no parameter.
    assert len(high.level_norms) == len(high.lateral) == 3


@pytest.mark.parametrize("num_layers", [1, 4, 9])
def test_every_parameter_learns_and_layers_cost_alike(spec, make_features, num_layers) -> None:
    neck = shaken(BiFPN(spec=spec, channels=8, num_layers=num_layers), seed=1)
    with torch.no_grad():
        for layer in neck.layers:
            for node in [*layer.down, *layer.up]:
                node.weights.abs_()
    generator = torch.Generator().manual_seed(0)
    pyramid = neck(make_features(dtype=torch.float64))
    # A plain sum would hide what a group norm takes out.
    sum((x * torch.randn(x.shape, generator=generator)).sum() for x in pyramid).backward()
    without = [name for name, parameter in neck.named_parameters() if not parameter.grad.any()]
    assert not without
    sizes = {sum(p.numel() for p in layer.parameters()) for layer in neck.layers}
    assert len(neck.layers) == num_layers
    assert len(sizes) == 1


def test_a_node_whose_weights_are_all_negative_gives_no_nan(spec, make_features) -> None:
    neck = BiFPN(spec=spec, channels=8, num_layers=1)
    with torch.no_grad():
        neck.layers[0].down[0].weights.fill_(-1.0)
    pyramid = neck(make_features())
    sum(x.square().sum() for x in pyramid).backward()
    assert all(x.isfinite().all() for x in pyramid)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())


def test_the_coarsest_level_may_be_a_single_cell(spec, make_features) -> None:
    neck = BiFPN(spec=spec, channels=16, num_layers=1)
    pyramid = neck([x[:1] for x in make_features(side=32)])
    assert pyramid[-1].shape == (1, 16, 1, 1)
    assert all(x.isfinite().all() for x in pyramid)


def test_refusals(spec) -> None:
    with pytest.raises(HeadError, match=r"finest_stride is 16.*strides \(4, 8\)"):
        BiFPN(spec=FeatureSpec(channels=(4, 4), strides=(4, 8)), finest_stride=16)
    with pytest.raises(HeadError, match="twice the one before"):
        BiFPN(spec=FeatureSpec(channels=(4, 4), strides=(4, 16)))
    with pytest.raises(HeadError, match="only the level of stride 32"):
        BiFPN(spec=spec, finest_stride=32, num_extra_levels=0)
    with pytest.raises(HeadError, match="3 feature maps came in"):
        BiFPN(spec=spec, channels=4)([torch.zeros(1, 8, 4, 4)] * 3)
