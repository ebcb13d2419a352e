"""Configure Mask2Former: values only, no torch.

Defaults are the public recipe of Mask2Former on ADE20K (Cheng et al. 2022) with the paper's smallest head: one block of the
pixel decoder, three of the transformer decoder and the prediction of the raw queries ("(3+1)x", Table 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from permafrost._configuration import Configuration
from permafrost.heads.checks import require, require_counts, require_positive
from permafrost.heads.config import HeadConfig


@dataclass
class PixelDecoderConfig(Configuration):
    """The pixel decoder: deformable attention over the coarser maps, then one step up to the finest."""

    num_blocks: int = 1
    """Deformable attention blocks: 1 or 6 in the paper."""
    channels: int = 256
    """Width of all maps, of the queries, and of the embedding every pixel gets."""
    num_heads: int = 8
    num_points: int = 4
    """Points that a head reads from every map."""
    ffn_channels: int = 1024
    kernel: Literal["reference", "triton"] = "reference"
    """The version that computes deformable attention: plain PyTorch, which runs anywhere, or the Triton kernel, on a GPU."""

    def __post_init__(self) -> None:
        require_counts("pixel_decoder.", self, "num_blocks", "num_points", "ffn_channels")
        name, channels, heads = "pixel_decoder.channels", self.channels, self.num_heads
        require(channels >= 1 and heads >= 1, name, channels, "channels and heads are at least 1")
        # A sine and a cosine of x and of y each.
        fits = channels % heads == 0 and channels % 4 == 0
        require(fits, name, channels, f"it must be a multiple of 4 and of the {heads} heads")


@dataclass
class TransformerDecoderConfig(Configuration):
    """The masked-attention decoder of a fixed number of queries; its width is the pixel decoder's."""

    num_blocks: int = 3
    """Blocks, each followed by a prediction; one more prediction is made of the raw queries. 3 or 9 in the paper, which
    counts that prediction too: "(3+1)x" and "(9+1)x"."""
    num_queries: int = 100
    num_heads: int = 8
    ffn_channels: int = 2048

    def __post_init__(self) -> None:
        require_counts("transformer_decoder.", self, "num_blocks", "num_queries", "num_heads", "ffn_channels")


@dataclass
class SegmentationLossConfig(Configuration):
    """Losses of every prediction, and what the matching of queries to segments costs: the same weights."""

    class_weight: float = 2.0
    mask_weight: float = 5.0
    """Weight of the cross-entropy of a mask's points."""
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    """Weight of a query without a segment, in the cross-entropy of classes."""
    num_points: int = 12544
    """Points per mask that losses and matching look at (112 x 112)."""
    oversample: float = 3.0
    """Candidates per point, of which the most uncertain are taken."""
    importance: float = 0.75
    """Share of the points chosen so; the others are uniform."""

    def __post_init__(self) -> None:
        require_positive("loss.", self, "class_weight", "mask_weight", "dice_weight", "no_object_weight")
        require_counts("loss.", self, "num_points", "oversample")
        require(0 <= self.importance <= 1, "loss.importance", self.importance, "give a share from 0 to 1")


@dataclass
class Mask2FormerConfig(HeadConfig):
    """Mask2Former (Cheng et al., CVPR 2022) for semantic segmentation."""

    task: ClassVar[str] = "segmentation"

    pixel_decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    transformer_decoder: TransformerDecoderConfig = field(default_factory=TransformerDecoderConfig)
    loss: SegmentationLossConfig = field(default_factory=SegmentationLossConfig)
    level_norm: bool = True
    """A trained LayerNorm over the channels of every backbone map (the backbone's own outputs are raw)."""

    def __post_init__(self) -> None:
        channels, heads = self.pixel_decoder.channels, self.transformer_decoder.num_heads
        require(
            channels % heads == 0,
            "transformer_decoder.num_heads",
            heads,
            f"it must divide pixel_decoder.channels ({channels})",
        )
