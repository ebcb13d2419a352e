"""Add a branch with a norm at its end to the map around it, in one pass: x + norm(y), or norm'(x + norm(y)).

`residual_norm` is the one entry. The Triton kernel is the op `permafrost::residual_norm`, which torch.compile and CUDA graphs
see as a whole; it has no backward.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from permafrost.model.errors import BackboneError, KernelError
from permafrost.model.kernels.residual_norm.reference import residual_norm_reference

Kernel = Literal["triton", "reference"]

MAX_CHANNELS = 8192
"""Channels of a token that a program of the kernel can have in its registers."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def residual_norm(
    x: Tensor, y: Tensor, norm: nn.LayerNorm, extra: nn.LayerNorm | None = None, *, kernel: Kernel
) -> Tensor:
    """Add a branch, normalised, to the main one, as reference.py specifies.

    Args:
        x: (..., C), the main branch.
        y: (..., C), what the branch gives, in the dtype of `x`.
        norm: of the branch, over C, with weight and bias.
        extra: of the sum, likewise; None: there is none.
        kernel: what computes it. "triton" has no gradient.

    Returns:
        (..., C) in the dtype of `x`.

    Raises:
        BackboneError: if shapes or dtypes do not go together.
        KernelError: if the kernel does not take these tensors, or cannot be had here.
    """
    for one in (norm, extra):
        if one is not None and tuple(one.normalized_shape) != tuple(x.shape[-1:]):
            raise BackboneError(f"A norm over {tuple(one.normalized_shape)} does not fit {tuple(x.shape)}.")
    if x.shape != y.shape or x.dtype != y.dtype:
        raise BackboneError(
            f"Both branches have one shape and dtype, found {tuple(x.shape)} in {x.dtype} and {tuple(y.shape)} in {y.dtype}."
        )
    if kernel not in get_args(Kernel):
        raise BackboneError(f"There is no residual norm kernel {kernel!r}: {', '.join(get_args(Kernel))}.")
    constants = (norm.weight, norm.bias, norm.eps)
    others = None if extra is None else (extra.weight, extra.bias, extra.eps)
    if kernel == "reference":
        return residual_norm_reference(x, y, *constants, others)
    if torch.is_grad_enabled() and any(one.requires_grad for one in (x, y, norm.weight, norm.bias)):
        raise KernelError("The triton kernel of residual norm has no gradient, and one is needed.")
    if x.dtype not in DTYPES or x.shape[-1] > MAX_CHANNELS:
        raise KernelError(
            f"The triton kernel of residual norm takes {', '.join(map(str, DTYPES))} and up to {MAX_CHANNELS} channels, found "
            f"{x.dtype} and {x.shape[-1]}."
        )
    return _residual_norm(x, y, *constants, *(others or (None, None, 0.0)))


@torch.library.custom_op("permafrost::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    extra_weight: Tensor | None,
    extra_bias: Tensor | None,
    extra_eps: float,
) -> Tensor:
    try:
        from permafrost.model.kernels.residual_norm.triton import residual_norm_triton
    except ImportError as error:
        raise KernelError(f"The triton kernel of residual norm is not available: {error}.") from error
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        extra = None if extra_weight is None or extra_bias is None else (extra_weight, extra_bias, extra_eps)
        residual_norm_triton(x.contiguous(), y.contiguous(), weight, bias, eps, extra, out)
    return out


@_residual_norm.register_fake
def _(x, y, weight, bias, eps, extra_weight, extra_bias, extra_eps):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
