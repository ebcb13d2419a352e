"""Paste objects of one augmented image onto another: Simple Copy-Paste (Ghiasi et al., CVPR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from permafrost.data.detection.transforms import NetworkInput, boxes_of_masks, kept_boxes


def paste(
    below: NetworkInput,
    labels: Tensor,
    above: NetworkInput,
    above_labels: Tensor,
    generator: torch.Generator,
    *,
    min_box_side: float,
) -> tuple[NetworkInput, Tensor]:
    """Put a random half of one scene's objects onto another, both on canvases of one size.

    What they cover is taken from the masks below, whose boxes are derived anew; objects of which nothing is left, or less
    than a box of `min_box_side` pixels, are dropped. Objects below keep their order, the pasted ones follow. The boxes of
    crowd regions stay.

    Args:
        below: the image that is pasted into.
        labels: (N,) int64 of its objects.
        above: where the objects are from.
        above_labels: (M,) int64 of its objects.
        generator: each object of `above` is drawn from it with probability one half.
        min_box_side: see JitterConfig.

    Returns:
        the new scene, in which `kept` only counts the objects, and the labels of its objects.
    """
    chosen = torch.rand(len(above_labels), generator=generator) < 0.5
    pasted = above.masks[chosen]
    covered = pasted.any(dim=0)
    masks = torch.cat([below.masks & ~covered, pasted])
    boxes = boxes_of_masks(masks)
    kept = kept_boxes(boxes, min_box_side)
    height, width = (max(a, b) for a, b in zip(below.size, above.size if chosen.any() else below.size))
    semantic = below.semantic
    if semantic is not None and above.semantic is not None:
        semantic = torch.where(covered, above.semantic, semantic)
    scene = NetworkInput(
        image=torch.where(covered, above.image, below.image),
        masks=masks[kept],
        boxes=boxes[kept],
        kept=torch.arange(len(kept)),
        ignore_boxes=below.ignore_boxes,
        size=(height, width),
        semantic=semantic,
    )
    return scene, torch.cat([labels, above_labels[chosen]])[kept]
