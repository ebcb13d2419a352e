"""Define the temporal video head: what the frames' order adds, each cell by itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from permafrost.heads.video.blocks import BlocksHead
from permafrost.heads.video.config import TemporalVideoConfig
from permafrost.model.spec import FeatureSpec


class TemporalVideoHead(BlocksHead):
    """Transformer blocks over the T frames of each cell, average pool, one linear layer (the paper, Table 4).

    Args:
        spec: the backbone's maps.
        classes: names of the K classes.
        config: blocks, codes, norm and dropout.
    """

    def __init__(self, *, spec: FeatureSpec, classes: Sequence[str], config: TemporalVideoConfig) -> None:
        super().__init__(spec=spec, classes=classes, config=config, axes=("frames",))

    def fold(self, tokens: Tensor) -> Tensor:
        """Fold (B, T, L, D) to (B, L, T, D)."""
        return tokens.transpose(1, 2)

    def unfold(self, sequences: Tensor, num_frames: int) -> Tensor:
        """Unfold (B, L, T, D) to (B, T, L, D)."""
        return sequences.transpose(1, 2)
