"""Compute with boxes. Shapes: B images, R boxes of one image. Coordinates are xyxy in pixels of the network's input.

Boxes are float32 whatever the compute dtype: in bfloat16 a coordinate near 1000 is off by up to 4 pixels. Only a head
whose parameters are float64 (the equality proofs) has float64 boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from permafrost.data.detection.types import DetectionTarget


def box_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of every box inside this module: float32, or float64 if its parameters are."""
    return torch.promote_types(torch.float32, next(module.parameters()).dtype)


def image_sizes(targets: Sequence[DetectionTarget], *, like: Tensor) -> Tensor:
    """Return the (B, 2) width and height of every image without its padding, in the dtype and on the device of `like`."""
    return torch.tensor([target.size[::-1] for target in targets], dtype=like.dtype).to(like.device, non_blocking=True)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Cut boxes to their image; what is not a number becomes 0, so that a diverged head fails in its loss, not here.

    Args:
        boxes: (..., 4).
        sizes: (..., 2) width and height, broadcast against `boxes`.
    """
    limits = torch.cat([sizes, sizes], dim=-1)
    return torch.minimum(boxes.nan_to_num(nan=0.0), limits).clamp(min=0)


def larger_than(boxes: Tensor, side: float) -> Tensor:
    """Return, as (...) bool, whether both sides of each (..., 4) box reach `side` pixels."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= side).all(dim=-1)


def box_loss(predicted: Tensor, wanted: Tensor, is_positive: Tensor, *, beta: float) -> Tensor:
    """Sum the smooth L1 losses of the positive rows (plain L1 for beta 0).

    Args:
        predicted: (..., 4) encoded boxes.
        wanted: (..., 4) their targets; finite where not positive, too.
        is_positive: (...) bool.
        beta: where the loss turns from squared to absolute.
    """
    loss = F.smooth_l1_loss(predicted, wanted, beta=beta, reduction="none")
    return loss.masked_fill(~is_positive[..., None], 0.0).sum()


def giou_loss(predicted: Tensor, wanted: Tensor, is_positive: Tensor) -> Tensor:
    """Sum 1 - generalised IoU (Rezatofighi et al. 2019) of the positive rows.

    Args:
        predicted: (..., 4) xyxy.
        wanted: (..., 4) xyxy; with an area where not positive, too.
        is_positive: (...) bool.
    """
    return generalized_box_iou_loss(predicted, wanted, reduction="none").masked_fill(~is_positive, 0.0).sum()
