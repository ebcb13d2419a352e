"""Decide which boxes count as positive or negative, and which of them enter the loss.

Shapes: B images, A candidate boxes of one image (anchors or proposals), G ground-truth boxes, S samples. No shape
depends on the labels, so nothing waits for the device, and the draw of an image depends on its key alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou

from permafrost.data.types import SampleKey

POSITIVE, NEGATIVE, UNUSED = 1, 0, -1


def match_boxes(
    candidates: Tensor,
    gt_boxes: Tensor,
    *,
    positive_iou: float,
    negative_iou: float,
    allow_low_quality: bool = False,
) -> tuple[Tensor, Tensor]:
    """Give every candidate the ground-truth box it overlaps most, and say what that makes it.

    The rule is that of torchvision's Matcher. With `allow_low_quality`, the candidates that overlap a ground-truth box
    most are positive whatever the overlap, as long as there is any (a box that touches no candidate would otherwise
    make all of them positive); each keeps the ground-truth box which it overlaps most itself.

    Args:
        candidates: (A, 4) xyxy.
        gt_boxes: (G, 4) xyxy of the same dtype; G may be 0.
        positive_iou: overlap from which a candidate is positive.
        negative_iou: overlap below which it is negative; between the two it is unused.
        allow_low_quality: makes the best candidate of a ground-truth box positive, as above.

    Returns:
        (A,) int64 index of the ground-truth box (0 where there is none), and (A,) int64 POSITIVE, NEGATIVE or UNUSED.
    """
    if len(gt_boxes) == 0:
        zeros = torch.zeros(len(candidates), dtype=torch.int64, device=candidates.device)
        return zeros, torch.full_like(zeros, NEGATIVE)
    # Two boxes without area have a union of 0.
    iou = box_iou(gt_boxes, candidates).nan_to_num_(0.0)  # (G, A)
    best_iou, index = iou.max(dim=0)  # (A,) each
    labels = torch.full_like(index, UNUSED).masked_fill_(best_iou < negative_iou, NEGATIVE)
    positive = best_iou >= positive_iou
    if allow_low_quality:
        best_of_gt = iou.amax(dim=1, keepdim=True)  # (G, 1)
        positive |= ((iou == best_of_gt) & (best_of_gt > 0)).any(dim=0)
    return index, labels.masked_fill_(positive, POSITIVE)


def drop_ignored(labels: Tensor, candidates: Tensor, ignore_boxes: Tensor, *, overlap: float) -> Tensor:
    """Mark negatives as unused that lie inside a region of unlabelled objects.

    Args:
        labels: (A,) int64 of match_boxes.
        candidates: (A, 4) xyxy.
        ignore_boxes: (C, 4) xyxy crowd regions; C may be 0.
        overlap: share of its own area beyond which a candidate counts as inside.

    Returns:
        (A,) int64.
    """
    if len(ignore_boxes) == 0:
        return labels
    top_left = torch.maximum(candidates[:, None, :2], ignore_boxes[None, :, :2])
    bottom_right = torch.minimum(candidates[:, None, 2:], ignore_boxes[None, :, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=-1).amax(dim=1)  # (A,)
    area = (candidates[:, 2:] - candidates[:, :2]).prod(dim=-1)
    return labels.masked_fill((intersection > overlap * area) & (labels != POSITIVE), UNUSED)


@dataclass
class Samples:
    """The candidates of each image that enter the loss; positive ones first.

    Attributes:
        index: (B, S) int64 position among the image's candidates.
        is_positive: (B, S) bool.
        is_valid: (B, S) bool; the rest fills up images that have too few candidates and has no weight.
    """

    index: Tensor
    is_positive: Tensor
    is_valid: Tensor


def sample_balanced(
    labels: Sequence[Tensor], keys: Sequence[SampleKey], purpose: str, *, num_samples: int, positive_fraction: float
) -> Samples:
    """Draw up to `num_samples` candidates per image without replacement, at most a share of them positive.

    Every candidate gets a random priority from the image's own generator and the highest win, so that the result
    depends on the key, the purpose and the labels: not on the other images, the device or what was drawn before. S is
    `num_samples`, or the largest number of candidates where that is smaller.

    Args:
        labels: one (A_i,) int64 tensor of POSITIVE, NEGATIVE, UNUSED per image.
        keys: one per image.
        purpose: names the generator.
        num_samples: largest S.
        positive_fraction: largest share of positive ones; negatives fill up what is left.
    """
    device = labels[0].device
    # Doubles: among 10^5 candidates equal single-precision draws are common, and a device orders ties as it likes.
    draws = [torch.rand(len(x), generator=key.generator(purpose), dtype=torch.float64) for x, key in zip(labels, keys)]
    priority = pad_sequence(draws, batch_first=True).to(device, non_blocking=True)
    padded = pad_sequence(list(labels), batch_first=True, padding_value=UNUSED)  # (B, max A_i)

    num_candidates = padded.shape[1]
    max_positive = min(int(num_samples * positive_fraction), num_candidates)
    drawn, index = priority.masked_fill(padded != POSITIVE, -1.0).topk(max_positive, dim=1)
    chosen = torch.zeros_like(padded, dtype=torch.bool).scatter_(1, index, drawn >= 0)
    # Positive ones that were drawn rank above every negative (2 to 3, not 0 to 1); what may not be drawn has -1.
    ranking = priority.masked_fill(padded != NEGATIVE, -1.0).where(~chosen, priority + 2.0)
    drawn, index = ranking.topk(min(num_samples, num_candidates), dim=1)
    return Samples(index=index, is_positive=drawn >= 2.0, is_valid=drawn >= 0)
