"""Merge several views of an image (sizes, mirrored or not) into one result: multi-scale and flip testing of detectors.

Boxes of all views are brought back to the image on disk and thinned out class by class by one non-maximum suppression over all of
them, the best `num_detections` stay; so detectron2's GeneralizedRCNNWithTTA does. A mask is that of the box that stayed, or is voted
(Li et al. 2017, "Fully Convolutional Instance-aware Semantic Segmentation", section 3.4; before it Dai et al. 2016, "Instance-aware
Semantic Segmentation via Multi-task Network Cascades"): the mean, weighted by the scores, of the masks of all views' boxes of its
class that overlap it by more than `merge_iou`, each at its own place in the image. detectron2 runs the mask branch again on the
merged boxes in every view instead, for which the features of all views must be kept.

Shapes: N detections of all views, D that stay, M side of a mask's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_iou

from permafrost.data.detection.config import EvaluationConfig
from permafrost.data.detection.types import DetectionResult


def on_disk(result: DetectionResult) -> DetectionResult:
    """Return a view's result in pixels of the image on disk, not mirrored."""
    (height, width), (original_height, original_width) = result.size, result.original_size
    boxes, masks = result.boxes, result.masks
    if result.view is not None and result.view.is_flipped:
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        masks = None if masks is None else masks.flip(-1)
    scale = boxes.new_tensor([original_width / width, original_height / height] * 2)
    return replace(result, boxes=boxes * scale, masks=masks, size=result.original_size, view=None)


def merge_views(results: Sequence[DetectionResult], evaluation: EvaluationConfig) -> DetectionResult:
    """Merge the results of all views of an image into one.

    Args:
        results: of each view, on one device; with masks of one grid, or none.
        evaluation: how.

    Returns:
        in pixels of the image on disk, scores falling.
    """
    views = [on_disk(result) for result in results]
    boxes = torch.cat([view.boxes for view in views])
    scores = torch.cat([view.scores for view in views])
    labels = torch.cat([view.labels for view in views])
    kept = batched_nms(boxes, scores, labels, evaluation.merge_iou)[: evaluation.num_detections]
    masks = None
    parts = [view.masks for view in views if view.masks is not None]
    if len(parts) == len(views):
        masks = torch.cat(parts)
        is_voted = evaluation.merged_masks == "voted"
        masks = vote(boxes, scores, labels, masks, kept, evaluation.merge_iou) if is_voted else masks[kept]
    return replace(views[0], boxes=boxes[kept], scores=scores[kept], labels=labels[kept], masks=masks)


def vote(boxes: Tensor, scores: Tensor, labels: Tensor, masks: Tensor, kept: Tensor, iou: float) -> Tensor:
    """Return, for each kept box, the mean mask (D, M, M) of the boxes of its class that overlap it by more than `iou`, itself included.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,), the weights.
        labels: (N,) int64.
        masks: (N, M, M) probabilities on each box's own grid.
        kept: (D,) int64.
        iou: overlap from which a box has a vote.
    """
    overlap = box_iou(boxes[kept], boxes)
    votes = (overlap > iou) & (labels[kept][:, None] == labels[None])
    rows = torch.arange(len(kept), device=kept.device)
    votes[rows, kept] = True
    row, voter = votes.nonzero(as_tuple=True)
    placed = resample(masks[voter], boxes[voter], boxes[kept[row]])
    # A box of score 0 still has its own mask.
    weight = scores[voter].clamp(min=1e-12)
    total = masks.new_zeros(len(kept)).index_add(0, row, weight)
    summed = masks.new_zeros(len(kept), *masks.shape[-2:]).index_add(0, row, placed * weight[:, None, None])
    return summed / total[:, None, None]


def resample(masks: Tensor, boxes: Tensor, onto: Tensor) -> Tensor:
    """Resample (N, M, M) masks that fill `boxes` on the grids of other (N, 4) boxes: bilinear between cell centres, 0 outside."""
    side = masks.shape[-1]
    centres = (torch.arange(side, dtype=masks.dtype, device=masks.device) + 0.5) / side
    x, y = (
        (onto[:, i, None] + centres * (onto[:, i + 2] - onto[:, i])[:, None] - boxes[:, i, None])
        / (boxes[:, i + 2] - boxes[:, i]).clamp(min=1e-6)[:, None]
        for i in (0, 1)
    )
    # grid_sample wants -1..1 over the whole grid, columns first.
    grid = torch.stack(
        [(2 * x - 1)[:, None].expand(-1, side, -1), (2 * y - 1)[:, :, None].expand(-1, -1, side)], dim=-1
    )
    found = F.grid_sample(masks[:, None], grid.to(masks.dtype), padding_mode="zeros", align_corners=False)
    return found[:, 0]
