"""From configurations to heads and necks: by the exact type, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import nn

from permafrost.heads.base import Head
from permafrost.heads.build import build_head
from permafrost.heads.config import HeadConfig
from permafrost.heads.detection.config import CascadeConfig, HTCConfig, MaskRCNNConfig
from permafrost.heads.errors import HeadError
from permafrost.heads.necks.build import Neck, build_neck
from permafrost.heads.necks.config import FPNConfig, PyramidConfig, SimplePyramidConfig
from permafrost.heads.segmentation.config import Mask2FormerConfig
from permafrost.heads.video.config import BlocksVideoConfig, GlobalVideoConfig
from permafrost.model.spec import FeatureSpec


@pytest.mark.parametrize("classes", [(), "circle"])
def test_build_refuses_missing_classes(spec, classes, small_config) -> None:
    with pytest.raises(HeadError, match=r"classes is .*at least one"):
        build_head(small_config(), spec=spec, classes=classes)


@pytest.mark.parametrize(
    ("strides", "message"),
    [((4, 8, 32, 64), "each to be twice the one before"), ((6, 12, 24, 48), "powers of two")],
)
def test_build_refuses_strides_it_cannot_pool_from(strides, message, classes, small_config) -> None:
    with pytest.raises(HeadError, match=message):
        build_head(small_config(), spec=FeatureSpec(channels=(8, 8, 8, 8), strides=strides), classes=classes)


def test_a_neck_for_other_maps_is_refused_and_the_remedy_named(spec, classes, small_config) -> None:
    single = FeatureSpec(channels=(8,), strides=(14,))
    with pytest.raises(HeadError, match=r"one map \(stride 14\), .*use SimplePyramidConfig as neck"):
        build_head(small_config(), spec=single, classes=classes)
    with pytest.raises(HeadError, match=r"4 maps \(strides \(4, 8, 16, 32\)\), .*use FPNConfig as neck.*backbone.taps"):
        build_head(small_config(neck=SimplePyramidConfig()), spec=spec, classes=classes)
    head = build_head(small_config(neck=SimplePyramidConfig(channels=16)), spec=single, classes=classes)
    assert head.neck.strides == (4, 8, 16, 32, 64)


@dataclass
class DeeperFPN(FPNConfig):
    """A kind of pyramid that nothing builds."""


@pytest.mark.parametrize("parent", [MaskRCNNConfig, CascadeConfig, HTCConfig, Mask2FormerConfig, GlobalVideoConfig])
def test_a_subclass_without_a_builder_does_not_build_its_parent(parent, spec, classes) -> None:
    own = dataclass(type("OwnConfig", (parent,), {}))
    with pytest.raises(HeadError, match=r"OwnConfig has no builder: give it a build\(spec=, classes=\) method"):
        build_head(own(), spec=spec, classes=classes)


def test_what_only_gathers_fields_is_not_built(spec, classes, small_config) -> None:
    with pytest.raises(HeadError, match="BlocksVideoConfig has no builder"):
        build_head(BlocksVideoConfig(), spec=spec, classes=classes)
    with pytest.raises(HeadError, match=r"DeeperFPN has no builder: give it a build\(spec=\) method"):
        build_neck(DeeperFPN(), spec=spec)
    with pytest.raises(HeadError, match="DeeperFPN has no builder"):
        build_head(small_config(neck=DeeperFPN()), spec=spec, classes=classes)
    with pytest.raises(HeadError, match="PyramidConfig has no builder"):
        build_neck(PyramidConfig(), spec=spec)


class OwnHead(Head):
    """A head of somebody else's."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.out = nn.Conv2d(width, num_classes, 1)


def test_a_head_from_outside_brings_its_own_builder(spec, classes) -> None:
    @dataclass
    class DepthConfig(HeadConfig):
        task: ClassVar[str] = "depth"

        def build(self, *, spec, classes) -> OwnHead:
            return OwnHead(spec.channels[0], len(classes))

    head = build_head(DepthConfig(), spec=spec, classes=classes)
    assert tuple(head.out.weight.shape) == (len(classes), spec.channels[0], 1, 1)
    assert DepthConfig().check_data(object()) is None


def test_a_neck_from_outside_brings_its_own_builder(spec, classes, small_config) -> None:
    @dataclass
    class WiderFPN(FPNConfig):
        def build(self, *, spec) -> Neck:
            return build_neck(FPNConfig(channels=self.channels, num_extra_levels=2), spec=spec)

    head = build_head(small_config(neck=WiderFPN(channels=16)), spec=spec, classes=classes)
    assert head.neck.strides == (4, 8, 16, 32, 64, 128)
