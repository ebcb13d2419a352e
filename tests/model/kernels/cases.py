"""Inputs and errors that the tests of the kernels share; also imported by the processes they start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permafrost.model.kernels.window_attention.pytorch import window_attention_pytorch
from permafrost.model.kernels.window_attention.reference import window_attention_reference


@dataclass(frozen=True)
class Case:
    """A call of window attention."""

    window: int
    shift: int
    height: int
    width: int
    dtype: str = "float32"
    cosine: bool = True
    num_heads: int = 2
    head_dim: int = 32
    batch: int = 1
    max_scale: float = 30.0

    @property
    def keywords(self) -> dict[str, int | bool]:
        return {"window": self.window, "shift": self.shift, "cosine": self.cosine}

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """qkv, its bias (of SwinV2 without one for k), scale and table."""
        generator = torch.Generator().manual_seed(self.window * 1000 + self.height)
        channels = self.num_heads * self.head_dim
        qkv = torch.randn(self.batch, self.height, self.width, 3 * channels, generator=generator)
        bias = torch.randn(3 * channels, generator=generator)
        if self.cosine:
            bias[channels : 2 * channels] = 0.0
            scale = 1.0 + (self.max_scale - 1.0) * torch.rand(self.num_heads, generator=generator)
        else:
            scale = torch.full((self.num_heads,), self.head_dim**-0.5)
        table = 16.0 * torch.rand(self.num_heads, (2 * self.window - 1) ** 2, generator=generator)
        dtype = getattr(torch, self.dtype)
        return qkv.to(device, dtype), bias.to(device, dtype), scale.to(device), table.to(device)

    def expected(self) -> Tensor:
        """Return what the reference says in float64."""
        return window_attention_reference(*(one.double() for one in self.tensors()), **self.keywords)

    def tolerance(self, device: str = "cpu") -> float:
        """Twice the error of PyTorch's own operators in the same dtype."""
        theirs = window_attention_pytorch(*self.tensors(device), **self.keywords, fused=True)
        return 2.0 * relative_error(theirs, self.expected())


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    found, expected = found.detach().double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())
