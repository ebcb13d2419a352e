"""Provide what a network needs only while it is trained: stochastic depth, drawn per sample, and blocks that are computed twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Generators = torch.Generator | Sequence[torch.Generator] | None
"""Generators that random choices draw from: one generator for a whole batch (None: the global one), or one per sample."""


def draw_kept(keep: Tensor, num_images: int, generator: Generators) -> Tensor:
    """Draw which residual branches are kept (stochastic depth, Huang et al., ECCV 2016), for each image by itself.

    Drawn on the CPU, so that a seed means the same on every device. With a generator per sample the draw of a sample
    depends on neither the others nor their number, hence not on how a batch is spread over ranks.

    Args:
        keep: (..., 1), probability of keeping each branch.
        num_images: B. With a generator per sample a multiple of their number: the frames of a clip, which follow one
            another, share its draw.
        generator: one of Generators.

    Returns:
        (..., B) bool.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(*keep.shape[:-1], num_images, generator=generator) < keep
    samples = torch.stack([torch.rand(keep.shape[:-1], generator=one) for one in generator], dim=-1)
    return (samples < keep).repeat_interleave(num_images // len(generator), dim=-1)


class DropPath(nn.Module):
    """A place in another library's block where a residual branch can be dropped; `scales` arrive before each forward."""

    scales: Tensor | None = None
    """(B,): 0 for a dropped branch, 1 / (1 - rate) for a kept one. None drops nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ...) to the same shape."""
        if self.scales is None:
            return x
        return x * self.scales.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def run_again_in_backward(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return `function(*arguments)`; a backward keeps the arguments only and computes the rest again.

    It draws no random numbers, so no state of a generator is kept.
    """
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
