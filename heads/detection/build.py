"""Build the heads that detection's configurations describe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from permafrost.heads.detection.cascade import CascadeMaskRCNN
from permafrost.heads.detection.config import CascadeConfig, HTCConfig, MaskRCNNConfig
from permafrost.heads.detection.mask_rcnn import MaskRCNN
from permafrost.heads.detection.roi import BoxBranch, MaskBranch
from permafrost.heads.detection.rpn import RPN
from permafrost.heads.detection.semantic import SemanticBranch
from permafrost.heads.errors import HeadError
from permafrost.heads.necks.build import build_neck
from permafrost.model.spec import FeatureSpec


def build_mask_rcnn(config: MaskRCNNConfig, *, spec: FeatureSpec, classes: Sequence[str]) -> MaskRCNN:
    """Return a Mask R-CNN, as heads.build.build_head does for its configuration."""
    parts, region = build_two_stages(config, spec=spec, classes=classes)
    box = BoxBranch(**region, config=config.box, pooling=config.pooling)
    return MaskRCNN(**parts, box=box, mask=MaskBranch(**region, config=config.mask, pooling=config.pooling))


def build_two_stages(
    config: MaskRCNNConfig, *, spec: FeatureSpec, classes: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of TwoStageHead, and those that all box and mask branches share.

    Raises:
        HeadError: the neck takes other maps, or there is no class.
    """
    if isinstance(classes, str) or len(classes) == 0:
        raise HeadError(f"classes is {classes!r}: give the names of the classes, at least one")
    neck = build_neck(config.neck, spec=spec)
    pooled = neck.strides[: neck.num_backbone_levels]
    if any(stride & (stride - 1) for stride in pooled):
        raise HeadError(
            f"pooling: the neck's strides are {pooled}; boxes are assigned to levels by powers of two: choose levels of the "
            "backbone with such strides"
        )
    rpn = RPN(
        channels=config.neck.channels, strides=neck.strides, config=config.rpn, ignore_overlap=config.ignore_overlap
    )
    parts = {"neck": neck, "rpn": rpn, "classes": classes, "ignore_overlap": config.ignore_overlap}
    return parts, {"channels": config.neck.channels, "strides": pooled, "num_classes": len(classes)}


def build_cascade(config: CascadeConfig, *, spec: FeatureSpec, classes: Sequence[str]) -> CascadeMaskRCNN:
    """Return a Cascade Mask R-CNN or a Hybrid Task Cascade, as heads.build.build_head does."""
    parts, region = build_two_stages(config, spec=spec, classes=classes)
    options: dict[str, Any] = {}
    if isinstance(config, HTCConfig):
        options = {"interleaved": config.interleaved, "information_flow": config.information_flow}
        if config.semantic.num_classes:
            options["semantic"] = SemanticBranch(
                channels=config.neck.channels,
                strides=parts["neck"].strides,
                resolution=config.mask.resolution,
                config=config.semantic,
                pooling=config.pooling,
            )
    flows = options.get("information_flow", False)
    return CascadeMaskRCNN(
        **parts,
        boxes=[BoxBranch(**region, config=own, pooling=config.pooling) for own in config.boxes()],
        masks=[
            MaskBranch(**region, config=config.mask, pooling=config.pooling, takes_previous=flows and stage > 0)
            for stage in range(config.num_stages)
        ],
        stage_weights=config.stage_weights,
        **options,
    )
