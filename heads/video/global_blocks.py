"""Define the global video head: attention over space and time at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from permafrost.heads.video.blocks import BlocksHead
from permafrost.heads.video.config import GlobalVideoConfig
from permafrost.model.spec import FeatureSpec


class GlobalVideoHead(BlocksHead):
    """Transformer blocks over all T x h x w tokens, average pool, one linear layer (the paper, Table 4).

    Args:
        spec: the backbone's maps.
        classes: names of the K classes.
        config: blocks, codes, norm and dropout.
    """

    def __init__(self, *, spec: FeatureSpec, classes: Sequence[str], config: GlobalVideoConfig) -> None:
        super().__init__(spec=spec, classes=classes, config=config, axes=("frames", "rows", "columns"))

    def fold(self, tokens: Tensor) -> Tensor:
        """Fold (B, T, L, D) to (B, 1, T * L, D)."""
        return tokens.flatten(1, 2).unsqueeze(1)

    def unfold(self, sequences: Tensor, num_frames: int) -> Tensor:
        """Unfold (B, 1, T * L, D) to (B, T, L, D)."""
        return sequences.squeeze(1).unflatten(1, (num_frames, -1))
