"""Data sets, augmentation, sampling and metrics; knows no model. Names load on first use: configs need no torch."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "ADE20KDataConfig": "segmentation.config",
    "Batch": "types",
    "ClipConfig": "video.config",
    "ClipResult": "types",
    "ClipTarget": "types",
    "CocoDataConfig": "config",
    "CocoDetection": "coco",
    "CocoEvaluator": "metrics.coco",
    "DataError": "errors",
    "DetectionResult": "types",
    "DetectionTarget": "types",
    "GlobalStream": "sampler",
    "JitterConfig": "config",
    "KineticsClips": "kinetics",
    "KineticsDataConfig": "video.config",
    "MotionDataConfig": "video.config",
    "MotionWorld": "video.config",
    "ReplacementTracker": "coco",
    "Sample": "types",
    "SampleKey": "types",
    "SceneParsing": "ade20k",
    "SceneryDataConfig": "segmentation.config",
    "SceneryWorld": "segmentation.config",
    "SegmentationEvaluationConfig": "segmentation.config",
    "SegmentationEvaluator": "metrics.segmentation",
    "SegmentationJitterConfig": "segmentation.config",
    "SegmentationResult": "types",
    "SegmentationTarget": "types",
    "SegmentationView": "types",
    "ShapesDataConfig": "config",
    "ShapesWorld": "config",
    "VideoEvaluator": "metrics.video",
    "WorkerError": "loader",
    "check_ade20k": "segmentation.check",
    "check_coco": "check",
    "inference_sample": "coco",
    "train_loader": "loader",
    "val_loader": "loader",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
