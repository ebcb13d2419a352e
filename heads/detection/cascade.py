"""Define Cascade Mask R-CNN (Cai and Vasconcelos 2019) and, with its three options, Hybrid Task Cascade (Chen et al. 2019).

Shapes: B images, R regions of all images together, C channels of the pyramid, K classes, M side of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from permafrost._modules import module_list
from permafrost.data.detection.types import DetectionResult
from permafrost.data.types import Batch
from permafrost.heads.base import LossCounts
from permafrost.heads.detection.boxes import image_sizes
from permafrost.heads.detection.mask_rcnn import TwoStageHead, typed_results
from permafrost.heads.detection.roi import BoxBranch, MaskBranch, PositiveRegions, RegionSamples, join
from permafrost.heads.detection.semantic import SemanticBranch


@dataclass
class RegionMaps:
    """The maps that regions are pooled from: the pyramid's levels, and the semantic branch's (B, C, H, W) embedding or None."""

    levels: list[Tensor]
    embedding: Tensor | None


class CascadeMaskRCNN(TwoStageHead):
    """Stages of a box and a mask branch; each stage's boxes, refined, are the next one's proposals.

    A stage samples from the refined boxes and the ground truth anew, under its own overlap. In evaluation the class scores
    are the mean over the stages, the boxes the last one's, the mask probabilities the mean over the stages.

    Its further losses are those of MaskRCNN with the stage's number behind, `loss_classifier_1` and so on, over counts that
    are numbered likewise; before them, with a semantic branch, `loss_semantic` over `semantic_cells`.

    Args:
        boxes: the box branch of each stage.
        masks: the mask branch of each stage.
        stage_weights: what each stage's losses are multiplied by.
        interleaved: whether a stage's masks are learned on boxes that its box branch has refined, matched and sampled anew.
        information_flow: whether each mask branch starts from the features of the one before, which then is run, and learns,
            on these regions, too.
        semantic: the branch whose embedding is added to what is pooled for every region, or None.
        parts: the arguments of TwoStageHead.
    """

    def __init__(
        self,
        *,
        boxes: Sequence[BoxBranch],
        masks: Sequence[MaskBranch],
        stage_weights: Sequence[float],
        interleaved: bool = False,
        information_flow: bool = False,
        semantic: SemanticBranch | None = None,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self.boxes = module_list(boxes)
        self.masks = module_list(masks)
        self.stage_weights = tuple(stage_weights)
        self.interleaved = interleaved
        self.information_flow = information_flow
        self.semantic = semantic

    def region_losses(
        self, pyramid: Sequence[Tensor], proposals: Sequence[Tensor], batch: Batch, counts: LossCounts
    ) -> dict[str, Tensor]:
        """Return the losses of the semantic branch, if there is one, and of every stage."""
        losses: dict[str, Tensor] = {}
        maps = RegionMaps(self.pooled_levels(pyramid), None)
        if self.semantic is not None:
            logits, maps.embedding = self.semantic(pyramid)
            losses.update(self.semantic.loss(logits, batch, counts))
        for i, weight in enumerate(self.stage_weights):
            own = self._stage_losses(i, maps, proposals, batch, _Numbered(counts, i + 1))
            proposals = own.pop("refined")
            losses.update({f"{name}_{i + 1}": weight * loss for name, loss in own.items()})
        return losses

    def _stage_losses(
        self, stage: int, maps: RegionMaps, proposals: Sequence[Tensor], batch: Batch, counts: LossCounts
    ) -> dict[str, Any]:
        """Return the losses of one stage, and "refined": the boxes it leaves to the next, one (R_i, 4) tensor per image."""
        box = self.boxes[stage]
        samples = self.sample(proposals, batch, box, f"roi_{stage + 1}")
        boxes, image_index = join(list(samples.boxes))
        logits, deltas = box(maps.levels, boxes, image_index, self._box_addition(maps, boxes, image_index))
        losses: dict[str, Any] = box.loss(logits, deltas, samples, counts)
        refined = self._refined(box, logits, deltas, samples, batch)
        if self.interleaved:
            samples = self.sample(refined, batch, box, f"mask_{stage + 1}")
        regions = PositiveRegions.of(samples)
        masks = self._stage_masks(stage, maps, regions)
        losses["loss_mask"] = self.masks[stage].loss_of(masks, regions, batch, counts)
        return {**losses, "refined": refined}

    def _refined(
        self, box: BoxBranch, logits: Tensor, deltas: Tensor, samples: RegionSamples, batch: Batch
    ) -> list[Tensor]:
        """Return every sampled box, regressed; not the ground truth's own, which the next stage adds by itself."""
        num_samples = samples.boxes.shape[1]
        boxes = samples.boxes.flatten(0, 1)
        sizes = image_sizes(batch.targets, like=boxes).repeat_interleave(num_samples, dim=0)
        refined = box.refine(logits, deltas, boxes, sizes, labels=samples.labels.flatten()).view_as(samples.boxes)
        return [own[keep] for own, keep in zip(refined, samples.is_valid & ~samples.is_truth)]

    def _box_addition(self, maps: RegionMaps, boxes: Tensor, image_index: Tensor) -> Tensor | None:
        if self.semantic is None or maps.embedding is None:
            return None
        pooled = self.semantic.pool([maps.embedding], boxes, image_index)
        return F.adaptive_avg_pool2d(pooled, self.boxes[0].config.resolution)

    def _mask_regions(self, maps: RegionMaps, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Pool what all mask branches see of these boxes, (R, C, S, S): they pool alike."""
        regions = self.masks[0].pool(maps.levels, boxes, image_index)
        if self.semantic is not None and maps.embedding is not None:
            regions = regions + self.semantic.pool([maps.embedding], boxes, image_index)
        return regions

    def _stage_masks(self, stage: int, maps: RegionMaps, regions: PositiveRegions) -> Tensor:
        """Return (R, M, M) logits of one stage in training; the branches before it run only where their features are handed on."""
        pooled = self._mask_regions(maps, regions.boxes, regions.image_index)
        first = 0 if self.information_flow else stage
        features = self.masks[first].features(pooled, None)
        for i in range(first + 1, stage + 1):
            features = self.masks[i].features(pooled, features)
        return self.masks[stage].logits(features, regions.labels).to(regions.boxes.dtype)

    def results(self, pyramid: Sequence[Tensor], proposals: Sequence[Tensor], batch: Batch) -> list[DetectionResult]:
        """Return the boxes of each image with their masks."""
        maps = RegionMaps(self.pooled_levels(pyramid), None)
        if self.semantic is not None:
            _, maps.embedding = self.semantic(pyramid)
        scores = pyramid[0].new_zeros(())
        for i, box in enumerate(self.boxes):
            boxes, image_index = join(list(proposals))
            logits, deltas = box(maps.levels, boxes, image_index, self._box_addition(maps, boxes, image_index))
            scores = scores + logits.softmax(dim=-1)[:, :-1] / len(self.boxes)
            if i < len(self.boxes) - 1:
                sizes = image_sizes(batch.targets, like=boxes)[image_index]
                refined = box.refine(logits, deltas, boxes, sizes)
                proposals = refined.split([len(own) for own in proposals])
        detections = self.boxes[-1].detect(scores, deltas, proposals, batch)
        boxes, image_index = join([found.boxes for found in detections])
        labels = torch.cat([found.labels for found in detections])
        regions = self._mask_regions(maps, boxes, image_index)
        masks, features = [], None
        for mask in self.masks:
            features = mask.features(regions, features)
            masks.append(mask.logits(features, labels).to(boxes.dtype).sigmoid())
        return typed_results(detections, torch.stack(masks).mean(dim=0), batch)


class _Numbered:
    """LossCounts of one stage: its names get the stage's number."""

    def __init__(self, counts: LossCounts, number: int) -> None:
        self.counts, self.number = counts, number

    def __call__(self, name: str, count: Tensor) -> Tensor:
        return self.counts(f"{name}_{self.number}", count)
