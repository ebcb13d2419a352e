"""Inputs that the tests of deformable attention share; also imported by the process that interprets Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permafrost.model.kernels.deformable_attention import deformable_attention


@dataclass(frozen=True)
class DeformableCase:
    """A call of deformable attention; points reach a good way beyond the maps."""

    sizes: tuple[tuple[int, int], ...] = ((3, 4), (6, 7), (11, 13))
    queries: int = 37
    batch: int = 2
    heads: int = 2
    head_dim: int = 16
    points: int = 4
    dtype: str = "float32"

    def tensors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """value, locations, weights."""
        generator = torch.Generator().manual_seed(self.queries)
        cells = sum(height * width for height, width in self.sizes)
        shape = (self.batch, self.queries, self.heads, len(self.sizes), self.points)
        value = torch.randn(self.batch, cells, self.heads, self.head_dim, generator=generator, dtype=torch.float64)
        locations = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
        weights = torch.randn(shape, generator=generator, dtype=torch.float64).flatten(3).softmax(-1).view(shape)
        # Locations and weights are float32 in every case: the head computes them so.
        chosen = dtype or getattr(torch, self.dtype)
        rest = dtype or torch.float32
        return value.to(chosen), locations.to(rest), weights.to(rest)

    def gradients(self, kernel: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Output, and gradients of all three inputs for a fixed gradient from above."""
        tensors = [one.requires_grad_() for one in self.tensors(dtype)]
        out = deformable_attention(tensors[0], self.sizes, *tensors[1:], kernel=kernel)
        above = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        out.backward(above.to(out.dtype))
        return [out.detach(), *(one.grad for one in tensors)]
