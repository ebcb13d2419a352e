"""Apply a linear layer with a GELU in the epilogue of its product: the hidden map is written once, and not read and written again.

cuBLASLt has such an epilogue, with the approximation by tanh ("Gaussian Error Linear Units", Hendrycks and Gimpel, 2016,
section 2). Put into whole networks it moves the feature maps by 1e-4 to 3e-4 (relative L2; dev/LOG.md, 2026-11-26), where
computing in bfloat16 moves them by 3e-3 to 1e-2: it is taken for 16 bits and refused for more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from permafrost.model.errors import KernelError

DTYPES = (torch.bfloat16, torch.float16)


def linear_gelu_reference(x: Tensor, layer: nn.Linear) -> Tensor:
    """Compute the exact GELU of a linear layer: x (..., C_in) -> (..., C_out)."""
    return nn.functional.gelu(layer(x))


def linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """Compute the same by PyTorch's product with an activation, which has no gradient.

    Where the library has no epilogue for it, PyTorch computes the GELU afterwards: on a CPU the exact one.

    Raises:
        KernelError: if a gradient is wanted.
    """
    if torch.is_grad_enabled() and any(one.requires_grad for one in (x, layer.weight, layer.bias)):
        raise KernelError("A product with a GELU in its epilogue has no gradient, and one is needed.")
    rows = x.reshape(-1, x.shape[-1])
    out = torch._addmm_activation(layer.bias, rows, layer.weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], layer.out_features)


def check_dtype(dtype: torch.dtype) -> None:
    """Check that the approximation lies below the rounding.

    Raises:
        KernelError: if it does not.
    """
    if dtype not in DTYPES:
        raise KernelError(f"it approximates by 1e-4, which is too much for {str(dtype).removeprefix('torch.')}")
