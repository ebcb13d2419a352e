"""Define Mask R-CNN (He et al. 2017) as a trainable head on a frozen backbone's feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from permafrost.data.detection.types import DetectionResult
from permafrost.data.types import Batch
from permafrost.heads.base import Head, LossCounts, world_mean_counts
from permafrost.heads.detection import roi_align
from permafrost.heads.detection.roi import BoxBranch, Detections, MaskBranch, RegionSamples, join, sample_regions
from permafrost.heads.detection.rpn import RPN
from permafrost.heads.necks.build import Neck


class TwoStageHead(Head):
    """Base of the heads that find proposals on a pyramid first and then look into each.

    In training it returns `loss_rpn_objectness` and `loss_rpn_box`, a sum over this batch divided by what `counts` makes of
    `rpn_samples`, and then the losses of the regions; in evaluation one DetectionResult per image.

    Args:
        neck: the pyramid.
        rpn: proposals from all of its levels.
        classes: names of the K classes.
        ignore_overlap: share of its area inside a crowd region from which a box is no negative.
    """

    def __init__(self, *, neck: Neck, rpn: RPN, classes: Sequence[str], ignore_overlap: float) -> None:
        super().__init__()
        self.neck = neck
        self.rpn = rpn
        self.classes = tuple(classes)
        self.ignore_overlap = ignore_overlap

    def forward(
        self, features: Sequence[Tensor], batch: Batch, counts: LossCounts = world_mean_counts
    ) -> dict[str, Tensor] | list[DetectionResult]:
        """Return losses in training mode, results in evaluation mode, as every head does."""
        pyramid = self.neck(features)
        output = self.rpn(pyramid)
        proposals = self.rpn.propose(output, batch)
        if self.training:
            losses = self.rpn.loss(output, batch, counts)
            losses.update(self.region_losses(pyramid, proposals, batch, counts))
            return losses
        return self.results(pyramid, proposals, batch)

    def kernels_of(self, device_type: str) -> AbstractContextManager[None]:
        """Return the context of RoIAlign's kernels."""
        return roi_align.kernels_of(device_type)

    def region_losses(
        self, pyramid: Sequence[Tensor], proposals: Sequence[Tensor], batch: Batch, counts: LossCounts
    ) -> dict[str, Tensor]:
        """Return the named losses of the second stage."""
        raise NotImplementedError

    def results(self, pyramid: Sequence[Tensor], proposals: Sequence[Tensor], batch: Batch) -> list[DetectionResult]:
        """Return one result per image."""
        raise NotImplementedError

    def pooled_levels(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Return the levels that regions are pooled from."""
        # RoIAlign reads rows channel by channel; one copy here serves all branches.
        return [level.contiguous() for level in pyramid[: self.neck.num_backbone_levels]]

    def sample(self, proposals: Sequence[Tensor], batch: Batch, box: BoxBranch, purpose: str = "roi") -> RegionSamples:
        """Return what of the proposals a branch learns from."""
        return sample_regions(
            proposals,
            batch,
            box.config,
            num_classes=len(self.classes),
            ignore_overlap=self.ignore_overlap,
            purpose=purpose,
        )


class MaskRCNN(TwoStageHead):
    """A feature pyramid, proposals, boxes of classes, and a mask for each.

    Its further losses are `loss_classifier`, `loss_box` and `loss_mask`, over the counts `roi_samples` and `mask_samples`,
    asked for in this order.

    Args:
        box: the box branch, on the neck's levels but the extra ones.
        mask: the mask branch, on the same.
        parts: the arguments of TwoStageHead.
    """

    def __init__(self, *, box: BoxBranch, mask: MaskBranch, **parts: Any) -> None:
        super().__init__(**parts)
        self.box = box
        self.mask = mask

    def region_losses(
        self, pyramid: Sequence[Tensor], proposals: Sequence[Tensor], batch: Batch, counts: LossCounts
    ) -> dict[str, Tensor]:
        """Return the losses of the box and the mask branch."""
        levels = self.pooled_levels(pyramid)
        samples = self.sample(proposals, batch, self.box)
        logits, deltas = self.box(levels, *join(list(samples.boxes)))
        losses = self.box.loss(logits, deltas, samples, counts)
        losses.update(self.mask.loss(levels, samples, batch, counts))
        return losses

    def results(self, pyramid: Sequence[Tensor], proposals: Sequence[Tensor], batch: Batch) -> list[DetectionResult]:
        """Return the boxes of each image with their masks."""
        levels = self.pooled_levels(pyramid)
        logits, deltas = self.box(levels, *join(proposals))
        detections = self.box.detect(logits.softmax(dim=-1)[:, :-1], deltas, proposals, batch)
        boxes, image_index = join([found.boxes for found in detections])
        labels = torch.cat([found.labels for found in detections])
        masks = self.mask(levels, boxes, image_index, labels).sigmoid()
        return typed_results(detections, masks, batch)


def typed_results(detections: Sequence[Detections], masks: Tensor, batch: Batch) -> list[DetectionResult]:
    """Return detections and the (R, M, M) masks of all of them as one float32 result per image."""
    return [
        DetectionResult(
            image_id=target.image_id,
            boxes=found.boxes.float(),
            labels=found.labels,
            scores=found.scores.float(),
            masks=own_masks.float(),
            size=target.size,
            original_size=target.original_size,
            view=target.view,
        )
        for target, found, own_masks in zip(
            batch.targets, detections, masks.split([len(found.boxes) for found in detections])
        )
    ]
