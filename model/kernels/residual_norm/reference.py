"""Specify residual_norm: the specification that every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Apply layer normalisation (Ba, Kiros and Hinton, 2016) over the last dim, in the dtype of `x`."""
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred * (variance + eps).rsqrt() * weight.to(x.dtype) + bias.to(x.dtype)


def residual_norm_reference(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    extra: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Add a branch that is normalised at its end to the map around it: x + norm(y), or norm'(x + norm(y)).

    This is the res-post-norm of "Swin Transformer V2" (section 3.2); the extra norm on the main branch is that of its
    largest models (section 3.4). Computed in float32 at least, and rounded once.

    Args:
        x: (..., C), the main branch.
        y: (..., C), what the branch gives.
        weight: (C,), of the branch's norm.
        bias: (C,), likewise.
        eps: added to the variance, likewise.
        extra: weight, bias and eps of the norm on the main branch; None: there is none.

    Returns:
        (..., C), contiguous, in the dtype of `x`.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    total = x.to(precise) + layer_norm(y.to(precise), weight, bias, eps)
    if extra is not None:
        total = layer_norm(total, *extra)
    return total.to(x.dtype).contiguous()
