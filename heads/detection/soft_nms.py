"""Apply soft non-maximum suppression (Bodla et al. 2017, "Soft-NMS: Improving Object Detection with One Line of Code")."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou


@torch.no_grad()
def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    sigma: float | None,
    iou: float,
    min_score: float,
    num_detections: int,
) -> tuple[Tensor, Tensor]:
    """Take the best box again and again, each time lowering the scores of the boxes of its class that overlap it.

    Scores only fall, so the boxes come out by falling score and the first `num_detections` are the result.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,).
        labels: (N,) int64.
        sigma: of the Gaussian exp(-IoU^2 / sigma) (equation 3); None lowers linearly, by 1 - IoU from `iou` up (equation 2).
        iou: overlap from which scores fall; unused by the Gaussian.
        min_score: boxes that fall below are dropped.
        num_detections: most boxes that are taken.

    Returns:
        (M,) int64 which boxes, and (M,) their lowered scores.
    """
    left, taken, taken_scores = scores.clone(), [], []
    for _ in range(min(num_detections, len(boxes))):
        best = left.argmax()
        taken.append(best)
        taken_scores.append(left[best])
        overlap = box_iou(boxes[best][None], boxes)[0].masked_fill(labels != labels[best], 0.0)
        if sigma is None:
            decay = torch.where(overlap >= iou, 1.0 - overlap, torch.ones_like(overlap))
        else:
            decay = torch.exp(-overlap.square() / sigma)
        # A box that is taken never comes again: no score is below 0.
        left = (left * decay).index_fill(0, best, -1.0)
    if not taken:
        return labels.new_zeros(0), scores
    index, values = torch.stack(taken), torch.stack(taken_scores)
    stays = values >= min_score
    return index[stays], values[stays]
