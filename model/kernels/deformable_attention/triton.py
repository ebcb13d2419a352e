"""Compute multi-scale deformable attention in Triton: a program reads for a tile of queries, of one head.

Nothing is materialised: the reference keeps all D * P * N values that a query reads, here they are summed as they come, and
the backward reads them again. Values of neighbouring queries lie near one another, which the caches serve.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32
"""Queries of a program."""
NUM_WARPS = 4


@triton.jit
def _cells(location, weight, at, wanted, height, width):
    """Locate points: return the upper left of the four cells around each, how far beyond its centre, and the point's weight."""
    x = tl.load(location + 2 * at, mask=wanted, other=0.0).to(tl.float32) * width - 0.5
    y = tl.load(location + 2 * at + 1, mask=wanted, other=0.0).to(tl.float32) * height - 0.5
    share = tl.load(weight + at, mask=wanted, other=0.0).to(tl.float32)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top, share


@triton.jit
def _place(column, row, wanted, height, width, STRIDE: tl.constexpr):
    """Return offsets of cells from their map's first, and which of them lie inside."""
    inside = wanted & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return (row.to(tl.int64) * width + column) * STRIDE, inside


@triton.jit
def _read(base, column, row, wanted, dims, height, width, STRIDE: tl.constexpr):
    """Load the values (queries, dims) of cells, zero outside the map."""
    offset, inside = _place(column, row, wanted, height, width, STRIDE)
    return tl.load(base + offset[:, None] + dims[None, :], mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def _add(base, column, row, wanted, dims, amount, height, width, STRIDE: tl.constexpr):
    """Add amounts (queries, dims) to cells, as far as they lie inside the map."""
    offset, inside = _place(column, row, wanted, height, width, STRIDE)
    tl.atomic_add(base + offset[:, None] + dims[None, :], amount, mask=inside[:, None])


@triton.jit
def deformable_attention_fwd_kernel(
    value,
    levels,
    locations,
    weights,
    out,
    num_queries,
    num_cells,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    NUM_POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fill `out`; `levels` holds height, width and first cell of each map. Q is BLOCK, D is HEAD_DIM."""
    STRIDE: tl.constexpr = NUM_HEADS * HEAD_DIM
    program = tl.program_id(0)
    num_tiles = tl.cdiv(num_queries, BLOCK)
    head = program % NUM_HEADS
    tile = program // NUM_HEADS % num_tiles
    image = (program // (NUM_HEADS * num_tiles)).to(tl.int64)
    query = tile * BLOCK + tl.arange(0, BLOCK)  # (Q,)
    wanted = query < num_queries
    dims = tl.arange(0, HEAD_DIM)  # (D,)
    entry = (image * num_queries + query) * NUM_HEADS + head  # (Q,)
    total = tl.zeros((BLOCK, HEAD_DIM), tl.float32)  # (Q, D)
    for level in range(NUM_LEVELS):
        height = tl.load(levels + 3 * level)
        width = tl.load(levels + 3 * level + 1)
        base = value + (image * num_cells + tl.load(levels + 3 * level + 2)) * STRIDE + head * HEAD_DIM
        for point in range(NUM_POINTS):
            at = (entry * NUM_LEVELS + level) * NUM_POINTS + point
            left, top, right_of, below, share = _cells(locations, weights, at, wanted, height, width)  # (Q,) each
            upper = _read(base, left, top, wanted, dims, height, width, STRIDE) * (1 - right_of)[:, None]
            upper += _read(base, left + 1, top, wanted, dims, height, width, STRIDE) * right_of[:, None]
            lower = _read(base, left, top + 1, wanted, dims, height, width, STRIDE) * (1 - right_of)[:, None]
            lower += _read(base, left + 1, top + 1, wanted, dims, height, width, STRIDE) * right_of[:, None]
            # Bilinear: along the rows in `upper` and `lower`, (Q, D), then between them.
            total += (share * (1 - below))[:, None] * upper + (share * below)[:, None] * lower
    to = out + (entry * HEAD_DIM)[:, None] + dims[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=wanted[:, None])


@triton.jit
def deformable_attention_bwd_kernel(
    grad,
    value,
    levels,
    locations,
    weights,
    grad_value,
    grad_locations,
    grad_weights,
    num_queries,
    num_cells,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    NUM_POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to `grad_value` (float32, zero at first) and fill the other two gradients."""
    STRIDE: tl.constexpr = NUM_HEADS * HEAD_DIM
    program = tl.program_id(0)
    num_tiles = tl.cdiv(num_queries, BLOCK)
    head = program % NUM_HEADS
    tile = program // NUM_HEADS % num_tiles
    image = (program // (NUM_HEADS * num_tiles)).to(tl.int64)
    query = tile * BLOCK + tl.arange(0, BLOCK)  # (Q,)
    wanted = query < num_queries
    dims = tl.arange(0, HEAD_DIM)  # (D,)
    entry = (image * num_queries + query) * NUM_HEADS + head  # (Q,)
    from_above = tl.load(grad + (entry * HEAD_DIM)[:, None] + dims[None, :], mask=wanted[:, None], other=0.0)
    from_above = from_above.to(tl.float32)  # (Q, D)
    for level in range(NUM_LEVELS):
        height = tl.load(levels + 3 * level)
        width = tl.load(levels + 3 * level + 1)
        first = (image * num_cells + tl.load(levels + 3 * level + 2)) * STRIDE + head * HEAD_DIM
        base = value + first
        to = grad_value + first
        for point in range(NUM_POINTS):
            at = (entry * NUM_LEVELS + level) * NUM_POINTS + point
            left, top, right_of, below, share = _cells(locations, weights, at, wanted, height, width)
            # The products (Q,) of the gradient from above with each of the four cells' values.
            g00 = tl.sum(from_above * _read(base, left, top, wanted, dims, height, width, STRIDE), axis=1)
            g10 = tl.sum(from_above * _read(base, left + 1, top, wanted, dims, height, width, STRIDE), axis=1)
            g01 = tl.sum(from_above * _read(base, left, top + 1, wanted, dims, height, width, STRIDE), axis=1)
            g11 = tl.sum(from_above * _read(base, left + 1, top + 1, wanted, dims, height, width, STRIDE), axis=1)
            upper = g00 * (1 - right_of) + g10 * right_of
            lower = g01 * (1 - right_of) + g11 * right_of
            to_share = upper * (1 - below) + lower * below
            to_x = share * width * ((g10 - g00) * (1 - below) + (g11 - g01) * below)
            to_y = share * height * (lower - upper)
            tl.store(grad_weights + at, to_share.to(grad_weights.dtype.element_ty), mask=wanted)
            tl.store(grad_locations + 2 * at, to_x.to(grad_locations.dtype.element_ty), mask=wanted)
            tl.store(grad_locations + 2 * at + 1, to_y.to(grad_locations.dtype.element_ty), mask=wanted)
            above, beneath = share * (1 - below), share * below
            amount = (above * (1 - right_of))[:, None] * from_above  # (Q, D)
            _add(to, left, top, wanted, dims, amount, height, width, STRIDE)
            amount = (above * right_of)[:, None] * from_above
            _add(to, left + 1, top, wanted, dims, amount, height, width, STRIDE)
            amount = (beneath * (1 - right_of))[:, None] * from_above
            _add(to, left, top + 1, wanted, dims, amount, height, width, STRIDE)
            amount = (beneath * right_of)[:, None] * from_above
            _add(to, left + 1, top + 1, wanted, dims, amount, height, width, STRIDE)


def launch_options(num_heads: int, head_dim: int, num_levels: int, num_points: int) -> dict[str, int]:
    """Return the constants both kernels are compiled with, and the warps of their programs."""
    return {
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "NUM_LEVELS": num_levels,
        "NUM_POINTS": num_points,
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS,
    }


def _launch(kernel, value: Tensor, sizes: list[int], locations: Tensor, before: tuple, after: tuple) -> None:
    batch, num_cells, heads, dims = value.shape
    num_queries, num_levels, num_points = locations.shape[1], *locations.shape[3:5]
    table, first = [], 0
    for height, width in zip(sizes[::2], sizes[1::2]):
        table += [height, width, first]
        first += height * width
    levels = torch.tensor(table, dtype=torch.int32).to(value.device, non_blocking=True)
    grid = (batch * -(-num_queries // BLOCK) * heads,)
    options = launch_options(heads, dims, num_levels, num_points)
    kernel[grid](*before, value, levels, locations, *after, num_queries, num_cells, **options)


def forward(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor, out: Tensor) -> None:
    """Fill `out` (B, Q, A * D) with what the reference says; `sizes` are heights and widths in turn, tensors contiguous."""
    _launch(deformable_attention_fwd_kernel, value, sizes, locations, (), (weights, out))


def backward(
    grad: Tensor,
    value: Tensor,
    sizes: list[int],
    locations: Tensor,
    weights: Tensor,
    grad_value: Tensor,
    grad_locations: Tensor,
    grad_weights: Tensor,
) -> None:
    """Add to `grad_value`, which is float32 and zero, and fill the gradients of locations and weights."""
    grads = (grad_value, grad_locations, grad_weights)
    _launch(deformable_attention_bwd_kernel, value, sizes, locations, (grad,), (weights, *grads))
