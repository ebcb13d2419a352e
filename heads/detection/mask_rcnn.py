"""Mask R-CNN (He et al. 2017) as a trainable head on a frozen backbone's feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from permafrost.data.types import Batch, DetectionResult
from permafrost.heads.base import Head, LossCounts, world_mean_counts
from permafrost.heads.config import MaskRCNNConfig
from permafrost.heads.detection.roi import BoxBranch, MaskBranch, join, sample_regions
from permafrost.heads.detection.rpn import RPN
from permafrost.heads.errors import HeadError

if TYPE_CHECKING:
    from permafrost.heads.necks.fpn import FPN
    from permafrost.heads.necks.simple_pyramid import SimpleFeaturePyramid
    from permafrost.model.spec import FeatureSpec


class MaskRCNN(Head):
    """A feature pyramid, proposals, boxes of classes, and a mask for each.

    In training it returns `loss_rpn_objectness`, `loss_rpn_box`, `loss_classifier`, `loss_box` and `loss_mask`, each a
    sum over this batch divided by what `counts` makes of `rpn_samples`, `roi_samples` and `mask_samples`, asked for in
    this order. In evaluation it returns one DetectionResult per image.

    Args:
        neck: the pyramid.
        rpn: proposals from all of its levels.
        box: the box branch, on the neck's levels but the extra ones.
        mask: the mask branch, on the same.
        classes: names of the K classes.
        ignore_overlap: share of its area inside a crowd region from which a box is no negative.
    """

    def __init__(
        self,
        *,
        neck: FPN | SimpleFeaturePyramid,
        rpn: RPN,
        box: BoxBranch,
        mask: MaskBranch,
        classes: Sequence[str],
        ignore_overlap: float,
    ) -> None:
        super().__init__()
        self.neck = neck
        self.rpn = rpn
        self.box = box
        self.mask = mask
        self.classes = tuple(classes)
        self.ignore_overlap = ignore_overlap

    def forward(
        self, features: Sequence[Tensor], batch: Batch, counts: LossCounts = world_mean_counts
    ) -> dict[str, Tensor] | list[DetectionResult]:
        """Losses in training mode, results in evaluation mode; see Head."""
        pyramid = self.neck(features)
        output = self.rpn(pyramid)
        proposals = self.rpn.propose(output, batch)
        # RoIAlign reads rows channel by channel; one copy here serves both branches.
        levels = [level.contiguous() for level in pyramid[: self.neck.num_backbone_levels]]
        if self.training:
            losses = self.rpn.loss(output, batch, counts)
            losses.update(self._region_losses(levels, proposals, batch, counts))
            return losses
        return self._results(levels, proposals, batch)

    def _region_losses(
        self, levels: Sequence[Tensor], proposals: Sequence[Tensor], batch: Batch, counts: LossCounts
    ) -> dict[str, Tensor]:
        samples = sample_regions(
            proposals,
            batch,
            self.box.config,
            num_classes=len(self.classes),
            ignore_overlap=self.ignore_overlap,
        )
        boxes, image_index = join(list(samples.boxes))
        logits, deltas = self.box(levels, boxes, image_index)
        losses = self.box.loss(logits, deltas, samples, counts)
        losses.update(self.mask.loss(levels, samples, batch, counts))
        return losses

    def _results(self, levels: Sequence[Tensor], proposals: Sequence[Tensor], batch: Batch) -> list[DetectionResult]:
        logits, deltas = self.box(levels, *join(proposals))
        detections = self.box.detect(logits, deltas, proposals, batch)
        boxes, image_index = join([found.boxes for found in detections])
        labels = torch.cat([found.labels for found in detections])
        masks = self.mask(levels, boxes, image_index, labels).sigmoid()
        return [
            DetectionResult(
                image_id=target.image_id,
                boxes=found.boxes.float(),
                labels=found.labels,
                scores=found.scores.float(),
                masks=own_masks.float(),
                size=target.size,
                original_size=target.original_size,
            )
            for target, found, own_masks in zip(
                batch.targets, detections, masks.split([len(found.boxes) for found in detections])
            )
        ]


def build_mask_rcnn(config: MaskRCNNConfig, *, spec: FeatureSpec, classes: Sequence[str]) -> MaskRCNN:
    """See MaskRCNNConfig.build."""
    if isinstance(classes, str) or len(classes) == 0:
        raise HeadError(f"classes is {classes!r}: give the names of the classes, at least one")
    neck = config.neck.build(spec=spec)
    pooled = neck.strides[: neck.num_backbone_levels]
    if any(stride & (stride - 1) for stride in pooled):
        raise HeadError(
            f"pooling: the neck's strides are {pooled}; boxes are assigned to levels by powers of two: choose levels of the "
            "backbone with such strides"
        )
    region = {"channels": config.neck.channels, "strides": pooled, "num_classes": len(classes)}
    return MaskRCNN(
        neck=neck,
        rpn=RPN(
            channels=config.neck.channels, strides=neck.strides, config=config.rpn, ignore_overlap=config.ignore_overlap
        ),
        box=BoxBranch(**region, config=config.box, pooling=config.pooling),
        mask=MaskBranch(**region, config=config.mask, pooling=config.pooling),
        classes=classes,
        ignore_overlap=config.ignore_overlap,
    )
