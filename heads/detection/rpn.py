"""Propose regions with a network (Ren et al. 2015, "Faster R-CNN") on a feature pyramid.

Shapes: B images, H W size of a level, K anchors per cell, N anchors of all levels of one image (level by level, row by
row, the K of a cell together), S samples, G ground-truth boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms

from permafrost.data.types import Batch
from permafrost.heads.base import LossCounts
from permafrost.heads.detection.boxes import box_dtype, box_loss, clip_boxes, image_sizes, larger_than
from permafrost.heads.detection.config import RPNConfig
from permafrost.heads.detection.sampling import drop_ignored, match_boxes, sample_balanced

MIN_PROPOSAL_SIDE = 1e-3
"""Pixels; thinner proposals have been clipped to nothing."""


def make_anchors(
    grid_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    *,
    scale: float,
    aspect_ratios: Sequence[float],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return all anchors of one image, centred on the top-left corner of their cell.

    Float32 always, unlike torchvision's AnchorGenerator, which follows the maps' dtype and rounds to whole pixels.

    Args:
        grid_sizes: (H, W) of every level.
        strides: pixels per cell of every level.
        scale: side of the square anchor in strides.
        aspect_ratios: K values of height over width; the area stays that of the square.
        device: where the anchors go.

    Returns:
        (N, 4) float32 xyxy in pixels.
    """
    ratios = torch.tensor(aspect_ratios, dtype=torch.float64)
    half = torch.stack([ratios.rsqrt(), ratios.sqrt()], dim=1) / 2
    unit = torch.cat([-half, half], dim=1)
    levels = []
    for (height, width), stride in zip(grid_sizes, strides, strict=True):
        cell = (unit * (scale * stride)).float().to(device)
        x = torch.arange(width, device=device, dtype=torch.float32) * stride
        y = torch.arange(height, device=device, dtype=torch.float32) * stride
        y, x = torch.meshgrid(y, x, indexing="ij")
        corner = torch.stack([x, y, x, y], dim=-1)
        levels.append((corner[:, :, None] + cell).reshape(-1, 4))
    return torch.cat(levels)


class RPNOutput(NamedTuple):
    """The network's output for every anchor. A tuple: ZeRO 3 looks for tensors in tuples, lists and dicts only.

    Attributes:
        logits: (B, N) objectness.
        deltas: (B, N, 4) encoded boxes relative to the anchors.
        anchors: (N, 4) xyxy.
        num_per_level: anchors of each level; their sum is N.
    """

    logits: Tensor
    deltas: Tensor
    anchors: Tensor
    num_per_level: list[int]


class RPN(nn.Module):
    """Objectness and a box for every anchor; the best become proposals.

    Args:
        channels: width of the pyramid.
        strides: pixels per cell of each of its levels.
        config: anchors, sampling and limits of the proposals.
        ignore_overlap: share of its area inside a crowd region from which an anchor is no negative.
    """

    def __init__(self, *, channels: int, strides: Sequence[int], config: RPNConfig, ignore_overlap: float) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.config = config
        self.ignore_overlap = ignore_overlap
        self.coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        num_anchors = len(config.aspect_ratios)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(config.num_convs))
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.regressor = nn.Conv2d(channels, num_anchors * 4, 1)
        for conv in (*self.convs, self.objectness, self.regressor):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, pyramid: Sequence[Tensor]) -> RPNOutput:
        """Run the shared convolutions on every (B, C, H, W) level; logits and deltas come out in the boxes' dtype."""
        dtype = box_dtype(self)
        logits, deltas = [], []
        for level in pyramid:
            for conv in self.convs:
                level = F.relu(conv(level))
            batch_size = len(level)
            logits.append(self.objectness(level).permute(0, 2, 3, 1).reshape(batch_size, -1).to(dtype))
            deltas.append(self.regressor(level).permute(0, 2, 3, 1).reshape(batch_size, -1, 4).to(dtype))
        anchors = make_anchors(
            [(level.shape[-2], level.shape[-1]) for level in pyramid],
            self.strides,
            scale=self.config.anchor_scale,
            aspect_ratios=self.config.aspect_ratios,
            device=pyramid[0].device,
        )
        return RPNOutput(
            logits=torch.cat(logits, dim=1),
            deltas=torch.cat(deltas, dim=1),
            anchors=anchors.to(dtype),
            num_per_level=[level.shape[1] for level in logits],
        )

    @torch.no_grad()
    def propose(self, output: RPNOutput, batch: Batch) -> list[Tensor]:
        """Return the proposals of every image, best first.

        The best anchors of each level are decoded, clipped to the image and thinned out level by level; the best of
        what is left, over all levels, are the proposals. In training the limits are the configuration's `_train` ones.

        Returns:
            One (R_i, 4) xyxy tensor per image.
        """
        config = self.config
        num_pre_nms = config.num_pre_nms_train if self.training else config.num_pre_nms_test
        num_proposals = config.num_proposals_train if self.training else config.num_proposals_test

        best, level_of, start = [], [], 0
        for i, scores in enumerate(output.logits.split(output.num_per_level, dim=1)):
            count = min(num_pre_nms, scores.shape[1])
            best.append(scores.topk(count, dim=1).indices + start)
            level_of.append(torch.full((count,), i, device=scores.device))
            start += scores.shape[1]
        index = torch.cat(best, dim=1)  # (B, P), the best of every level
        level = torch.cat(level_of)  # (P,)

        scores = output.logits.gather(1, index)  # (B, P)
        deltas = output.deltas.gather(1, index[..., None].expand(-1, -1, 4))  # (B, P, 4)
        boxes = self.coder.decode_single(deltas.flatten(0, 1), output.anchors[index].flatten(0, 1))
        boxes = clip_boxes(boxes.view_as(deltas), image_sizes(batch.targets, like=boxes)[:, None])
        usable = larger_than(boxes, MIN_PROPOSAL_SIDE)  # (B, P) bool

        # Image by image: one call for all would make the rounding of an image's boxes depend on its neighbours.
        proposals = []
        for i in range(len(boxes)):
            found, found_scores, found_level = boxes[i][usable[i]], scores[i][usable[i]], level[usable[i]]
            keep = batched_nms(found, found_scores, found_level, config.nms_iou)
            proposals.append(found[keep[:num_proposals]])
        return proposals

    def loss(self, output: RPNOutput, batch: Batch, counts: LossCounts) -> dict[str, Tensor]:
        """Compute the binary cross-entropy of the sampled anchors' objectness, and the box loss of the positive ones.

        Both are divided by the count `rpn_samples`, the number of sampled anchors.
        """
        config = self.config
        anchors = output.anchors
        gt_boxes, gt_index, labels = [], [], []
        for target in batch.targets:
            boxes = target.boxes.to(anchors.dtype)
            index, label = match_boxes(
                anchors,
                boxes,
                positive_iou=config.positive_iou,
                negative_iou=config.negative_iou,
                allow_low_quality=True,
            )
            ignored = target.ignore_boxes.to(anchors.dtype)
            labels.append(drop_ignored(label, anchors, ignored, overlap=self.ignore_overlap))
            gt_boxes.append(boxes)
            gt_index.append(index)
        samples = sample_balanced(
            labels, batch.keys, "rpn", num_samples=config.num_samples, positive_fraction=config.positive_fraction
        )

        logits = output.logits.gather(1, samples.index)
        objectness = F.binary_cross_entropy_with_logits(logits, samples.is_positive.to(logits.dtype), reduction="none")
        objectness = objectness.masked_fill(~samples.is_valid, 0.0).sum()

        sampled = anchors[samples.index]
        wanted = torch.stack(
            # Without ground truth nothing is positive; the anchors themselves keep the targets finite.
            [
                boxes[index[chosen]] if len(boxes) else own
                for boxes, index, chosen, own in zip(gt_boxes, gt_index, samples.index, sampled)
            ]
        )
        wanted = wanted.where(samples.is_positive[..., None], sampled)
        targets = self.coder.encode_single(wanted.flatten(0, 1), sampled.flatten(0, 1)).view_as(wanted)
        deltas = output.deltas.gather(1, samples.index[..., None].expand(-1, -1, 4))
        boxes = box_loss(deltas, targets, samples.is_positive, beta=config.smooth_l1_beta)

        count = counts("rpn_samples", samples.is_valid.sum())
        return {"loss_rpn_objectness": objectness / count, "loss_rpn_box": boxes / count}
