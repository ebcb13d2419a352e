"""Multi-scale deformable attention: every query reads a few points of every level of a pyramid.

`deformable_attention` is the one entry. "reference" is plain PyTorch and differentiable anywhere, in float64 too; "triton" is
the op `permafrost::deformable_attention`, with a backward of its own, which torch.compile sees as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from permafrost.model.errors import KernelError
from permafrost.model.kernels.deformable_attention.reference import deformable_attention_reference

Kernel = Literal["reference", "triton"]

HEAD_DIMS = (16, 32, 64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def deformable_attention(
    value: Tensor, sizes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, *, kernel: Kernel
) -> Tensor:
    """Sum weighted values read at points between the cells of several maps, as reference.py specifies.

    The Triton kernel takes 16, 32 or 64 dims per head, float32, float16 and bfloat16; its sums are float32. The gradient of
    `value` is added up atomically there: its last digits are not the same from run to run.

    Args:
        value: (B, S, A, D), the cells of all maps one after the other, each map by rows.
        sizes: (height, width) of each of the N maps; S is the sum of their areas.
        locations: (B, Q, A, N, P, 2), x and y of the points in 0..1 of each map's width and height.
        weights: (B, Q, A, N, P), in the dtype of `locations`.
        kernel: what computes it.

    Returns:
        (B, Q, A * D) in the dtype of `value`.

    Raises:
        KernelError: if shapes do not go together, or the kernel does not take these tensors or cannot be had here.
    """
    sizes = [(int(height), int(width)) for height, width in sizes]
    _check_arguments(value, sizes, locations, weights)
    if kernel not in get_args(Kernel):
        raise KernelError(f"There is no deformable attention kernel {kernel!r}: {', '.join(get_args(Kernel))}.")
    if kernel == "reference":
        return deformable_attention_reference(value, sizes, locations, weights)
    if value.dtype not in DTYPES or value.shape[3] not in HEAD_DIMS:
        raise KernelError(
            f"The triton kernel of deformable attention takes {', '.join(map(str, DTYPES))} and {HEAD_DIMS} dims per head, found "
            f"{value.dtype} and {value.shape[3]}; use kernel='reference'."
        )
    flat = [side for size in sizes for side in size]
    return _deformable_attention(value, flat, locations, weights)


@torch.library.custom_op("permafrost::deformable_attention", mutates_args=())
def _deformable_attention(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, dims = value.shape
    out = value.new_empty(batch, locations.shape[1], heads * dims)
    if out.numel():
        _kernels().forward(value.contiguous(), sizes, locations.contiguous(), weights.contiguous(), out)
    return out


@_deformable_attention.register_fake
def _(value, sizes, locations, weights):
    batch, _, heads, dims = value.shape
    return value.new_empty(batch, locations.shape[1], heads * dims)


@torch.library.custom_op("permafrost::deformable_attention_backward", mutates_args=())
def _deformable_attention_backward(
    grad: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = (
        torch.zeros(value.shape, dtype=torch.float32, device=value.device),
        torch.empty(locations.shape, dtype=locations.dtype, device=locations.device),
        torch.empty(weights.shape, dtype=weights.dtype, device=weights.device),
    )
    if locations.numel():
        tensors = (grad.contiguous(), value.contiguous(), sizes, locations.contiguous(), weights.contiguous())
        _kernels().backward(*tensors, *grads)
    return grads[0].to(value.dtype, copy=False), grads[1], grads[2]


@_deformable_attention_backward.register_fake
def _(grad, value, sizes, locations, weights):
    return (
        torch.empty(value.shape, dtype=value.dtype, device=value.device),
        torch.empty(locations.shape, dtype=locations.dtype, device=locations.device),
        torch.empty(weights.shape, dtype=weights.dtype, device=weights.device),
    )


def _save(ctx, inputs, output) -> None:
    value, sizes, locations, weights = inputs
    ctx.sizes = sizes
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx, grad):
    value, locations, weights = ctx.saved_tensors
    to_value, to_locations, to_weights = _deformable_attention_backward(grad, value, ctx.sizes, locations, weights)
    return to_value, None, to_locations, to_weights


_deformable_attention.register_autograd(_backward, setup_context=_save)


def _kernels():
    """Import the kernels where they are first wanted.

    Raises:
        KernelError: if that fails.
    """
    try:
        from permafrost.model.kernels.deformable_attention import triton
    except ImportError as error:
        raise KernelError(f"The triton kernel of deformable attention is not available: {error}.") from error
    return triton


def _check_arguments(value: Tensor, sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    if value.ndim != 4 or locations.ndim != 6 or locations.shape[5] != 2:
        raise KernelError(
            "Deformable attention takes value (B, S, A, D) and locations (B, Q, A, N, P, 2), found "
            f"{tuple(value.shape)} and {tuple(locations.shape)}."
        )
    batch, cells, heads, _ = value.shape
    if locations.shape[:1] + locations.shape[2:4] != (batch, heads, len(sizes)) or weights.shape != locations.shape[:5]:
        raise KernelError(
            f"Deformable attention: value {tuple(value.shape)} and {len(sizes)} maps do not go with locations "
            f"{tuple(locations.shape)} and weights {tuple(weights.shape)}."
        )
    area = sum(height * width for height, width in sizes)
    if area != cells or any(min(size) < 1 for size in sizes):
        raise KernelError(f"Deformable attention: maps of {sizes} have {area} cells, found {cells} values.")
