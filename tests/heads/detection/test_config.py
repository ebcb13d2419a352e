"""Configurations of detection's heads: defaults of the public recipe, errors that name field and remedy."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from permafrost.heads.detection.config import (
    BoxHeadConfig,
    CascadeConfig,
    HTCConfig,
    MaskHeadConfig,
    MaskRCNNConfig,
    PoolingConfig,
    RPNConfig,
    SemanticBranchConfig,
)
from permafrost.heads.errors import HeadError

BAD = [
    (RPNConfig, {"anchor_scale": 0.0}, "rpn.anchor_scale is 0.0"),
    (RPNConfig, {"aspect_ratios": ()}, "rpn.aspect_ratios is .*at least one ratio"),
    (RPNConfig, {"aspect_ratios": (1.0, -1.0)}, "rpn.aspect_ratios"),
    (RPNConfig, {"num_convs": -1}, "rpn.num_convs"),
    (RPNConfig, {"num_pre_nms_train": 0}, "rpn.num_pre_nms_train"),
    (RPNConfig, {"num_proposals_test": 0}, "rpn.num_proposals_test"),
    (RPNConfig, {"negative_iou": 0.8}, r"rpn.negative_iou is 0.8: .*rpn.positive_iou \(0.7\)"),
    (RPNConfig, {"nms_iou": 0.0}, "rpn.nms_iou"),
    (RPNConfig, {"num_samples": 0}, "rpn.num_samples"),
    (RPNConfig, {"num_samples": 4, "positive_fraction": 0.2}, "rpn.positive_fraction is 0.2: of rpn.num_samples 4"),
    (RPNConfig, {"smooth_l1_beta": -0.1}, "rpn.smooth_l1_beta .*plain L1"),
    (PoolingConfig, {"sampling_ratio": -1}, "pooling.sampling_ratio"),
    (PoolingConfig, {"canonical_size": 0.0}, "pooling.canonical_size"),
    (BoxHeadConfig, {"resolution": 0}, "box.resolution"),
    (BoxHeadConfig, {"num_fc": 0}, "box.num_fc"),
    (BoxHeadConfig, {"num_convs": -2}, "box.num_convs"),
    (BoxHeadConfig, {"positive_fraction": 1.5}, "box.positive_fraction"),
    (BoxHeadConfig, {"regression_stds": (0.1, 0.1, 0.2)}, "box.regression_stds .*four numbers"),
    (BoxHeadConfig, {"regression_stds": (0.1, 0.1, 0.2, 0.0)}, "box.regression_stds"),
    (BoxHeadConfig, {"score_threshold": 1.0}, "box.score_threshold"),
    (BoxHeadConfig, {"nms_iou": 1.1}, "box.nms_iou"),
    (BoxHeadConfig, {"num_detections": 0}, "box.num_detections"),
    (BoxHeadConfig, {"positive_iou": 0.0}, "box.positive_iou"),
    (MaskHeadConfig, {"resolution": 0}, "mask.resolution"),
    (MaskHeadConfig, {"num_convs": -1}, "mask.num_convs"),
    (MaskHeadConfig, {"channels": 0}, "mask.channels"),
    (BoxHeadConfig, {"regression_weight": 0.0}, "box.regression_weight"),
    (BoxHeadConfig, {"soft_sigma": 0.0}, "box.soft_sigma"),
    (BoxHeadConfig, {"soft_min_score": 1.0}, "box.soft_min_score"),
    (CascadeConfig, {"stage_ious": (0.5, 0.6)}, "stage_ious 2, stage_weights 3"),
    (CascadeConfig, {"stage_ious": (0.5, 0.6, 1.7)}, "stage 3: box.positive_iou is 1.7"),
    (CascadeConfig, {"stage_weights": (1.0, 0.0, 0.25)}, "stage_weights"),
    (CascadeConfig, {"box": BoxHeadConfig(positive_iou=0.6)}, "box.positive_iou is 0.6: set stage_ious"),
    (CascadeConfig, {"box": BoxHeadConfig(regression_stds=(1, 1, 1, 1))}, "set stage_stds"),
    (HTCConfig, {"mask": MaskHeadConfig(num_convs=0)}, "information_flow hands on"),
    (SemanticBranchConfig, {"num_classes": 256}, "semantic.num_classes is 256"),
    (SemanticBranchConfig, {"weight": 0.0}, "semantic.weight is 0.0: use num_classes 0"),
    (MaskRCNNConfig, {"ignore_overlap": 1.5}, "ignore_overlap is 1.5"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), BAD, ids=[f"{k.__name__}-{m[:24]}" for k, _, m in BAD])
def test_impossible_values_name_the_field(kind, fields, message) -> None:
    with pytest.raises(HeadError, match=message):
        kind(**fields)


def test_defaults_are_the_public_recipe() -> None:
    config = asdict(MaskRCNNConfig())
    assert config["neck"] == {"channels": 256, "num_extra_levels": 1, "level_norm": True}
    rpn = config["rpn"]
    assert (rpn["anchor_scale"], rpn["aspect_ratios"]) == (8.0, (0.5, 1.0, 2.0))
    assert (rpn["positive_iou"], rpn["negative_iou"], rpn["nms_iou"]) == (0.7, 0.3, 0.7)
    assert (rpn["num_samples"], rpn["positive_fraction"]) == (256, 0.5)
    assert (rpn["num_pre_nms_train"], rpn["num_proposals_train"]) == (2000, 1000)
    box = config["box"]
    assert (box["resolution"], box["num_fc"], box["fc_channels"]) == (7, 2, 1024)
    assert (box["regression_stds"], box["smooth_l1_beta"]) == ((0.1, 0.1, 0.2, 0.2), 0.0)
    assert (box["num_samples"], box["positive_fraction"], box["positive_iou"]) == (512, 0.25, 0.5)
    assert (box["score_threshold"], box["nms_iou"], box["num_detections"]) == (0.05, 0.5, 100)
    assert (box["class_agnostic"], box["regression_loss"], box["suppression"]) == (False, "smooth_l1", "hard")
    assert config["mask"] == {"resolution": 14, "num_convs": 4, "channels": 256, "norm": "none"}
    assert config["pooling"]["sampling_ratio"] == 0
