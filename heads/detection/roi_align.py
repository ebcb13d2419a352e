"""Compute RoIAlign (He et al. 2017): torchvision's kernels, with a quicker gradient for small maps on a CPU.

torchvision's CPU kernel for the gradient adds one sample at a time on one thread, and takes a third of a small head's
training step. Bilinear sampling on a grid is separable: a pooled region is Y F Xᵀ, with a weight matrix per direction.
So the gradient for the map F is the sum over regions of Yᵀ G X, two matrix products, which win while the map is small.

Shapes: B images, C channels, H W size of the map, R regions, S side of the pooled grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchvision.ops
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_DENSE_CELLS = 64 * 64
"""Largest H * W whose gradient is taken by matrix products; their cost grows with it, the kernel's does not."""


def roi_align(
    level: Tensor, regions: Tensor, resolution: int, *, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Pool as torchvision.ops.roi_align, the same to rounding in value and gradient.

    Args:
        level: (B, C, H, W) float map.
        regions: (R, 5) of the same dtype: image index, then xyxy in pixels.
        resolution: S.
        spatial_scale: cells per pixel.
        sampling_ratio: samples per bin and direction, 0 for one per cell the bin covers.
        aligned: whether cell centres lie at half coordinates.

    Returns:
        (R, C, S, S).
    """
    if level.device.type == "cpu" and level.requires_grad and level.shape[-2] * level.shape[-1] <= MAX_DENSE_CELLS:
        return _DenseGradient.apply(level, regions, resolution, spatial_scale, sampling_ratio, aligned)
    return torchvision.ops.roi_align(level, regions, resolution, spatial_scale, sampling_ratio, aligned)


@contextmanager
def kernels_of(device_type: str) -> Iterator[None]:
    """Compute on a CPU with the kernels of such a device: the gradient by matrix products takes more memory than the others'."""
    global MAX_DENSE_CELLS
    limit = MAX_DENSE_CELLS
    if device_type != "cpu":
        MAX_DENSE_CELLS = 0
    try:
        yield
    finally:
        MAX_DENSE_CELLS = limit


def bin_weights(start: Tensor, end: Tensor, *, num_bins: int, num_cells: int, sampling_ratio: int) -> Tensor:
    """Return how much each cell of one axis counts in each bin of each region.

    Args:
        start: (R,) in cells, 0 being the centre of the first one.
        end: (R,) likewise.
        num_bins: S.
        num_cells: H or W.
        sampling_ratio: as in roi_align.

    Returns:
        (R, S, num_cells); a row sums to 1 unless samples lie more than a cell outside the map, which count as 0.
    """
    bin_size = (end - start) / num_bins
    num_samples = torch.full_like(bin_size, sampling_ratio) if sampling_ratio else bin_size.ceil().clamp(min=0)
    most = int(num_samples.max()) if len(num_samples) else 0
    sample = torch.arange(most, dtype=start.dtype)
    step = (sample + 0.5) / num_samples[:, None].clamp(min=1)
    bins = torch.arange(num_bins, dtype=start.dtype)[:, None]
    position = start[:, None, None] + (bins + step[:, None]) * bin_size[:, None, None]
    counted = (sample < num_samples[:, None])[:, None] & (position >= -1) & (position <= num_cells)
    position = position.clamp(0, num_cells - 1)
    # The bilinear weight of a cell is a hat of width 1 around it.
    weights = (1 - (position[..., None] - torch.arange(num_cells, dtype=start.dtype)).abs()).clamp(min=0)
    weights = weights.masked_fill(~counted[..., None], 0.0).sum(dim=2)
    return weights / num_samples[:, None, None].clamp(min=1)


class _DenseGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        level: Tensor,
        regions: Tensor,
        resolution: int,
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool,
    ) -> Tensor:
        ctx.save_for_backward(regions)
        ctx.options = level.shape, resolution, spatial_scale, sampling_ratio, aligned
        return torchvision.ops.roi_align(level, regions, resolution, spatial_scale, sampling_ratio, aligned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (regions,) = ctx.saved_tensors
        (batch_size, channels, height, width), resolution, spatial_scale, sampling_ratio, aligned = ctx.options
        corners = regions[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
        start, end = corners[:, :2], corners[:, 2:]
        if not aligned:
            # The first RoIAlign stretches what is smaller than a cell.
            end = torch.maximum(end, start + 1)
        options = {"num_bins": resolution, "sampling_ratio": sampling_ratio}
        weights_x = bin_weights(start[:, 0], end[:, 0], num_cells=width, **options)
        weights_y = bin_weights(start[:, 1], end[:, 1], num_cells=height, **options)

        grad_level = grad.new_zeros(batch_size, channels, height, width)
        grad = grad.transpose(1, 2)
        image_index = regions[:, 0].to(torch.int64)
        for i in range(batch_size):
            own = torch.nonzero(image_index == i)[:, 0]
            if not len(own):
                continue
            # (R, S * C, S) @ (R, S, W): rows of the grid spread over the map's columns, then over its rows.
            spread = grad[own].reshape(len(own), resolution * channels, resolution) @ weights_x[own]
            spread = spread.view(len(own) * resolution, channels * width)
            image_grad = weights_y[own].view(len(own) * resolution, height).T @ spread
            grad_level[i] = image_grad.view(height, channels, width).transpose(0, 1)
        return grad_level, None, None, None, None, None
