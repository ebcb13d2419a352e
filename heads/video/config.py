"""Configure the video heads: values only, no torch.

Defaults are the paper's four blocks and the head of Video-Swin's public Kinetics-400 recipe (average pool, dropout 0.5).
The paper does not say the blocks' width, position codes or drop path: the width of the backbone's last map, learned
codes and none are this project's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from permafrost.heads.checks import require, require_counts, require_positive
from permafrost.heads.config import HeadConfig

PositionKind = Literal["learned", "sincos", "none"]
"""learned: a table each for frames, rows and columns, resampled for clips of another size; sincos: fixed waves of the same
three axes, for any size; none: the blocks cannot tell the order."""


@dataclass
class LinearVideoConfig(HeadConfig):
    """Average over the clip's cells and frames, then one linear layer: blind to the order of frames (Table 4)."""

    task: ClassVar[str] = "video"

    dropout: float = 0.5
    """Share of the pooled channels that training sets to 0."""
    level_norm: bool = True
    """A trained LayerNorm over the channels of the backbone's last map (which is raw)."""

    def __post_init__(self) -> None:
        require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "give a share from 0 to below 1")


@dataclass
class BlocksVideoConfig(LinearVideoConfig):
    """The fields that heads with Transformer blocks share; their two kinds follow."""

    num_blocks: int = 4
    width: int | None = None
    """Channels inside the blocks; None takes the backbone map's own, anything else adds a linear layer in front."""
    head_channels: int = 64
    """Channels of one attention head."""
    mlp_ratio: float = 4.0
    position: PositionKind = "learned"
    num_frames: int = 16
    """Rows of a learned table of frames; a clip of another length resamples it."""
    map_side: int = 7
    """Rows of the learned tables of rows and columns; global blocks only."""
    drop_path: float = 0.0
    """Probability of dropping a branch of the last block; it rises linearly from 0 at the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts("", self, "num_blocks", "head_channels", "num_frames", "map_side")
        require(self.width is None or self.width >= 1, "width", self.width, "give channels, or None for the backbone's")
        require_positive("", self, "mlp_ratio")
        require(0.0 <= self.drop_path < 1.0, "drop_path", self.drop_path, "give a probability from 0 to below 1")


@dataclass
class TemporalVideoConfig(BlocksVideoConfig):
    """Blocks whose attention runs over the frames, at each cell by itself (Table 4)."""


@dataclass
class GlobalVideoConfig(BlocksVideoConfig):
    """Blocks whose attention runs over all cells of all frames at once (Table 4)."""
