"""Heads: what is trained on a frozen backbone's feature maps.

Names load on first use, so that importing the package needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "BiFPNConfig": "permafrost.heads.config",
    "BoxHeadConfig": "permafrost.heads.config",
    "CascadeConfig": "permafrost.heads.detection.config",
    "FPNConfig": "permafrost.heads.config",
    "GlobalVideoConfig": "permafrost.heads.video.config",
    "HTCConfig": "permafrost.heads.detection.config",
    "Head": "permafrost.heads.base",
    "HeadError": "permafrost.heads.errors",
    "LinearVideoConfig": "permafrost.heads.video.config",
    "LossCounts": "permafrost.heads.base",
    "Mask2FormerConfig": "permafrost.heads.segmentation.config",
    "MaskHeadConfig": "permafrost.heads.config",
    "MaskRCNN": "permafrost.heads.detection.mask_rcnn",
    "MaskRCNNConfig": "permafrost.heads.config",
    "PoolingConfig": "permafrost.heads.config",
    "RPNConfig": "permafrost.heads.config",
    "ResidualFPNConfig": "permafrost.heads.config",
    "SemanticBranchConfig": "permafrost.heads.detection.config",
    "SimplePyramidConfig": "permafrost.heads.config",
    "TemporalVideoConfig": "permafrost.heads.video.config",
    "world_mean_counts": "permafrost.heads.base",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
