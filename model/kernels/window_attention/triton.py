"""Compute window attention in Triton: a program attends with a tile of one window's queries, of one head, to all its keys.

Rows of the map are gathered where the shift finds them and written back there, so nothing is padded, rolled or
partitioned; the position bias is gathered from its compact table, the mask is a comparison of coordinates. The softmax
is computed as the keys come by (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018), which
serves a window of any size with the same registers.

Tiles of Triton are powers of two. The keys of windows of 8, 16 and 24 (64, 256, 576) are whole tiles of 64; those of
windows of 12 (144) are tiles of 32 with a ninth to spare.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from permafrost.model.kernels.window_attention.reference import SHIFT_PENALTY

# exp2 is what the hardware has.
_LOG2_E = tl.constexpr(1.4426950408889634)
_PENALTY = tl.constexpr(SHIFT_PENALTY)


@triton.jit
def _unit_rows(x):
    """Scale the rows of x to length 1, in float32; zero stays zero."""
    x = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    factor = tl.where(norm > 0.0, 1.0 / tl.maximum(norm, 1e-12), 0.0)
    return x * factor[:, None]


@triton.jit
def _token(number, window_row, window_column, height, width, down, across, shift, WINDOW: tl.constexpr):
    """Locate the tokens of a window.

    Returns:
        Row and column in the window; row and column in the padded map, before it was rolled; from across which border.
    """
    row, column = number // WINDOW, number % WINDOW
    y = window_row * WINDOW + row + shift
    x = window_column * WINDOW + column + shift
    is_below, is_beyond = y >= down * WINDOW, x >= across * WINDOW
    y = tl.where(is_below, y - down * WINDOW, y)
    x = tl.where(is_beyond, x - across * WINDOW, x)
    return row, column, y, x, 2 * is_below.to(tl.int32) + is_beyond.to(tl.int32)


@triton.jit
def window_attention_fwd_kernel(
    qkv,
    qkv_bias,
    scale,
    table,
    out,
    height,
    width,
    down,
    across,
    shift,
    qkv_image_stride,
    out_image_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    COSINE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Attend with a tile of Q queries to K keys at a time, D dims a head; a window's heads, neighbours in the grid, share its rows."""
    CHANNELS: tl.constexpr = NUM_HEADS * HEAD_DIM
    TOKENS: tl.constexpr = WINDOW * WINDOW
    SIDE: tl.constexpr = 2 * WINDOW - 1
    NUM_TILES: tl.constexpr = (TOKENS + BLOCK_QUERIES - 1) // BLOCK_QUERIES
    program = tl.program_id(0)
    head = program % NUM_HEADS
    tile = program // NUM_HEADS % NUM_TILES
    place = program // (NUM_HEADS * NUM_TILES)
    window_column = place % across
    window_row = place // across % down
    image = (place // (across * down)).to(tl.int64)

    dims = tl.arange(0, HEAD_DIM)  # (D,)
    factor = tl.load(scale + head).to(tl.float32) * _LOG2_E
    qkv += image * qkv_image_stride + head * HEAD_DIM
    out += image * out_image_stride + head * HEAD_DIM
    qkv_bias += head * HEAD_DIM
    table += head.to(tl.int64) * (SIDE * SIDE)

    query = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)  # (Q,)
    q_row, q_column, q_y, q_x, q_origin = _token(
        query, window_row, window_column, height, width, down, across, shift, WINDOW
    )
    q_wanted = (query < TOKENS) & (q_y < height) & (q_x < width)  # (Q,)
    q_place = q_y.to(tl.int64) * width + q_x
    q = tl.load(qkv + (q_place * (3 * CHANNELS))[:, None] + dims[None, :], mask=q_wanted[:, None], other=0.0)
    if COSINE:
        q = _unit_rows(q).to(qkv.dtype.element_ty)  # (Q, D)
    # The entry of a pair in the table is q_entry less the key's row * SIDE + column.
    q_entry = (q_row + WINDOW - 1) * SIDE + q_column + WINDOW - 1

    # Padding is zeros before the projection, so its keys and values are the projection's biases.
    k_of_padding = tl.load(qkv_bias + CHANNELS + dims)  # (D,)
    v_of_padding = tl.load(qkv_bias + 2 * CHANNELS + dims)
    largest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    mean = tl.zeros((BLOCK_QUERIES, HEAD_DIM), tl.float32)
    for first in range(0, TOKENS, BLOCK_KEYS):
        key = first + tl.arange(0, BLOCK_KEYS)  # (K,)
        k_row, k_column, k_y, k_x, k_origin = _token(
            key, window_row, window_column, height, width, down, across, shift, WINDOW
        )
        is_token = key < TOKENS
        is_inside = is_token & (k_y < height) & (k_x < width)
        k_place = k_y.to(tl.int64) * width + k_x
        row = qkv + (k_place * (3 * CHANNELS))[:, None] + dims[None, :]
        k = tl.load(row + CHANNELS, mask=is_inside[:, None], other=0.0)
        v = tl.load(row + 2 * CHANNELS, mask=is_inside[:, None], other=0.0)
        k = tl.where(is_inside[:, None], k, k_of_padding[None, :])  # (K, D)
        v = tl.where(is_inside[:, None], v, v_of_padding[None, :])
        if COSINE:
            k = _unit_rows(k).to(qkv.dtype.element_ty)
        entry = q_entry[:, None] - (k_row * SIDE + k_column)[None, :]  # (Q, K)
        is_pair = (query < TOKENS)[:, None] & is_token[None, :]
        bias = tl.load(table + entry, mask=is_pair, other=0.0).to(tl.float32)  # (Q, K)
        bias += tl.where(q_origin[:, None] != k_origin[None, :], _PENALTY, 0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION) * factor + bias * _LOG2_E
        logits = tl.where(is_token[None, :], logits, float("-inf"))  # (Q, K), in units of log2
        # A larger logit shrinks what was summed with the smaller one subtracted.
        before = largest  # (Q,)
        largest = tl.maximum(before, tl.max(logits, axis=1))
        weights = tl.exp2(logits - largest[:, None])  # (Q, K)
        shrink = tl.exp2(before - largest)
        total = total * shrink + tl.sum(weights, axis=1)
        mean = mean * shrink[:, None]  # (Q, D)
        mean += tl.dot(weights.to(qkv.dtype.element_ty), v, input_precision=INPUT_PRECISION)
    mean /= total[:, None]
    to = out + (q_place * CHANNELS)[:, None] + dims[None, :]
    tl.store(to, mean.to(out.dtype.element_ty), mask=q_wanted[:, None])


def block_size(tokens: int, head_dim: int, dtype: str) -> int:
    """Return the rows of a tile: the largest power of two up to 64 whose last tile wastes little.

    float32, which is multiplied without tensor cores, keeps to tiles whose operands fit the registers.

    Args:
        tokens: tokens per window L.
        head_dim: D.
        dtype: "float32", "float16" or "bfloat16".
    """
    fewest = -(-tokens // 16) * 16
    largest = 64 if dtype != "float32" else 1024 // head_dim
    return next(size for size in (64, 32, 16) if size <= largest and -(-tokens // size) * size <= 1.2 * fewest)


def launch_options(num_heads: int, head_dim: int, window: int, *, cosine: bool, dtype: str) -> dict[str, Any]:
    """Return the constants a kernel is compiled with, and the warps of its programs.

    Args:
        num_heads: heads A.
        head_dim: D.
        window: side of a window.
        cosine: as in the reference.
        dtype: "float32", "float16" or "bfloat16".
    """
    size = block_size(window * window, head_dim, dtype)
    return {
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "WINDOW": window,
        "COSINE": cosine,
        # float32 is asked for where its digits are wanted.
        "INPUT_PRECISION": "ieee" if dtype == "float32" else "tf32",
        "BLOCK_QUERIES": size,
        "BLOCK_KEYS": size,
        "num_warps": 4 if size == 64 or dtype == "float32" else 2,
    }


def window_attention_triton(
    qkv: Tensor, qkv_bias: Tensor, scale: Tensor, table: Tensor, out: Tensor, *, window: int, shift: int, cosine: bool
) -> None:
    """Fill `out` (B, H, W, C) with what the reference says.

    Args:
        qkv: (B, H, W, 3 * C); images may lie anywhere, each is contiguous.
        qkv_bias: (3 * C,), in the dtype of `qkv`.
        scale: (A,), float32.
        table: (A, (2 * window - 1) ** 2), float32.
        out: as `qkv`.
        window, shift, cosine: as in the reference.
    """
    batch, height, width, channels = out.shape
    num_heads = len(table)
    dtype = str(qkv.dtype).removeprefix("torch.")
    options = launch_options(num_heads, channels // num_heads, window, cosine=cosine, dtype=dtype)
    down, across = -(-height // window), -(-width // window)
    grid = (batch * down * across * -(-(window**2) // options["BLOCK_QUERIES"]) * num_heads,)
    window_attention_fwd_kernel[grid](
        qkv, qkv_bias, scale, table, out, height, width, down, across, shift, qkv.stride(0), out.stride(0), **options
    )
