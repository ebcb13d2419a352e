"""Specify multi-scale deformable attention: the specification that the kernel is tested against, in plain PyTorch.

Shapes: B batch, S cells of all maps, Q queries, A heads, D head dim, N maps, P points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def deformable_attention_reference(
    value: Tensor, sizes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sum, over maps and points, weight times value at the point ("Deformable DETR", Zhu et al. 2021, equation 3).

    The centre of cell (row i, column j) of a map lies at ((j + 0.5) / width, (i + 0.5) / height); between centres values are
    interpolated bilinearly, and what lies outside the map is zero.

    Args:
        value: (B, S, A, D).
        sizes: (height, width) of each of the N maps.
        locations: (B, Q, A, N, P, 2), x and y.
        weights: (B, Q, A, N, P).

    Returns:
        (B, Q, A * D) in the dtype of `value`; computed in float32, or float64 if `value` is.
    """
    batch, _, heads, dims = value.shape
    queries = locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    maps = value.to(dtype).split([height * width for height, width in sizes], dim=1)
    # grid_sample counts from -1 to 1.
    grids = (2 * locations.to(dtype) - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    shares = weights.to(dtype).permute(3, 0, 2, 1, 4).flatten(1, 2)
    out = value.new_zeros(batch * heads, dims, queries, dtype=dtype)
    for own, size, grid, share in zip(maps, sizes, grids, shares, strict=True):
        image = own.permute(0, 2, 3, 1).reshape(batch * heads, dims, *size)
        read = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out + (read * share[:, None]).sum(dim=3)
    return out.view(batch, heads * dims, queries).mT.to(value.dtype).contiguous()
