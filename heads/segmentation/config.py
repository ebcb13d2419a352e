"""Configurations of Mask2Former: values only, no torch; `build` makes the live head.

Defaults are the public recipe of Mask2Former on ADE20K (Cheng et al. 2022) with the paper's smallest head: one block of the
pixel decoder, three of the transformer decoder and the prediction of the raw queries ("(3+1)x", Table 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from permafrost.heads.config import HeadConfig, HeadTask
from permafrost.heads.errors import HeadError

if TYPE_CHECKING:
    from permafrost.heads.segmentation.mask2former import Mask2Former
    from permafrost.model.spec import FeatureSpec


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise HeadError(f"{name} is {value!r}: {remedy}")


def _require_width(prefix: str, channels: int, num_heads: int) -> None:
    _require(channels >= 1 and num_heads >= 1, f"{prefix}.channels", channels, "channels and heads are at least 1")
    # A sine and a cosine of x and of y each.
    _require(
        channels % num_heads == 0 and channels % 4 == 0,
        f"{prefix}.channels",
        channels,
        f"it must be a multiple of 4 and of the {num_heads} heads",
    )


@dataclass
class PixelDecoderConfig:
    """The pixel decoder: deformable attention over the coarser maps, then one step up to the finest."""

    num_blocks: int = 1
    """Deformable attention blocks: 1 or 6 in the paper."""
    channels: int = 256
    """Of all maps, of the queries, and of the embedding every pixel gets."""
    num_heads: int = 8
    num_points: int = 4
    """Points that a head reads from every map."""
    ffn_channels: int = 1024
    kernel: Literal["reference", "triton"] = "reference"
    """What computes deformable attention: plain PyTorch, which runs anywhere, or the Triton kernel, on a GPU."""

    def __post_init__(self) -> None:
        for name in ("num_blocks", "num_points", "ffn_channels"):
            value = getattr(self, name)
            _require(value >= 1, f"pixel_decoder.{name}", value, "it must be at least 1")
        _require_width("pixel_decoder", self.channels, self.num_heads)


@dataclass
class TransformerDecoderConfig:
    """The masked-attention decoder of a fixed number of queries; its width is the pixel decoder's."""

    num_blocks: int = 3
    """Blocks, each followed by a prediction; one more prediction is made of the raw queries. 3 or 9 in the paper, which
    counts that prediction too: "(3+1)x" and "(9+1)x"."""
    num_queries: int = 100
    num_heads: int = 8
    ffn_channels: int = 2048

    def __post_init__(self) -> None:
        for name in ("num_blocks", "num_queries", "num_heads", "ffn_channels"):
            value = getattr(self, name)
            _require(value >= 1, f"transformer_decoder.{name}", value, "it must be at least 1")


@dataclass
class SegmentationLossConfig:
    """Losses of every prediction, and what the matching of queries to segments costs: the same weights."""

    class_weight: float = 2.0
    mask_weight: float = 5.0
    """Of the cross-entropy of a mask's points."""
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    """Of a query without a segment, in the cross-entropy of classes."""
    num_points: int = 12544
    """Points per mask that losses and matching look at (112 x 112)."""
    oversample: float = 3.0
    """Candidates per point, of which the most uncertain are taken."""
    importance: float = 0.75
    """Share of the points chosen so; the others are uniform."""

    def __post_init__(self) -> None:
        for name in ("class_weight", "mask_weight", "dice_weight", "no_object_weight"):
            value = getattr(self, name)
            _require(value > 0, f"loss.{name}", value, "it must be above 0")
        _require(self.num_points >= 1, "loss.num_points", self.num_points, "it must be at least 1")
        _require(self.oversample >= 1, "loss.oversample", self.oversample, "it must be at least 1")
        _require(0 <= self.importance <= 1, "loss.importance", self.importance, "give a share from 0 to 1")


@dataclass
class Mask2FormerConfig(HeadConfig):
    """Mask2Former (Cheng et al., CVPR 2022) for semantic segmentation."""

    task: ClassVar[HeadTask] = "segmentation"

    pixel_decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    transformer_decoder: TransformerDecoderConfig = field(default_factory=TransformerDecoderConfig)
    loss: SegmentationLossConfig = field(default_factory=SegmentationLossConfig)
    level_norm: bool = True
    """A trained LayerNorm over the channels of every backbone map (the backbone's own outputs are raw)."""

    def __post_init__(self) -> None:
        channels, heads = self.pixel_decoder.channels, self.transformer_decoder.num_heads
        _require(
            channels % heads == 0,
            "transformer_decoder.num_heads",
            heads,
            f"it must divide pixel_decoder.channels ({channels})",
        )

    def build(self, *, spec: FeatureSpec, classes: Sequence[str]) -> Mask2Former:
        """The live head, initialised from torch's global generator.

        Args:
            spec: the backbone's maps: at least two, the finest at stride 4 in the released recipe.
            classes: names of the K classes, in the order of the labels.

        Raises:
            HeadError: the backbone gives one map only, or there is no class.
        """
        from permafrost.heads.segmentation.mask2former import Mask2Former

        return Mask2Former(spec=spec, classes=classes, config=self)
