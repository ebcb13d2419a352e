"""Compute residual_norm in Triton: a program has a few tokens whole, so both maps are read once and the sum is written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048
"""Elements of a map in a program, where a token has fewer."""


@triton.jit
def _normalise(x, weight, bias, eps, columns, is_channel, CHANNELS: tl.constexpr):
    """Normalise rows in float32; what is beyond the channels becomes zero."""
    mean = tl.sum(x, axis=1) / CHANNELS
    centred = tl.where(is_channel[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / CHANNELS
    factor = 1.0 / tl.sqrt(variance + eps)
    scale = tl.load(weight + columns, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=is_channel, other=0.0).to(tl.float32)
    return centred * factor[:, None] * scale[None, :] + shift[None, :]


@triton.jit
def residual_norm_fwd_kernel(
    x,
    y,
    weight,
    bias,
    extra_weight,
    extra_bias,
    out,
    num_tokens,
    eps,
    extra_eps,
    CHANNELS: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # (TOKENS,)
    columns = tl.arange(0, BLOCK)  # (BLOCK,), a power of two that holds all channels
    is_channel = columns < CHANNELS
    place = tokens[:, None] * CHANNELS + columns[None, :]  # (TOKENS, BLOCK), as all that follow
    inside = (tokens < num_tokens)[:, None] & is_channel[None, :]
    branch = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    total += _normalise(branch, weight, bias, eps, columns, is_channel, CHANNELS)
    if HAS_EXTRA:
        total = _normalise(total, extra_weight, extra_bias, extra_eps, columns, is_channel, CHANNELS)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def launch_options(channels: int, *, has_extra: bool) -> dict[str, int | bool]:
    """Return the constants a kernel is compiled with, and the warps of its programs."""
    block = triton.next_power_of_2(channels)
    tokens = max(1, ELEMENTS // block)
    return {
        "CHANNELS": channels,
        "HAS_EXTRA": has_extra,
        "TOKENS": tokens,
        "BLOCK": block,
        "num_warps": min(16, max(4, block * tokens // 512)),
    }


def residual_norm_triton(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    extra: tuple[Tensor, Tensor, float] | None,
    out: Tensor,
) -> None:
    """Fill `out` with what the reference says.

    Args:
        x, y, out: (..., C), contiguous.
        weight, bias: (C,).
        eps, extra: as in the reference.
    """
    channels = x.shape[-1]
    num_tokens = x.numel() // channels
    options = launch_options(channels, has_extra=extra is not None)
    # Never read where there is no extra norm.
    extra_weight, extra_bias, extra_eps = extra or (weight, bias, eps)
    grid = (triton.cdiv(num_tokens, options["TOKENS"]),)
    residual_norm_fwd_kernel[grid](
        x, y, weight, bias, extra_weight, extra_bias, out, num_tokens, eps, extra_eps, **options
    )
