"""Look at masks in points: where they lie, and what a mask is there.

Shapes: L predictions, B images, N masks, H W size of a mask, P points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from permafrost.data.types import SampleKey


def draw_points(
    keys: Sequence[SampleKey], purpose: str, *, num_predictions: int, num_points: int, like: Tensor
) -> Tensor:
    """Draw (L, B, P, 2) x and y, uniform in 0..1, of each image a function of its key and the purpose alone.

    All masks of one image and prediction share them, so their number does not shift what others get.
    """
    draws = [torch.rand(num_predictions, num_points, 2, generator=key.generator(purpose)) for key in keys]
    return torch.stack(draws, dim=1).to(like.device, like.dtype, non_blocking=True)


def read_points(masks: Tensor, points: Tensor) -> Tensor:
    """Return (X, N, R, P): N masks at R rows of points each, bilinear between cells' centres, zero beyond the mask's edge.

    Args:
        masks: (X, N, H, W).
        points: (X, R, P, 2), x and y in 0..1 of the masks' width and height.
    """
    return F.grid_sample(masks, 2 * points - 1, mode="bilinear", padding_mode="zeros", align_corners=False)


@torch.no_grad()
def uncertain_points(logits: Tensor, candidates: Tensor, uniform: Tensor, *, num_uncertain: int) -> Tensor:
    """Return (X, N, P, 2): of each mask the candidates whose logit is nearest to zero, then the uniform ones (PointRend, Kirillov
    et al. 2020, section 3.1).

    Args:
        logits: (X, N, H, W).
        candidates: (X, M, 2).
        uniform: (X, P - num_uncertain, 2).
        num_uncertain: how many candidates are kept.
    """
    num_masks = logits.shape[1]
    uniform = uniform[:, None].expand(-1, num_masks, -1, -1)
    if not num_uncertain:
        return uniform
    distance = read_points(logits, candidates[:, None])[:, :, 0].abs()
    index = distance.topk(num_uncertain, dim=2, largest=False).indices
    candidates = candidates[:, None].expand(-1, num_masks, -1, -1)
    return torch.cat([candidates.gather(2, index[..., None].expand(-1, -1, -1, 2)), uniform], dim=2)
