"""Configurations of the video heads: values only, no torch; `build` makes the live head.

Defaults are the paper's four blocks and the head of Video-Swin's public Kinetics-400 recipe (average pool, dropout 0.5).
The paper does not say the blocks' width, position codes or drop path: the width of the backbone's last map, learned
codes and none are this project's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from permafrost.heads.config import HeadConfig, HeadTask
from permafrost.heads.errors import HeadError

if TYPE_CHECKING:
    from permafrost.heads.video.clip_head import ClipHead
    from permafrost.model.spec import FeatureSpec

PositionKind = Literal["learned", "sincos", "none"]
"""learned: a table each for frames, rows and columns, resampled for clips of another size; sincos: fixed waves of the same
three axes, for any size; none: the blocks cannot tell the order."""


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise HeadError(f"{name} is {value!r}: {remedy}")


@dataclass
class LinearVideoConfig(HeadConfig):
    """Average over the clip's cells and frames, then one linear layer: blind to the order of frames (Table 4)."""

    task: ClassVar[HeadTask] = "video"

    dropout: float = 0.5
    """Share of the pooled channels that training sets to 0."""
    level_norm: bool = True
    """A trained LayerNorm over the channels of the backbone's last map (which is raw)."""

    def __post_init__(self) -> None:
        _require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "give a share from 0 to below 1")

    def build(self, *, spec: FeatureSpec, classes: Sequence[str]) -> ClipHead:
        """The live head, initialised from torch's global generator.

        Args:
            spec: the backbone's maps; the last one is used.
            classes: names of the K classes, in the order of the labels.

        Raises:
            HeadError: fewer than two classes, or a width that does not divide.
        """
        from permafrost.heads.video.linear import LinearVideoHead

        return LinearVideoHead(spec=spec, num_classes=len(classes), config=self)


@dataclass
class BlocksVideoConfig(LinearVideoConfig):
    """What heads with Transformer blocks have in common; their two kinds follow."""

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
        for name in ("num_blocks", "head_channels", "num_frames", "map_side"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        _require(
            self.width is None or self.width >= 1, "width", self.width, "give channels, or None for the backbone's"
        )
        _require(self.mlp_ratio > 0, "mlp_ratio", self.mlp_ratio, "it must be above 0")
        _require(0.0 <= self.drop_path < 1.0, "drop_path", self.drop_path, "give a probability from 0 to below 1")


@dataclass
class TemporalVideoConfig(BlocksVideoConfig):
    """Blocks whose attention runs over the frames, at each cell by itself (Table 4)."""

    def build(self, *, spec: FeatureSpec, classes: Sequence[str]) -> ClipHead:
        """See LinearVideoConfig.build."""
        from permafrost.heads.video.temporal import TemporalVideoHead

        return TemporalVideoHead(spec=spec, num_classes=len(classes), config=self)


@dataclass
class GlobalVideoConfig(BlocksVideoConfig):
    """Blocks whose attention runs over all cells of all frames at once (Table 4)."""

    def build(self, *, spec: FeatureSpec, classes: Sequence[str]) -> ClipHead:
        """See LinearVideoConfig.build."""
        from permafrost.heads.video.global_blocks import GlobalVideoHead

        return GlobalVideoHead(spec=spec, num_classes=len(classes), config=self)
