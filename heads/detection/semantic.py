"""Define the semantic branch of Hybrid Task Cascade (Chen et al. 2019, section 3.3): all levels of the pyramid fused on one.

Shapes: B images, C channels of the pyramid, H W size of the fused level, K classes of the semantic maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.data.types import Batch
from permafrost.heads.base import LossCounts
from permafrost.heads.detection.boxes import box_dtype
from permafrost.heads.detection.config import PoolingConfig, SemanticBranchConfig
from permafrost.heads.detection.pooling import RegionPooling
from permafrost.heads.errors import HeadError

IGNORED = 255


class SemanticBranch(nn.Module):
    """All levels, resized to one of them, by 1x1 convolutions and summed; 3x3 convolutions; a class per cell; an embedding.

    The embedding is pooled for every region and added to what the box and mask branches see of it.

    Args:
        channels: C.
        strides: pixels per cell of all levels of the pyramid.
        resolution: side of the pooled embedding.
        config: level, width, classes and weight.
        pooling: how regions are cut from the embedding.

    Raises:
        HeadError: the pyramid has no such level.
    """

    def __init__(
        self,
        *,
        channels: int,
        strides: Sequence[int],
        resolution: int,
        config: SemanticBranchConfig,
        pooling: PoolingConfig,
    ) -> None:
        super().__init__()
        if config.level >= len(strides):
            raise HeadError(f"semantic.level is {config.level}: the pyramid has the levels 0..{len(strides) - 1}")
        self.config = config
        self.stride = strides[config.level]
        self.pool = RegionPooling(resolution=resolution, strides=(self.stride,), config=pooling)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in strides)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(config.num_convs))
        self.embedding = nn.Conv2d(channels, channels, 1)
        self.classifier = nn.Conv2d(channels, config.num_classes, 1)
        for conv in (*self.lateral, *self.convs, self.embedding, self.classifier):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return (B, K, H, W) logits and the (B, C, H, W) embedding of all levels of the pyramid, (B, C, H_i, W_i) each."""
        fused = pyramid[self.config.level].shape[-2:]

        def resized(level: Tensor) -> Tensor:
            same = level.shape[-2:] == fused
            return level if same else F.interpolate(level, size=fused, mode="bilinear", align_corners=True)

        x: Tensor | float = 0.0
        for conv, level in zip(self.lateral, pyramid, strict=True):
            # Each (B, C, H_i, W_i) becomes (B, C, H, W).
            x = x + (F.relu(conv(resized(level))) if self.config.resize == "before" else resized(F.relu(conv(level))))
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.classifier(x), F.relu(self.embedding(x)).contiguous()

    def loss(self, logits: Tensor, batch: Batch, counts: LossCounts) -> dict[str, Tensor]:
        """Compute the cross-entropy of the cells whose pixel in the middle has a class, over the count `semantic_cells`.

        Raises:
            HeadError: the batch has no semantic maps.
        """
        maps = [target.semantic for target in batch.targets]
        if any(own is None for own in maps):
            raise HeadError(
                "semantic: the images come without semantic maps: set data.semantic, or semantic.num_classes 0 to do without "
                "the branch"
            )
        labels = cells(torch.stack(maps), self.stride, logits.shape[-2:])
        loss = F.cross_entropy(logits.to(box_dtype(self)), labels, ignore_index=IGNORED, reduction="none")
        count = counts("semantic_cells", (labels != IGNORED).sum())
        return {"loss_semantic": self.config.weight * loss.sum() / count}


def cells(maps: Tensor, stride: int, size: Sequence[int]) -> Tensor:
    """Return (B, H, W) int64 of (B, h, w) uint8 maps: the pixel in the middle of each cell, IGNORED beyond the image."""
    rows, columns = (torch.arange(side, device=maps.device) * stride + stride // 2 for side in size)
    inside = (rows < maps.shape[-2])[:, None] & (columns < maps.shape[-1])
    picked = maps[:, rows.clamp(max=maps.shape[-2] - 1)][:, :, columns.clamp(max=maps.shape[-1] - 1)]
    return picked.long().masked_fill(~inside, IGNORED)
