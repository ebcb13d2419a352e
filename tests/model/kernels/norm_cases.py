"""Inputs that the tests of residual_norm share; also imported by the process that interprets Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from permafrost.model.kernels.residual_norm import residual_norm


@dataclass(frozen=True)
class NormCase:
    """A call of residual_norm; means and spreads differ from token to token."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    has_extra: bool = False

    def tensors(
        self, device: str = "cpu", dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, nn.LayerNorm, nn.LayerNorm | None]:
        """x, y, norm, extra norm: values of `dtype` as those of the case's own dtype."""
        generator = torch.Generator().manual_seed(self.shape[-1])
        chosen = getattr(torch, self.dtype)
        spread = 0.1 + 3.0 * torch.rand(*self.shape[:-1], 1, generator=generator)
        x, y = (torch.randn(self.shape, generator=generator) * spread + spread for _ in range(2))
        norms = []
        for eps in (1e-5, 1e-3):
            norm = nn.LayerNorm(self.shape[-1], eps=eps)
            for parameter in norm.parameters():
                nn.init.normal_(parameter, 0.5, 0.5, generator=generator)
            norms.append(norm.to(chosen).to(device, dtype or chosen).requires_grad_(False))
        x, y = (one.to(chosen).to(device, dtype or chosen) for one in (x, y))
        return x, y, norms[0], norms[1] if self.has_extra else None

    def expected(self) -> Tensor:
        """Return what the reference says in float64."""
        return residual_norm(*self.tensors(dtype=torch.float64), kernel="reference")

    def in_pytorch(self, device: str = "cpu") -> Tensor:
        """PyTorch's own operators."""
        x, y, norm, extra = self.tensors(device)
        total = x + norm(y)
        return total if extra is None else extra(total)
