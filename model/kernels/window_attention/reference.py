"""Specify window attention: the specification that every kernel is tested against.

The shortest way to write it, not a fast one: it pads, rolls, partitions and materialises everything that the kernels
avoid. Its gradients are those of autograd.

Shapes: B batch, H W map size, C channels, N windows, L tokens per window (window * window), A heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the logits between tokens that are neighbours only because of the cyclic shift. Finite, as in the released
# models: with a logit scale of up to 100 it weighs against them without always removing them.
SHIFT_PENALTY = -100.0


def scale_to_length(x: Tensor, length: Tensor | float) -> Tensor:
    """Scale vectors (..., D) to a length; zero stays zero, and has no gradient. Norms are at least in float32."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(precise, dim=-1, keepdim=True)
    return (precise * (length / norm.clamp_min(1e-12) * (norm > 0))).to(x.dtype)


def window_attention_reference(
    qkv: Tensor, qkv_bias: Tensor, scale: Tensor, table: Tensor, *, window: int, shift: int, cosine: bool
) -> Tensor:
    """Attend within (shifted) windows of a map.

    The map is padded at the bottom and the right to whole windows, and only then rolled. A padded token is what the
    projection makes of a zero: its query, key and value are `qkv_bias`, and it is attended to like any other.

    Of query i and key j of a window the logit is `scale * <q_i, k_j> + table[offset of i from j]`, plus SHIFT_PENALTY
    where one of the two, and not the other, came from across the map's border; q and k have length 1 if `cosine`
    (equation 2 of the SwinV2 paper; Swin V1, equation 4 of its paper, otherwise). A vector of zeros stays zero.

    Args:
        qkv: (B, H, W, 3 * C), the projection of the tokens with its bias: q, k, v, each with its heads side by side.
        qkv_bias: (3 * C,), the bias of that projection.
        scale: (A,), the factor of the inner products.
        table: (A, (2 * window - 1) ** 2), the position bias of every offset, rows outermost.
        window: side of a window.
        shift: cyclic shift of the windows, below `window`; needs H and W above `window` if it is not 0.
        cosine: whether q and k are scaled to length 1.

    Returns:
        (B, H, W, C) in the dtype of `qkv`; computed in float32, or float64 if `qkv` is.
    """
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    batch, height, width, channels = qkv.shape
    num_heads, pad_bottom, pad_right = len(table), -height % window, -width % window
    padded = qkv_bias.to(dtype).expand(batch, height + pad_bottom, width + pad_right, channels).clone()
    padded[:, :height, :width] = qkv.to(dtype)
    rolled = torch.roll(padded, (-shift, -shift), dims=(1, 2))
    down, across = rolled.shape[1] // window, rolled.shape[2] // window
    split = rolled.view(batch, down, window, across, window, 3, num_heads, -1)
    q, k, v = split.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, num_heads, window**2, split.shape[-1])
    if cosine:
        q, k = scale_to_length(q, 1.0), scale_to_length(k, 1.0)

    side = torch.arange(window, device=qkv.device)
    offset = side[:, None] - side[None, :] + window - 1
    index = offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]
    logits = (q @ k.mT) * scale.to(dtype)[:, None, None] + table.to(dtype)[:, index.reshape(window**2, window**2)]
    if shift:
        # Tokens from across the border: the lowest rows of the lowest windows, the rightmost columns of the rightmost.
        below = torch.arange(down * window, device=qkv.device) >= down * window - shift
        beyond = torch.arange(across * window, device=qkv.device) >= across * window - shift
        origin = (2 * below[:, None] + 1 * beyond[None, :]).view(down, window, across, window)
        origin = origin.permute(0, 2, 1, 3).reshape(down * across, 1, window**2)
        penalty = SHIFT_PENALTY * (origin[..., :, None] != origin[..., None, :])
        logits = logits + penalty.to(dtype).repeat(batch, 1, 1, 1)
    x = logits.softmax(dim=-1) @ v
    x = x.view(batch, down, across, num_heads, window, window, -1).permute(0, 1, 4, 2, 5, 3, 6)
    x = torch.roll(x.reshape(*rolled.shape[:3], -1), (shift, shift), dims=(1, 2))
    return x[:, :height, :width].to(qkv.dtype).contiguous()
