"""Build the head that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from permafrost.heads.base import Head
from permafrost.heads.checks import find_builder
from permafrost.heads.config import HeadConfig
from permafrost.heads.detection.build import build_cascade, build_mask_rcnn
from permafrost.heads.detection.config import CascadeConfig, HTCConfig, MaskRCNNConfig
from permafrost.heads.segmentation.config import Mask2FormerConfig
from permafrost.heads.segmentation.mask2former import Mask2Former
from permafrost.heads.video.config import GlobalVideoConfig, LinearVideoConfig, TemporalVideoConfig
from permafrost.heads.video.global_blocks import GlobalVideoHead
from permafrost.heads.video.linear import LinearVideoHead
from permafrost.heads.video.temporal import TemporalVideoHead
from permafrost.model.spec import FeatureSpec

BUILDERS: dict[type[HeadConfig], Callable[..., Head]] = {
    MaskRCNNConfig: build_mask_rcnn,
    CascadeConfig: build_cascade,
    HTCConfig: build_cascade,
    Mask2FormerConfig: Mask2Former,
    LinearVideoConfig: LinearVideoHead,
    TemporalVideoConfig: TemporalVideoHead,
    GlobalVideoConfig: GlobalVideoHead,
}


def build_head(config: HeadConfig, *, spec: FeatureSpec, classes: Sequence[str]) -> Head:
    """Return the live head, initialised from torch's global generator.

    Args:
        config: one of the above, or one with a `build(spec=, classes=)` of its own.
        spec: the backbone's maps.
        classes: names of the K classes, in the order of the labels.

    Raises:
        HeadError: the head takes other maps or other classes, or nothing builds this configuration.
    """
    builder = find_builder(BUILDERS, config, {"config": config}, "build(spec=, classes=)")
    return builder(spec=spec, classes=classes)
