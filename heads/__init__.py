"""Heads are trained on a frozen backbone's feature maps. Names load on first use: configurations need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from permafrost._lazy import attach

if TYPE_CHECKING:
    from permafrost.heads.base import Head as Head, LossCounts as LossCounts, world_mean_counts as world_mean_counts
    from permafrost.heads.build import build_head as build_head
    from permafrost.heads.config import HeadConfig as HeadConfig
    from permafrost.heads.detection.config import (
        BoxHeadConfig as BoxHeadConfig,
        CascadeConfig as CascadeConfig,
        HTCConfig as HTCConfig,
        MaskHeadConfig as MaskHeadConfig,
        MaskRCNNConfig as MaskRCNNConfig,
        PoolingConfig as PoolingConfig,
        RPNConfig as RPNConfig,
        SemanticBranchConfig as SemanticBranchConfig,
    )
    from permafrost.heads.detection.mask_rcnn import MaskRCNN as MaskRCNN
    from permafrost.heads.errors import HeadError as HeadError
    from permafrost.heads.necks.build import build_neck as build_neck
    from permafrost.heads.necks.config import (
        BiFPNConfig as BiFPNConfig,
        FPNConfig as FPNConfig,
        NeckConfig as NeckConfig,
        PyramidConfig as PyramidConfig,
        ResidualFPNConfig as ResidualFPNConfig,
        SimplePyramidConfig as SimplePyramidConfig,
    )
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
