"""Attend within (shifted) windows, from the packed projection of a map to the attended map.

`window_attention` is the one entry. Each kernel is an implementation of the op `permafrost::window_attention`, which
torch.compile and CUDA graphs see as a whole; kernels have no backward.
"""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

from permafrost.model.errors import BackboneError, KernelError
from permafrost.model.kernels.window_attention.reference import window_attention_reference
from permafrost.model.precision import full_precision

Kernel = Literal["triton", "cuda", "reference"]

MAX_WINDOW = 56
"""Largest side of a window that kernels take: 3136 tokens."""
HEAD_DIMS = (32, 64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def window_attention(
    qkv: Tensor,
    qkv_bias: Tensor,
    scale: Tensor | float,
    table: Tensor,
    *,
    window: int,
    shift: int = 0,
    cosine: bool = True,
    kernel: Kernel,
) -> Tensor:
    """Attend within (shifted) windows of a map, as reference.py specifies.

    Kernels take 32 or 64 dims per head, windows up to 56, float32, float16 and bfloat16; "reference" takes everything.
    Where a gradient is wanted the reference is used whatever `kernel` says, with a warning.

    Args:
        qkv: (B, H, W, 3 * C), the projection of the tokens with its bias.
        qkv_bias: (3 * C,), the bias of that projection: what a padded token has.
        scale: (A,), or one number for all heads.
        table: (A, (2 * window - 1) ** 2), the position bias of every offset. With `cosine` between 0 and 16, as SwinV2's
            16 * sigmoid(...) always is: kernels may take that for granted.
        window: side of a window.
        shift: cyclic shift of the windows.
        cosine: whether q and k are scaled to length 1 (SwinV2), or not (Swin V1).
        kernel: what computes it.

    Returns:
        (B, H, W, C) in the dtype of `qkv`.

    Raises:
        BackboneError: if shapes, window and shift do not go together.
        KernelError: if the kernel does not take these tensors, or cannot be had here.
    """
    _check_arguments(qkv, qkv_bias, table, window, shift)
    num_heads = len(table)
    if not isinstance(scale, Tensor):
        precise = torch.promote_types(qkv.dtype, torch.float32)
        scale = torch.full((num_heads,), scale, dtype=precise, device=qkv.device)
    scale = scale.reshape(-1)
    if kernel not in get_args(Kernel):
        raise BackboneError(f"There is no window attention kernel {kernel!r}: {', '.join(get_args(Kernel))}.")
    wants_gradient = torch.is_grad_enabled() and any(one.requires_grad for one in (qkv, qkv_bias, scale, table))
    if wants_gradient and kernel != "reference":
        warnings.warn(
            f"window attention: a gradient is wanted and the {kernel} kernel has none; the reference is used.",
            stacklevel=2,
        )
    if wants_gradient or kernel == "reference":
        # An autocast around it would take its products out of float32.
        with full_precision(qkv.device):
            return window_attention_reference(qkv, qkv_bias, scale, table, window=window, shift=shift, cosine=cosine)
    check_kernel_takes(kernel, dtype=qkv.dtype, head_dim=qkv.shape[3] // (3 * num_heads), window=window)
    return _window_attention(qkv, qkv_bias.to(qkv.dtype), scale.float(), table.float(), window, shift, cosine, kernel)


def check_kernel_takes(kernel: Kernel, *, dtype: torch.dtype, head_dim: int, window: int) -> None:
    """Check what a kernel is asked for against what it can do.

    Raises:
        KernelError: naming what it cannot.
    """
    if kernel == "reference":
        return
    problems = []
    if dtype not in DTYPES:
        problems.append(f"dtype {dtype} (it has {', '.join(map(str, DTYPES))})")
    if head_dim not in HEAD_DIMS:
        problems.append(f"{head_dim} dims per head (it has {' and '.join(map(str, HEAD_DIMS))})")
    if window > MAX_WINDOW:
        problems.append(f"a window of {window} (at most {MAX_WINDOW})")
    if problems:
        raise KernelError(f"The {kernel} kernel of window attention does not take {', '.join(problems)}.")


@torch.library.custom_op("permafrost::window_attention", mutates_args=())
def _window_attention(
    qkv: Tensor, qkv_bias: Tensor, scale: Tensor, table: Tensor, window: int, shift: int, cosine: bool, kernel: str
) -> Tensor:
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty(batch, height, width, channels // 3)
    if out.numel():
        if not qkv[0].is_contiguous():
            qkv = qkv.contiguous()
        launch = _launcher(kernel)
        constants = (qkv_bias.contiguous(), scale.contiguous(), table.contiguous())
        launch(qkv, *constants, out, window=window, shift=shift, cosine=cosine)
    return out


@_window_attention.register_fake
def _(qkv, qkv_bias, scale, table, window, shift, cosine, kernel):
    batch, height, width, channels = qkv.shape
    return qkv.new_empty(batch, height, width, channels // 3)


def _launcher(kernel: str):
    """Import a kernel where it is first wanted.

    Raises:
        KernelError: if that fails.
    """
    try:
        if kernel == "triton":
            from permafrost.model.kernels.window_attention.triton import window_attention_triton

            return window_attention_triton
        from permafrost.model.kernels.window_attention.cuda import window_attention_cuda

        return window_attention_cuda
    except ImportError as error:
        raise KernelError(f"The {kernel} kernel of window attention cannot be had: {error}.") from error


def _check_arguments(qkv: Tensor, qkv_bias: Tensor, table: Tensor, window: int, shift: int) -> None:
    if window < 1 or not 0 <= shift < window:
        raise BackboneError(f"Window attention: a window of {window} and a shift of {shift} do not go together.")
    if qkv.ndim != 4 or table.ndim != 2 or qkv.shape[3] % (3 * len(table)):
        raise BackboneError(
            "Window attention takes qkv of shape (B, H, W, 3 * C) with C divisible by the heads of the table (A, ...), "
            f"found {tuple(qkv.shape)} and {tuple(table.shape)}."
        )
    if table.shape[1] != (2 * window - 1) ** 2 or qkv_bias.shape != qkv.shape[3:]:
        raise BackboneError(
            f"Window attention: a window of {window} on {qkv.shape[3]} channels needs a table of "
            f"{(2 * window - 1) ** 2} entries and a bias of {qkv.shape[3]}, found {table.shape[1]} and "
            f"{tuple(qkv_bias.shape)}."
        )
    if shift and min(qkv.shape[1:3]) <= window:
        raise BackboneError(
            f"Window attention: a map of {qkv.shape[1]} x {qkv.shape[2]} is no larger than its window ({window}); "
            "such a map is not shifted."
        )
