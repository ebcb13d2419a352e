"""Match queries with segments: the assignment that costs least.

Shapes: L predictions, B images, Q queries, K classes, N segments of the richest image (others are padded), P points.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from permafrost.heads.segmentation.config import SegmentationLossConfig

UNMATCHED = -1
"""In place of a query: for padding, and for segments beyond the number of queries."""


@torch.no_grad()
def matching_cost(
    class_logits: Tensor, mask_points: Tensor, labels: Tensor, target_points: Tensor, *, config: SegmentationLossConfig
) -> Tensor:
    """Return, as (B, Q, N), what it costs to let each query answer for each segment, on the device of its arguments.

    Args:
        class_logits: (B, Q, K + 1).
        mask_points: (B, Q, P) logits of the queries' masks.
        labels: (B, N) int64.
        target_points: (B, N, P) the segments' masks at the same points.
        config: the weights of its three parts.
    """
    probabilities = class_logits.softmax(dim=-1)
    of_class = -probabilities.gather(2, labels[:, None].expand(-1, probabilities.shape[1], -1))
    # The cross-entropy of logit x and target t is softplus(x) - x t: one product instead of two.
    targets = target_points.mT
    num_points = mask_points.shape[-1]
    of_mask = (torch.nn.functional.softplus(mask_points).sum(dim=-1, keepdim=True) - mask_points @ targets) / num_points
    shares = mask_points.sigmoid()
    both = shares.sum(dim=-1, keepdim=True) + targets.sum(dim=1, keepdim=True)
    of_dice = 1 - (2 * (shares @ targets) + 1) / (both + 1)
    return config.class_weight * of_class + config.mask_weight * of_mask + config.dice_weight * of_dice


def match(costs: Tensor, num_segments: Sequence[int]) -> Tensor:
    """Return, as (L, B, N) int64, the query of each segment or UNMATCHED, on the device of the costs.

    All costs come to the host in one copy. A cost that is not finite counts as a very high one: a head whose numbers
    broke down gets an assignment, and its loss says what happened.

    Args:
        costs: (L, B, Q, N).
        num_segments: of each image; the rest of N is padding.
    """
    table = np.nan_to_num(costs.detach().double().cpu().numpy(), nan=1e30, posinf=1e30, neginf=1e30)
    queries = np.full((table.shape[0], table.shape[1], table.shape[3]), UNMATCHED, dtype=np.int64)
    for prediction, images in enumerate(table):
        for image, (cost, count) in enumerate(zip(images, num_segments, strict=True)):
            rows, columns = linear_sum_assignment(cost[:, :count])
            queries[prediction, image, columns] = rows
    return torch.from_numpy(queries).to(costs.device, non_blocking=True)
