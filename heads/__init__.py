"""Heads: what is trained on a frozen backbone's feature maps. Names load on first use: configurations need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from permafrost._lazy import attach

if TYPE_CHECKING:
    from permafrost.heads.base import Head as Head, LossCounts as LossCounts, world_mean_counts as world_mean_counts
    from permafrost.heads.config import (
        BiFPNConfig as BiFPNConfig,
        BoxHeadConfig as BoxHeadConfig,
        FPNConfig as FPNConfig,
        HeadConfig as HeadConfig,
        MaskHeadConfig as MaskHeadConfig,
        MaskRCNNConfig as MaskRCNNConfig,
        PoolingConfig as PoolingConfig,
        PyramidConfig as PyramidConfig,
        ResidualFPNConfig as ResidualFPNConfig,
        RPNConfig as RPNConfig,
        SimplePyramidConfig as SimplePyramidConfig,
    )
    from permafrost.heads.detection.config import (
        CascadeConfig as CascadeConfig,
        HTCConfig as HTCConfig,
        SemanticBranchConfig as SemanticBranchConfig,
    )
    from permafrost.heads.detection.mask_rcnn import MaskRCNN as MaskRCNN
    from permafrost.heads.errors import HeadError as HeadError
    from permafrost.heads.segmentation.config import (
        Mask2FormerConfig as Mask2FormerConfig,
        PixelDecoderConfig as PixelDecoderConfig,
        SegmentationLossConfig as SegmentationLossConfig,
        TransformerDecoderConfig as TransformerDecoderConfig,
    )
    from permafrost.heads.video.config import (
        BlocksVideoConfig as BlocksVideoConfig,
        GlobalVideoConfig as GlobalVideoConfig,
        LinearVideoConfig as LinearVideoConfig,
        TemporalVideoConfig as TemporalVideoConfig,
    )

__getattr__, __dir__, __all__ = attach(__name__, __file__)
