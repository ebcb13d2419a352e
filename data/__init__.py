"""Data sets, augmentation, sampling and metrics; knows no model. Names load on first use: configurations need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from permafrost._lazy import attach

if TYPE_CHECKING:
    from permafrost.data.build import (
        check_data as check_data,
        input_reader as input_reader,
        located as located,
        submission_set as submission_set,
        target_type as target_type,
        train_set as train_set,
        val_set as val_set,
    )
    from permafrost.data.detection.check import check_coco as check_coco
    from permafrost.data.detection.config import (
        CocoDataConfig as CocoDataConfig,
        EvaluationConfig as EvaluationConfig,
        JitterConfig as JitterConfig,
        MultiScaleConfig as MultiScaleConfig,
    )
    from permafrost.data.detection.dataset import CocoDetection as CocoDetection, inference_sample as inference_sample
    from permafrost.data.detection.evaluator import CocoEvaluator as CocoEvaluator
    from permafrost.data.detection.inputs import Detections as Detections
    from permafrost.data.detection.types import DetectionResult as DetectionResult, DetectionTarget as DetectionTarget
    from permafrost.data.errors import DataError as DataError
    from permafrost.data.findings import Finding as Finding
    from permafrost.data.segmentation.check import check_ade20k as check_ade20k
    from permafrost.data.segmentation.config import (
        ADE20KDataConfig as ADE20KDataConfig,
        SegmentationEvaluationConfig as SegmentationEvaluationConfig,
        SegmentationJitterConfig as SegmentationJitterConfig,
    )
    from permafrost.data.segmentation.dataset import SceneParsing as SceneParsing
    from permafrost.data.segmentation.evaluator import SegmentationEvaluator as SegmentationEvaluator
    from permafrost.data.segmentation.inputs import ClassMap as ClassMap
    from permafrost.data.segmentation.types import (
        SegmentationResult as SegmentationResult,
        SegmentationTarget as SegmentationTarget,
        SegmentationView as SegmentationView,
    )
    from permafrost.data.stream.loader import (
        WorkerError as WorkerError,
        train_loader as train_loader,
        val_loader as val_loader,
    )
    from permafrost.data.stream.records import ReplacementTracker as ReplacementTracker
    from permafrost.data.stream.sampler import GlobalStream as GlobalStream
    from permafrost.data.task import (
        InputReader as InputReader,
        SampleExtent as SampleExtent,
        TaskDataConfig as TaskDataConfig,
        TaskDataset as TaskDataset,
        TaskEvaluator as TaskEvaluator,
    )
    from permafrost.data.types import (
        Batch as Batch,
        Sample as Sample,
        SampleKey as SampleKey,
        Target as Target,
        Tensors as Tensors,
    )
    from permafrost.data.video.config import ClipConfig as ClipConfig, KineticsDataConfig as KineticsDataConfig
    from permafrost.data.video.dataset import KineticsClips as KineticsClips
    from permafrost.data.video.evaluator import VideoEvaluator as VideoEvaluator
    from permafrost.data.video.inputs import VideoClass as VideoClass
    from permafrost.data.video.types import ClipResult as ClipResult, ClipTarget as ClipTarget
    from permafrost.data.worlds.config import (
        MotionDataConfig as MotionDataConfig,
        MotionWorld as MotionWorld,
        SceneryDataConfig as SceneryDataConfig,
        SceneryWorld as SceneryWorld,
        ShapesDataConfig as ShapesDataConfig,
        ShapesWorld as ShapesWorld,
    )

__getattr__, __dir__, __all__ = attach(__name__, __file__)
