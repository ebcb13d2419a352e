"""Compute window attention with PyTorch's own operators: kernels are timed against it, and their errors measured by it.

Shapes: B batch, H W map size, C channels, N windows, L tokens per window, A heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.model.kernels.window_attention.reference import SHIFT_PENALTY, scale_to_length


def materialise_bias(
    table: Tensor, *, height: int, width: int, window: int, shift: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Spread the position biases over all pairs of tokens, and the penalty of the shift over all windows.

    Args:
        table: (A, (2 * window - 1) ** 2).
        height: H.
        width: W.
        window: side of a window.
        shift: cyclic shift of the windows.
        dtype: of the result.

    Returns:
        (1, A, L, L), and (N of an image, 1, L, L) or None without a shift.
    """
    side = torch.arange(window, device=table.device)
    offset = side[:, None] - side[None, :] + window - 1
    index = (offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]).reshape(window**2, window**2)
    bias = table[None, :, index].to(dtype)
    if not shift:
        return bias, None
    sides = [-(-length // window) * window for length in (height, width)]
    below, beyond = (torch.arange(length, device=table.device) >= length - shift for length in sides)
    origin = (2 * below[:, None] + 1 * beyond[None, :]).view(sides[0] // window, window, sides[1] // window, window)
    origin = origin.permute(0, 2, 1, 3).reshape(-1, 1, window**2)
    return bias, (SHIFT_PENALTY * (origin[..., :, None] != origin[..., None, :])).to(dtype)


def partition(qkv: Tensor, qkv_bias: Tensor, num_heads: int, *, window: int, shift: int) -> Tensor:
    """Pad, roll and partition (B, H, W, 3 * C) into q, k and v, (3, N, A, L, D)."""
    batch, height, width, channels = qkv.shape
    down, across = -(-height // window), -(-width // window)
    if (down * window, across * window) != (height, width):
        padded = qkv_bias.expand(batch, down * window, across * window, channels).clone()
        padded[:, :height, :width] = qkv
        qkv = padded
    if shift:
        qkv = torch.roll(qkv, (-shift, -shift), dims=(1, 2))
    split = qkv.reshape(batch, down, window, across, window, 3, num_heads, -1)
    return split.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, num_heads, window**2, split.shape[-1])


def join(x: Tensor, height: int, width: int, *, window: int, shift: int) -> Tensor:
    """Put windows (N, A, L, D) back into their map (B, H, W, C)."""
    down, across = -(-height // window), -(-width // window)
    x = x.view(-1, down, across, x.shape[1], window, window, x.shape[3]).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(len(x), down * window, across * window, -1)
    if shift:
        x = torch.roll(x, (shift, shift), dims=(1, 2))
    return x[:, :height, :width].contiguous()


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, bias: Tensor, penalty: Tensor | None, *, cosine: bool, fused: bool
) -> Tensor:
    """Attend within windows: q, k, v (N, A, L, D) -> (N, A, L, D), in their dtype.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        scale: (A,).
        bias: (1, A, L, L).
        penalty: (N of an image, 1, L, L) or None.
        cosine: whether q and k are scaled to length 1.
        fused: scaled_dot_product_attention instead of a product, an addition, a softmax and a product.
    """
    scale = scale[:, None, None].to(torch.promote_types(q.dtype, torch.float32))
    q, k = (scale_to_length(q, scale), scale_to_length(k, 1.0)) if cosine else ((q * scale).to(q.dtype), k)
    if penalty is not None:
        bias = (bias + penalty).repeat(len(q) // len(penalty), 1, 1, 1)
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    return (q @ k.mT + bias).softmax(dim=-1) @ v


def window_attention_pytorch(
    qkv: Tensor,
    qkv_bias: Tensor,
    scale: Tensor,
    table: Tensor,
    *,
    window: int,
    shift: int,
    cosine: bool,
    fused: bool,
) -> Tensor:
    """Compute the same as the reference, in the dtype of `qkv` throughout; `fused` is `attend`'s."""
    height, width = qkv.shape[1:3]
    q, k, v = partition(qkv, qkv_bias, len(table), window=window, shift=shift)
    biases = materialise_bias(table, height=height, width=width, window=window, shift=shift, dtype=qkv.dtype)
    return join(attend(q, k, v, scale, *biases, cosine=cosine, fused=fused), height, width, window=window, shift=shift)
