"""Define the second stage: which proposals it learns from, the box branch and the mask branch.

Shapes: B images, R boxes of all images together, S samples per image, C channels of the pyramid, K classes, M side of a
mask. Labels are 0..K-1; the classifier's last output, K, is the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms

from permafrost._modules import module_list
from permafrost.data.types import Batch
from permafrost.heads.base import LossCounts
from permafrost.heads.detection.boxes import box_loss, clip_boxes, giou_loss, image_sizes, larger_than
from permafrost.heads.detection.config import BoxHeadConfig, MaskHeadConfig, PoolingConfig
from permafrost.heads.detection.pooling import RegionPooling, project_masks
from permafrost.heads.detection.sampling import POSITIVE, drop_ignored, match_boxes, sample_balanced
from permafrost.heads.detection.soft_nms import soft_nms
from permafrost.heads.necks.norms import make_norm

MIN_DETECTION_SIDE = 1e-2
"""Pixels; thinner boxes have been clipped to nothing."""


@dataclass
class RegionSamples:
    """The proposals of each image that enter the loss, positive ones first.

    Attributes:
        boxes: (B, S, 4) xyxy.
        gt_boxes: (B, S, 4) the matched ground truth; `boxes` itself where not positive.
        gt_index: (B, S) int64 position of the matched object in its image; 0 where not positive.
        labels: (B, S) int64 in 0..K-1 where positive, else K.
        is_positive: (B, S) bool.
        is_valid: (B, S) bool; the rest fills up images with too few proposals and has no weight.
        is_truth: (B, S) bool; boxes that are the ground truth's own, added to the proposals.
    """

    boxes: Tensor
    gt_boxes: Tensor
    gt_index: Tensor
    labels: Tensor
    is_positive: Tensor
    is_valid: Tensor
    is_truth: Tensor


@dataclass
class PositiveRegions:
    """The positive samples of all images, R of them, image by image.

    Attributes:
        boxes: (R, 4) xyxy.
        image_index: (R,) int64.
        gt_index: (R,) int64 position of the object in its image.
        labels: (R,) int64 in 0..K-1.
    """

    boxes: Tensor
    image_index: Tensor
    gt_index: Tensor
    labels: Tensor

    @classmethod
    def of(cls, samples: RegionSamples) -> PositiveRegions:
        """Return the positive ones of the samples."""
        image_index, slot = samples.is_positive.nonzero(as_tuple=True)
        return cls(
            boxes=samples.boxes[image_index, slot],
            image_index=image_index,
            gt_index=samples.gt_index[image_index, slot],
            labels=samples.labels[image_index, slot],
        )


@dataclass
class Detections:
    """Final boxes of one image, by falling score: (N, 4) xyxy, (N,) int64 in 0..K-1, (N,) in [0, 1]."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor


@torch.no_grad()
def sample_regions(
    proposals: Sequence[Tensor],
    batch: Batch,
    config: BoxHeadConfig,
    *,
    num_classes: int,
    ignore_overlap: float,
    purpose: str = "roi",
) -> RegionSamples:
    """Add the ground truth to the proposals, match them and draw samples from each image's own generator.

    Args:
        proposals: one (R_i, 4) xyxy tensor per image; with its G_i true boxes it has A_i = R_i + G_i candidates.
        batch: targets and keys.
        config: thresholds and sizes.
        num_classes: K, the background's label.
        ignore_overlap: share of its area inside a crowd region from which a proposal is no negative.
        purpose: names the generators.
    """
    candidates, matches, assignments, classes = [], [], [], []
    for found, target in zip(proposals, batch.targets):
        gt_boxes = target.boxes.to(found.dtype)  # (G_i, 4)
        boxes = torch.cat([found, gt_boxes])  # (A_i, 4), the truth last: `is_truth` below counts on it
        index, assignment = match_boxes(  # (A_i,) each
            boxes, gt_boxes, positive_iou=config.positive_iou, negative_iou=config.positive_iou
        )
        ignored = target.ignore_boxes.to(found.dtype)
        assignment = drop_ignored(assignment, boxes, ignored, overlap=ignore_overlap)
        if len(gt_boxes):
            is_positive = assignment == POSITIVE  # (A_i,) bool
            matches.append(gt_boxes[index].where(is_positive[:, None], boxes))  # (A_i, 4)
            classes.append(target.labels[index].where(is_positive, num_classes))  # (A_i,)
            index = index.where(is_positive, 0)
        else:
            matches.append(boxes)
            classes.append(torch.full_like(index, num_classes))
        candidates.append((boxes, index))
        assignments.append(assignment)

    samples = sample_balanced(  # (B, S) each
        assignments,
        batch.keys,
        purpose,
        num_samples=config.num_samples,
        positive_fraction=config.positive_fraction,
    )

    def sampled(values: list[Tensor], fill: float) -> Tensor:
        padded = pad_sequence(values, batch_first=True, padding_value=fill)  # (B, max A_i, ...)
        rows = torch.arange(len(padded), device=padded.device)[:, None]  # (B, 1)
        return padded[rows, samples.index]  # (B, S, ...)

    is_truth = [  # (A_i,) bool each
        torch.arange(len(boxes), device=boxes.device) >= len(found) for (boxes, _), found in zip(candidates, proposals)
    ]
    return RegionSamples(
        boxes=sampled([boxes for boxes, _ in candidates], 0.0),
        gt_boxes=sampled(matches, 0.0),
        gt_index=sampled([index for _, index in candidates], 0),
        labels=sampled(classes, num_classes),
        is_positive=samples.is_positive,
        is_valid=samples.is_valid,
        is_truth=sampled(is_truth, False) & samples.is_valid,
    )


class BoxBranch(nn.Module):
    """Pools each proposal, classifies it and regresses one box per class, or one for all of them.

    D is the number of boxes it regresses: K, or 1 where they do not depend on the class.

    Args:
        channels: C.
        strides: pixels per cell of the pooled levels.
        num_classes: K.
        config: layers, sampling and losses.
        pooling: how regions are cut from the levels.
    """

    def __init__(
        self, *, channels: int, strides: Sequence[int], num_classes: int, config: BoxHeadConfig, pooling: PoolingConfig
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.config = config
        self.coder = BoxCoder(weights=tuple(1.0 / std for std in config.regression_stds))
        self.pool = RegionPooling(resolution=config.resolution, strides=strides, config=pooling)
        conv_widths = [channels] + [config.conv_channels] * config.num_convs
        self.convs = module_list(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(conv_widths))
        self.norms = nn.ModuleList(make_norm(config.norm, width) for width in conv_widths[1:])
        fc_widths = [conv_widths[-1] * config.resolution**2] + [config.fc_channels] * config.num_fc
        self.fcs = module_list(nn.Linear(a, b) for a, b in pairwise(fc_widths))
        self.classifier = nn.Linear(fc_widths[-1], num_classes + 1)
        self.num_boxes = 1 if config.class_agnostic else num_classes
        self.regressor = nn.Linear(fc_widths[-1], self.num_boxes * 4)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        for fc in self.fcs:
            nn.init.kaiming_uniform_(fc.weight, a=1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.normal_(self.regressor.weight, std=0.001)
        layers: list[nn.Conv2d | nn.Linear] = [*self.convs, *self.fcs, self.classifier, self.regressor]
        for layer in layers:
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self, levels: Sequence[Tensor], boxes: Tensor, image_index: Tensor, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return scores and encoded boxes, in the boxes' dtype.

        Args:
            levels: (B, C, H_i, W_i) maps.
            boxes: (R, 4) xyxy.
            image_index: (R,) int64.
            added: (R, C, resolution, resolution) that is added to the pooled regions.

        Returns:
            (R, K + 1) logits and (R, D, 4) deltas.
        """
        x = self.pool(levels, boxes, image_index)
        if added is not None:
            x = x + added
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x)))
        x = x.flatten(1)
        for fc in self.fcs:
            x = F.relu(fc(x))
        # The two small layers decide ranks and pixels: they run in the parameters' precision under autocast, too.
        with torch.autocast(device_type=x.device.type, enabled=False):
            x = x.to(self.classifier.weight.dtype)
            logits, deltas = self.classifier(x), self.regressor(x)
        return logits.to(boxes.dtype), deltas.to(boxes.dtype).view(-1, self.num_boxes, 4)

    def loss(self, logits: Tensor, deltas: Tensor, samples: RegionSamples, counts: LossCounts) -> dict[str, Tensor]:
        """Compute the cross-entropy of all samples and the box loss of the positive ones, over the count `roi_samples`.

        Args:
            logits: (B * S, K + 1).
            deltas: (B * S, D, 4).
            samples: what they were computed from.
            counts: what the sums are divided by, by name.
        """
        labels = samples.labels.flatten()
        classifier = F.cross_entropy(logits, labels, reduction="none")
        classifier = classifier.masked_fill(~samples.is_valid.flatten(), 0.0).sum()

        is_positive = samples.is_positive.flatten()
        of_class = self._of_class(deltas, labels.clamp(max=self.num_classes - 1))
        # Any box with an area keeps the targets of the rows finite that are not positive.
        unit = samples.boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
        gt_boxes = samples.gt_boxes.flatten(0, 1).where(is_positive[:, None], unit)
        boxes = samples.boxes.flatten(0, 1).where(is_positive[:, None], unit)
        if self.config.regression_loss == "giou":
            regression = giou_loss(self.coder.decode_single(of_class, boxes), gt_boxes, is_positive)
        else:
            targets = self.coder.encode_single(gt_boxes, boxes)
            regression = box_loss(of_class, targets, is_positive, beta=self.config.smooth_l1_beta)
        regression = regression * self.config.regression_weight

        count = counts("roi_samples", samples.is_valid.sum())
        return {"loss_classifier": classifier / count, "loss_box": regression / count}

    def _of_class(self, deltas: Tensor, labels: Tensor) -> Tensor:
        """Return (R, 4) of (R, D, 4): each row's box of its (R,) class."""
        rows = torch.arange(len(labels), device=labels.device)
        return deltas[rows, labels if self.num_boxes > 1 else torch.zeros_like(labels)]

    @torch.no_grad()
    def refine(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, sizes: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Return the regressed boxes, cut to their images: the proposals of a next stage.

        Args:
            logits: (R, K + 1).
            deltas: (R, D, 4).
            boxes: (R, 4) xyxy that they were computed from.
            sizes: (R, 2) width and height of each box's image.
            labels: (R,) int64 whose box to take; background (K) and None stand for the class that is the likeliest.

        Returns:
            (R, 4) xyxy.
        """
        likeliest = logits[:, :-1].argmax(dim=1)
        of = likeliest if labels is None else labels.where(labels < self.num_classes, likeliest)
        return clip_boxes(self.coder.decode_single(self._of_class(deltas, of), boxes), sizes)

    @torch.no_grad()
    def detect(self, scores: Tensor, deltas: Tensor, proposals: Sequence[Tensor], batch: Batch) -> list[Detections]:
        """Return the boxes of every class above the score threshold, thinned out class by class, the best of each image.

        Args:
            scores: (R, K) probabilities.
            deltas: (R, D, 4).
            proposals: one (R_i, 4) tensor per image; R is their sum.
            batch: for the images' sizes.
        """
        config = self.config
        counts = [len(found) for found in proposals]
        boxes = self.coder.decode_single(deltas.flatten(1), torch.cat(list(proposals))).view_as(deltas)
        sizes = image_sizes(batch.targets, like=boxes)

        results = []
        for i, (image_boxes, image_scores) in enumerate(zip(boxes.split(counts), scores.split(counts))):
            image_boxes = clip_boxes(image_boxes, sizes[i])
            keep = (image_scores > config.score_threshold) & larger_than(image_boxes, MIN_DETECTION_SIDE)
            row, label = keep.nonzero(as_tuple=True)
            found = image_boxes[row, label if self.num_boxes > 1 else torch.zeros_like(label)]
            best, best_scores = suppress(found, image_scores[row, label], label, config)
            results.append(Detections(boxes=found[best], labels=label[best], scores=best_scores))
        return results


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, config: BoxHeadConfig) -> tuple[Tensor, Tensor]:
    """Thin out one image's boxes class by class, as the configuration says.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,).
        labels: (N,) int64.
        config: how, and how many to keep.

    Returns:
        (M,) int64 which boxes stay, by falling score, and (M,) their scores.
    """
    if config.suppression == "hard":
        best = batched_nms(boxes, scores, labels, config.nms_iou)[: config.num_detections]
        return best, scores[best]
    return soft_nms(
        boxes,
        scores,
        labels,
        sigma=config.soft_sigma if config.suppression == "gaussian" else None,
        iou=config.nms_iou,
        min_score=config.soft_min_score,
        num_detections=config.num_detections,
    )


class MaskBranch(nn.Module):
    """Pools each box and draws one mask per class on a grid of twice the pooled resolution.

    Args:
        channels: C.
        strides: pixels per cell of the pooled levels.
        num_classes: K.
        config: layers and resolution.
        pooling: how regions are cut from the levels.
        takes_previous: whether `features` is given those of another branch to start from.
    """

    def __init__(
        self,
        *,
        channels: int,
        strides: Sequence[int],
        num_classes: int,
        config: MaskHeadConfig,
        pooling: PoolingConfig,
        takes_previous: bool = False,
    ) -> None:
        super().__init__()
        self.aligned = pooling.aligned
        self.pool = RegionPooling(resolution=config.resolution, strides=strides, config=pooling)
        widths = [channels] + [config.channels] * config.num_convs
        self.previous = nn.Conv2d(widths[-1], channels, 1) if takes_previous else None
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(make_norm(config.norm, width) for width in widths[1:])
        self.upsample = nn.ConvTranspose2d(widths[-1], config.channels, 2, stride=2)
        self.predictor = nn.Conv2d(config.channels, num_classes, 1)
        extra = [] if self.previous is None else [self.previous]
        for layer in (*extra, *self.convs, self.upsample):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        for layer in (*extra, *self.convs, self.upsample, self.predictor):
            nn.init.zeros_(layer.bias)

    def forward(self, levels: Sequence[Tensor], boxes: Tensor, image_index: Tensor, labels: Tensor) -> Tensor:
        """Return logits of the mask of each box's own class.

        Args:
            levels: (B, C, H_i, W_i) maps.
            boxes: (R, 4) xyxy; R may be 0.
            image_index: (R,) int64.
            labels: (R,) int64 in 0..K-1.

        Returns:
            (R, M, M) in the boxes' dtype.
        """
        x = self.features(self.pool(levels, boxes, image_index))
        return self.logits(x, labels).to(boxes.dtype)

    def features(self, regions: Tensor, previous: Tensor | None = None) -> Tensor:
        """Return what the convolutions make of (R, C, S, S) pooled regions; to which, if given, the ReLU of a 1x1 convolution of
        another branch's features is added (Chen et al. 2019, "Hybrid Task Cascade", equation 5)."""
        x = regions
        if self.previous is not None:
            x = x + F.relu(self.previous(previous))
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x)))
        return x

    def logits(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return (R, M, M) logits, the mask of each box's own (R,) class."""
        x = self.predictor(F.relu(self.upsample(features)))
        index = labels[:, None, None, None].expand(-1, 1, *x.shape[-2:])
        return x.gather(1, index)[:, 0]

    def loss(
        self, levels: Sequence[Tensor], samples: RegionSamples, batch: Batch, counts: LossCounts
    ) -> dict[str, Tensor]:
        """Compute the binary cross-entropy per mask cell of the positive samples, over the count `mask_samples` (their number).

        Without a positive sample the branch runs on no region at all: its parameters get gradients of zero.
        """
        regions = PositiveRegions.of(samples)
        logits = self(levels, regions.boxes, regions.image_index, regions.labels)
        return {"loss_mask": self.loss_of(logits, regions, batch, counts)}

    def loss_of(self, logits: Tensor, regions: PositiveRegions, batch: Batch, counts: LossCounts) -> Tensor:
        """Compute the mask loss of (R, M, M) logits of these regions."""
        per_image = regions.image_index.bincount(minlength=len(batch.targets)).tolist()
        targets = torch.cat(
            [
                project_masks(target.masks, own, index, resolution=logits.shape[-1], aligned=self.aligned)
                for target, own, index in zip(
                    batch.targets, regions.boxes.split(per_image), regions.gt_index.split(per_image)
                )
            ]
        )
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        count = counts("mask_samples", regions.labels.new_tensor(len(regions.labels)))
        return loss.sum() / (logits.shape[-1] * logits.shape[-2]) / count


def join(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (R, 4) boxes of all images, and the (R,) int64 image of each."""
    counts = torch.tensor([len(own) for own in boxes]).to(boxes[0].device)
    image_index = torch.arange(len(boxes), device=counts.device).repeat_interleave(
        counts, output_size=sum(map(len, boxes))
    )
    return torch.cat(list(boxes)), image_index
