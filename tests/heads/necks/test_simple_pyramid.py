"""The simple feature pyramid: derived anew in float64, aligned with the image for any patch size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from permafrost.heads.errors import HeadError
from permafrost.heads.necks.build import build_neck
from permafrost.heads.necks.config import SimplePyramidConfig
from permafrost.heads.necks.simple_pyramid import SimpleFeaturePyramid, resample
from permafrost.model.spec import FeatureSpec

STRIDES = (4, 8, 16, 32)


def build(stride, *, width=16, channels=6, seed=0, **options) -> SimpleFeaturePyramid:
    torch.manual_seed(seed)
    neck = SimpleFeaturePyramid(spec=FeatureSpec((width,), (stride,)), channels=channels, **options)
    with torch.no_grad():
        for parameter in neck.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return neck


def layer_norm(x, norm) -> np.ndarray:
    """x: (C, H, W)."""
    centred = x - x.mean(axis=0)
    scaled = centred / np.sqrt((centred**2).mean(axis=0) + norm.eps)
    return scaled * values(norm.weight)[:, None, None] + values(norm.bias)[:, None, None]


def values(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def deconvolution(x, conv) -> np.ndarray:
    """Every cell becomes 2 x 2 cells of its own."""
    blocks = np.einsum("chw,cdab->dhawb", x, values(conv.weight))
    return blocks.reshape(blocks.shape[0], 2 * x.shape[1], 2 * x.shape[2]) + values(conv.bias)[:, None, None]


def gelu(x) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def pool(x) -> np.ndarray:
    rows, columns = (-(-side // 2) for side in x.shape[1:])
    return np.stack(
        [
            np.stack([x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max(axis=(1, 2)) for j in range(columns)], -1)
            for i in range(rows)
        ],
        axis=1,
    )


def sample(x, stride, new_stride, dim) -> np.ndarray:
    """Linear interpolation of cell centres along one dimension, by pixel positions."""
    count = math.ceil(x.shape[dim] * stride / new_stride)
    centres = (np.arange(x.shape[dim]) + 0.5) * stride
    wanted = (np.arange(count) + 0.5) * new_stride
    return np.apply_along_axis(lambda line: np.interp(wanted, centres, line), dim, x)


def convolution(x, conv) -> np.ndarray:
    weight = values(conv.weight)
    margin = weight.shape[-1] // 2
    padded = np.pad(x, ((0, 0), (margin, margin), (margin, margin)))
    out = np.zeros((weight.shape[0], *x.shape[1:]))
    for a in range(weight.shape[2]):
        for b in range(weight.shape[3]):
            out += np.einsum("dc,chw->dhw", weight[:, :, a, b], padded[:, a : a + x.shape[1], b : b + x.shape[2]])
    return out


def derived(neck, x, stride) -> list[np.ndarray]:
    """The paper's section 3 and the rule for other strides than 16, written from their text."""
    x = layer_norm(x, neck.level_norms[0]) if neck.level_norms is not None else x
    levels = []
    for i, level_stride in enumerate(STRIDES):
        modules, y, own = list(neck.scale[i]), x, float(stride)
        if level_stride == 4:
            y = gelu(layer_norm(deconvolution(y, modules[0]), modules[1]))
            y, own = deconvolution(y, modules[3]), own / 4
        elif level_stride == 8:
            y, own = deconvolution(y, modules[0]), own / 2
        elif level_stride == 32:
            y, own = pool(y), own * 2
        if own != level_stride:
            size = [math.ceil(side * stride / level_stride) for side in x.shape[1:]]
            y = sample(sample(y, own, level_stride, 1), own, level_stride, 2)[:, : size[0], : size[1]]
        y = layer_norm(convolution(y, neck.lateral[i]), neck.lateral_norm[i])
        levels.append(layer_norm(convolution(y, neck.output[i]), neck.output_norm[i]))
    return levels


@pytest.mark.parametrize("level_norm", [True, False])
@pytest.mark.parametrize(("stride", "size"), [(16, (6, 4)), (16, (5, 3)), (14, (8, 5)), (14, (3, 7)), (14, (1, 1))])
def test_equals_its_derivation_in_float64(stride, size, level_norm) -> None:
    neck = build(stride, level_norm=level_norm).double()
    x = torch.randn(2, 16, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = neck([x])
    assert neck.strides == (*STRIDES, 64)
    for image in range(2):
        for level, expected in zip(found, derived(neck, x[image].numpy(), stride)):
            np.testing.assert_allclose(level[image].detach().numpy(), expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(found[4], found[3][:, :, ::2, ::2])


@pytest.mark.parametrize("stride", [8, 14, 16, 32])
@pytest.mark.parametrize("cells", [1, 2, 5, 8, 73])
def test_levels_have_the_size_of_the_padded_image(stride, cells) -> None:
    neck = build(stride, width=8, channels=2, num_extra_levels=2)
    levels = neck([torch.randn(1, 8, cells, 3)])
    sides = [-(-cells * stride // level) for level in STRIDES]
    sides += [-(-sides[-1] // 2), -(-sides[-1] // 4)]
    assert [level.shape[-2] for level in levels] == sides
    assert neck.strides == (4, 8, 16, 32, 64, 128)
    assert neck.num_backbone_levels == 4


@pytest.mark.parametrize("stride", [8, 14, 16, 32])
def test_a_cell_reaches_the_pixels_that_are_its_own(stride) -> None:
    """One cell of the map changes only what lies around its own pixels on every level: nothing is shifted or stretched."""
    neck = build(stride, width=8, channels=4, level_norm=False).double()
    x = torch.randn(1, 8, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    changed = x.clone()
    row, column = 9, 4
    changed[:, :, row, column] += torch.linspace(10.0, 20.0, 8, dtype=torch.float64)  # so that no pooling hides it
    for before, after, level in zip(neck([x]), neck([changed]), neck.strides[:4]):
        moved = (before != after).any(dim=1)[0].nonzero()
        for dim, cell in ((0, row), (1, column)):
            first, last = int(moved[:, dim].min()), int(moved[:, dim].max())
            # Its pixels, wider by what pooling joins it with, by the interpolation and by the 3x3 convolution.
            own = stride / 2 ** neck.doublings[STRIDES.index(level)]
            low, high = cell * stride, (cell + 1) * stride
            low, high = math.floor(low / own) * own, math.ceil(high / own) * own
            reach = level + (own / 2 + level / 2 if own != level else 0)
            assert low - reach <= (first + 0.5) * level - level / 2 + 1e-9
            assert (last + 0.5) * level + level / 2 <= high + reach + 1e-9
            assert first * level <= low + 1e-9
            assert (last + 1) * level >= high - 1e-9


@pytest.mark.parametrize(("stride", "new_stride"), [(3.5, 4), (14, 16), (28, 32), (5, 4)])
def test_resampling_a_ramp_gives_the_new_centres(stride, new_stride) -> None:
    """Along x, the value is the pixel position: what is sampled must be where the new cells are."""
    count = 24
    x = ((torch.arange(count, dtype=torch.float64) + 0.5) * stride).expand(1, 1, 2, count)
    found = resample(x, stride=stride, new_stride=new_stride)[0, 0, 0]
    size = math.ceil(count * stride / new_stride)
    expected = (torch.arange(size, dtype=torch.float64) + 0.5) * new_stride
    expected = expected.clamp(0.5 * stride, (count - 0.5) * stride)
    torch.testing.assert_close(found[:size], expected, rtol=1e-12, atol=1e-12)


def test_takes_bf16_maps_and_every_parameter_gets_a_gradient() -> None:
    """Parameters stay float32, whatever the map is in and whatever autocast surrounds it."""
    for level_norm in (True, False):
        neck = build(14, level_norm=level_norm)
        x = torch.randn(2, 16, 5, 6, generator=torch.Generator().manual_seed(3)).bfloat16()
        plain = neck([x])
        with torch.autocast("cpu", torch.bfloat16):
            mixed = neck([x])
        for a, b in zip(plain, mixed, strict=True):
            assert a.dtype == b.dtype == torch.float32
            assert (a - b).norm() / a.norm() < 0.03
        sum((level * torch.randn_like(level)).sum() for level in mixed[:4]).backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in neck.parameters())


def test_the_config_builds_what_it_says() -> None:
    spec = FeatureSpec((24,), (16,))
    neck = build_neck(SimplePyramidConfig(channels=8, num_extra_levels=0, level_norm=False), spec=spec)
    assert neck.strides == STRIDES
    assert neck.level_norms is None
    assert [conv.in_channels for conv in neck.lateral] == [6, 12, 24, 24]
    assert {conv.out_channels for conv in neck.output} == {8}
    with pytest.raises(HeadError, match="2 feature maps came in, the head was built for 1"):
        neck([torch.zeros(1, 24, 4, 4)] * 2)
