"""The gradient by matrix products against torchvision's kernel."""

from __future__ import annotations

import pytest
import torch
import torchvision.ops

from permafrost.heads.detection import roi_align as module
from permafrost.heads.detection.roi_align import bin_weights, roi_align


def regions_of_all_kinds(dtype) -> torch.Tensor:
    """Inside, beyond every border, outside, thin, empty, reversed, larger than the map; in two of three images."""
    random = torch.Generator().manual_seed(0)
    xy = torch.rand(40, 2, generator=random, dtype=torch.float64) * 160 - 40
    boxes = torch.cat([xy, xy + torch.rand(40, 2, generator=random, dtype=torch.float64) ** 2 * 120], dim=1)
    special = torch.tensor(
        [[10, 10, 10, 10], [10, 10, 10.5, 90], [30, 30, 20, 10], [-300, -300, 400, 400], [500, 500, 600, 600]],
        dtype=torch.float64,
    )
    boxes = torch.cat([boxes, special])
    image = torch.randint(0, 2, (len(boxes), 1), generator=random) * 2
    return torch.cat([image.double(), boxes], dim=1).to(dtype)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_gradient_equals_torchvision(aligned, sampling_ratio, dtype, tolerance) -> None:
    regions = regions_of_all_kinds(dtype)
    options = {"spatial_scale": 0.25, "sampling_ratio": sampling_ratio, "aligned": aligned}
    ours = torch.randn(3, 5, 30, 23, dtype=dtype, generator=torch.Generator().manual_seed(1), requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    found, expected = roi_align(ours, regions, 7, **options), torchvision.ops.roi_align(theirs, regions, 7, **options)
    assert "DenseGradient" in type(found.grad_fn).__name__
    assert torch.equal(found, expected)
    weight = torch.randn(found.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    assert ours.grad[0].any()
    assert not ours.grad[1].any()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance * 10)


def test_no_regions_give_a_zero_gradient() -> None:
    level = torch.randn(2, 3, 8, 8, requires_grad=True)
    pooled = roi_align(level, torch.zeros(0, 5), 7, spatial_scale=0.25, sampling_ratio=0, aligned=True)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert torch.equal(level.grad, torch.zeros_like(level))


def test_large_maps_take_the_kernel(monkeypatch) -> None:
    level = torch.randn(1, 3, 8, 8, requires_grad=True)
    options = {"spatial_scale": 0.25, "sampling_ratio": 2, "aligned": True}
    region = torch.tensor([[0.0, 3, 3, 20, 20]])
    monkeypatch.setattr(module, "MAX_DENSE_CELLS", 63)
    assert "DenseGradient" not in type(roi_align(level, region, 7, **options).grad_fn).__name__
    monkeypatch.setattr(module, "MAX_DENSE_CELLS", 64)
    assert "DenseGradient" in type(roi_align(level, region, 7, **options).grad_fn).__name__


def test_bin_weights_by_hand() -> None:
    """Cells 0..3, a region from 0.5 to 2.5 in two bins: one sample at each bin's centre, 1.0 and 2.0."""
    start, end = torch.tensor([0.5]), torch.tensor([2.5])
    weights = bin_weights(start, end, num_bins=2, num_cells=4, sampling_ratio=1)
    assert weights.tolist() == [[[0, 1, 0, 0], [0, 0, 1, 0]]]
    # Two samples per bin: 0.75 and 1.25, 1.75 and 2.25.
    weights = bin_weights(start, end, num_bins=2, num_cells=4, sampling_ratio=2)
    assert weights.tolist() == [[[0.125, 0.75, 0.125, 0], [0, 0.125, 0.75, 0.125]]]


def test_a_plan_for_a_gpu_uses_the_kernels_own_gradient() -> None:
    level = torch.zeros(1, 2, 8, 8, requires_grad=True)
    region = torch.tensor([[0.0, 0.0, 0.0, 16.0, 16.0]])
    options = {"spatial_scale": 0.25, "sampling_ratio": 2, "aligned": True}
    with module.kernels_of("cuda"):
        assert "DenseGradient" not in type(roi_align(level, region, 7, **options).grad_fn).__name__
    with module.kernels_of("cpu"):
        assert "DenseGradient" in type(roi_align(level, region, 7, **options).grad_fn).__name__
    assert module.MAX_DENSE_CELLS > 0
