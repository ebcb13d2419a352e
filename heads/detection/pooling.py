"""Cut regions out of a feature pyramid, and ground-truth masks out of an image.

Shapes: B images, R boxes of all images together, C channels, S side of the pooled grid, G ground-truth objects,
H W size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from permafrost.heads.detection.config import PoolingConfig
from permafrost.heads.detection.roi_align import roi_align

CANONICAL_LEVEL = 4
"""log2 of the stride from which a box of the canonical size is pooled (Lin et al. 2017, equation 1)."""

MAX_MASK_ELEMENTS = 2**26
"""Largest number of mask pixels that are held as floating point at a time."""


class RegionPooling(nn.Module):
    """RoIAlign from the level that fits each box (Lin et al. 2017, equation 1; He et al. 2017).

    Does the work of torchvision's MultiScaleRoIAlign with given strides instead of guessed ones, with half-pixel
    alignment, and with boxes that stay float32 beside bf16 maps.

    Args:
        resolution: S.
        strides: pixels per cell of each level, powers of two.
        config: the sampling of RoIAlign and the rule for levels.
    """

    def __init__(self, *, resolution: int, strides: Sequence[int], config: PoolingConfig) -> None:
        super().__init__()
        self.resolution = resolution
        self.strides = tuple(strides)
        self.config = config

    def levels(self, boxes: Tensor) -> Tensor:
        """Return the (R,) int64 index of the level for each (R, 4) box."""
        side = (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1).sqrt()
        # The small addend keeps a box of exactly the canonical size on its side of the border.
        level = torch.floor(CANONICAL_LEVEL + torch.log2(side / self.config.canonical_size) + 1e-6)
        finest = int(math.log2(self.strides[0]))
        return (
            level.clamp(min=finest, max=finest + len(self.strides) - 1).nan_to_num(nan=finest).to(torch.int64) - finest
        )

    def forward(self, levels: Sequence[Tensor], boxes: Tensor, image_index: Tensor) -> Tensor:
        """Pool every box.

        Args:
            levels: one (B, C, H_i, W_i) map per stride.
            boxes: (R, 4) xyxy in pixels; R may be 0.
            image_index: (R,) int64, the image of each box.

        Returns:
            (R, C, S, S) in the maps' dtype.
        """
        regions = torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1)
        level_of = self.levels(boxes)
        pooled, rows = [], []
        for i, (level, stride) in enumerate(zip(levels, self.strides, strict=True)):
            inside = torch.nonzero(level_of == i)[:, 0]
            rows.append(inside)
            pooled.append(
                roi_align(
                    level.to(boxes.dtype),
                    regions[inside],
                    self.resolution,
                    spatial_scale=1.0 / stride,
                    sampling_ratio=self.config.sampling_ratio,
                    aligned=self.config.aligned,
                ).to(level.dtype)
            )
        # Back into the order of the boxes; a copy to given rows has a plain gather as its gradient, indexing has not.
        found = torch.cat(pooled)
        return torch.empty_like(found).index_copy(0, torch.cat(rows), found)


def project_masks(masks: Tensor, boxes: Tensor, gt_index: Tensor, *, resolution: int, aligned: bool) -> Tensor:
    """Project ground-truth masks on the grid of each box: the share of every cell that the object covers.

    Args:
        masks: (G, H, W) bool.
        boxes: (R, 4) xyxy in pixels of the masks.
        gt_index: (R,) int64, the object each box stands for.
        resolution: S.
        aligned: pixel centres at half coordinates, as PoolingConfig says.

    Returns:
        (R, S, S) in the boxes' dtype, from 0 to 1.
    """
    targets = boxes.new_zeros(len(boxes), resolution, resolution)
    used, row = gt_index.unique(return_inverse=True)
    chunk = max(1, MAX_MASK_ELEMENTS // max(1, masks.shape[-2] * masks.shape[-1]))
    # Only masks that some box asks for turn from a byte per pixel to four, and only so many at once.
    for start in range(0, len(used), chunk):
        inside = torch.nonzero((row >= start) & (row < start + chunk))[:, 0]
        maps = masks[used[start : start + chunk], None].to(boxes.dtype)
        regions = torch.cat([(row[inside, None] - start).to(boxes.dtype), boxes[inside]], dim=1)
        cropped = roi_align(maps, regions, resolution, spatial_scale=1.0, sampling_ratio=0, aligned=aligned)
        targets[inside] = cropped[:, 0]
    return targets
