"""Compute the losses of Mask2Former: every prediction is matched with the segments anew, and learns from all of them.

Cross-entropy of classes; cross-entropy and dice of masks, at points of which three quarters lie where the mask is least sure
(Mask2Former, Cheng et al. 2022, sections 3.2.2 and 3.3). Points are drawn per image from its key; all masks of an image and
prediction choose among the same candidates, where the released code draws candidates for every mask.

Shapes: L predictions, B images, Q queries, K classes, N segments of the richest image, H W size of the input, h w of a mask's
logits, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from permafrost.data.types import Batch, SampleKey
from permafrost.heads.base import LossCounts
from permafrost.heads.segmentation.config import SegmentationLossConfig
from permafrost.heads.segmentation.matcher import UNMATCHED, match, matching_cost
from permafrost.heads.segmentation.points import draw_points, read_points, uncertain_points
from permafrost.heads.segmentation.transformer_decoder import Prediction


@dataclass
class Segments:
    """The segments of a batch: one per image and class that occurs, padded to the richest image, to one at least.

    Attributes:
        labels: (B, N) int64; 0 in the padding.
        masks: (B, N, H, W) 0 or 1, in the precision of the losses; pixels without a class belong to none.
        counts: segments of each image.
    """

    labels: Tensor
    masks: Tensor
    counts: list[int]


def collect_segments(batch: Batch, *, dtype: torch.dtype) -> Segments:
    """Return the segments of a batch's semantic maps."""
    maps = torch.stack([target.semantic for target in batch.targets])
    counts = [len(target.labels) for target in batch.targets]
    labels = maps.new_zeros((len(counts), max(1, *counts)), dtype=torch.int64)
    # No class is 256 in a map of bytes: padding has no pixel.
    wanted = torch.full_like(labels, 256)
    for row, sought, target in zip(labels, wanted, batch.targets):
        row[: len(target.labels)] = target.labels
        sought[: len(target.labels)] = target.labels
    masks = (maps[:, None] == wanted[:, :, None, None]).to(dtype)
    return Segments(labels, masks, counts)


class Criterion:
    """Losses of a head's predictions; it has no parameters.

    Args:
        num_classes: K.
        config: weights of the losses and numbers of points.
    """

    def __init__(self, *, num_classes: int, config: SegmentationLossConfig) -> None:
        self.num_classes = num_classes
        self.config = config

    def __call__(self, predictions: Sequence[Prediction], batch: Batch, counts: LossCounts) -> dict[str, Tensor]:
        """Return the three losses of the last prediction, and the sum of all of the others'."""
        segments = collect_segments(batch, dtype=predictions[0].masks.dtype)
        queries = self.match(predictions, segments, batch.keys)
        of_class, of_mask, of_dice = self.losses(predictions, segments, queries, batch.keys, counts)
        return {
            "loss_class": of_class[-1],
            "loss_mask": of_mask[-1],
            "loss_dice": of_dice[-1],
            "loss_auxiliary": (of_class + of_mask + of_dice)[:-1].sum(),
        }

    @torch.no_grad()
    def match(self, predictions: Sequence[Prediction], segments: Segments, keys: Sequence[SampleKey]) -> Tensor:
        """Return (L, B, N) int64: the query that the cheapest assignment gives each segment."""
        points = draw_points(
            keys,
            "segmentation/match",
            num_predictions=len(predictions),
            num_points=self.config.num_points,
            like=segments.masks,
        )
        targets = read_points(segments.masks, points.transpose(0, 1))
        costs = [
            matching_cost(
                prediction.classes,
                read_points(prediction.masks, own[:, None])[:, :, 0],
                segments.labels,
                targets[:, :, number],
                config=self.config,
            )
            for number, (prediction, own) in enumerate(zip(predictions, points))
        ]
        return match(torch.stack(costs), segments.counts)

    def losses(
        self,
        predictions: Sequence[Prediction],
        segments: Segments,
        queries: Tensor,
        keys: Sequence[SampleKey],
        counts: LossCounts,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the (L,) weighted losses of each prediction: of classes, of masks' points, and dice.

        Args:
            predictions: L of them.
            segments: of the batch.
            queries: (L, B, N) of `match`.
            keys: of the images.
            counts: what sums are divided by; asked for `segments` and `class_weights`.
        """
        config, device = self.config, queries.device
        matched = queries != UNMATCHED  # (L, B, N)
        logits = torch.stack([prediction.classes for prediction in predictions])  # (L, B, Q, K + 1)
        num_queries = logits.shape[2]
        # A slot behind the last query takes what is not matched.
        wanted = torch.full((*logits.shape[:2], num_queries + 1), self.num_classes, device=device)
        labels = segments.labels.expand(len(predictions), -1, -1)  # (L, B, N)
        wanted = wanted.scatter(2, queries.where(matched, num_queries), labels)[..., :num_queries]  # (L, B, Q)
        weights = torch.where(wanted == self.num_classes, logits.new_tensor(config.no_object_weight), 1.0)
        entropy = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view_as(weights)
        # As many queries are matched in every prediction, so the weights add up to the same.
        total: float = sum(min(num_queries, count) for count in segments.counts)
        total += config.no_object_weight * (num_queries * len(keys) - total)
        of_class = (entropy * weights).sum(dim=(1, 2)) / counts(
            "class_weights", torch.tensor(float(total), device=device)
        )

        at_points, targets = self._at_points(predictions, segments, queries.clamp(min=0), keys)
        cross = F.binary_cross_entropy_with_logits(at_points, targets, reduction="none").mean(dim=3)
        shares = at_points.sigmoid()  # (L, B, N, P)
        both = shares.sum(dim=3) + targets.sum(dim=3)  # (L, B, N)
        dice = 1 - (2 * (shares * targets).sum(dim=3) + 1) / (both + 1)
        num_segments = counts("segments", torch.tensor(float(sum(segments.counts)), device=device))
        # Without a segment the mask of the first query is looked at all the same, with weight 0.
        of_mask, of_dice = ((loss * matched).sum(dim=(1, 2)) / num_segments for loss in (cross, dice))
        return config.class_weight * of_class, config.mask_weight * of_mask, config.dice_weight * of_dice

    def _at_points(
        self, predictions: Sequence[Prediction], segments: Segments, queries: Tensor, keys: Sequence[SampleKey]
    ) -> tuple[Tensor, Tensor]:
        """Return (L, B, N, P) logits of the queries' masks at their points, and the segments' masks there."""
        config = self.config
        num_predictions, num_images, num_masks = queries.shape
        num_uncertain = int(config.importance * config.num_points)
        draw = partial(draw_points, keys, num_predictions=num_predictions, like=segments.masks)
        num_candidates = int(config.oversample * config.num_points)
        candidates = draw("segmentation/candidates", num_points=num_candidates)
        uniform = draw("segmentation/uniform", num_points=config.num_points - num_uncertain)
        image = torch.arange(num_images, device=queries.device)[:, None]
        # (L * B, N, H, W): of each segment the mask of its query.
        logits = torch.cat([prediction.masks[image, own] for prediction, own in zip(predictions, queries)])
        points = uncertain_points(
            logits.detach(), candidates.flatten(0, 1), uniform.flatten(0, 1), num_uncertain=num_uncertain
        )
        at_points = read_points(logits.flatten(0, 1)[:, None], points.flatten(0, 1)[:, None])
        of_segment = points.view(num_predictions, num_images * num_masks, -1, 2).transpose(0, 1)
        targets = read_points(segments.masks.flatten(0, 1)[:, None], of_segment)
        shape = (num_predictions, num_images, num_masks, -1)
        return at_points.view(shape), targets[:, 0].transpose(0, 1).reshape(shape)
