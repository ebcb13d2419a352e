"""Configurations of heads: values only, no torch; `build` makes the live head.

Defaults are the public Mask R-CNN recipe of the Swin papers' detection code (FPN 256, 2fc box head, 4-conv mask head).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from permafrost.heads.errors import HeadError

if TYPE_CHECKING:
    from permafrost.heads.base import Head
    from permafrost.heads.detection.mask_rcnn import MaskRCNN
    from permafrost.heads.necks.bifpn import BiFPN
    from permafrost.heads.necks.fpn import FPN
    from permafrost.heads.necks.residual_fpn import ResidualFPN
    from permafrost.heads.necks.simple_pyramid import SimpleFeaturePyramid
    from permafrost.model.spec import FeatureSpec


HeadTask = Literal["detection", "segmentation", "video"]


@dataclass
class HeadConfig:
    """What the configurations of all heads are."""

    task: ClassVar[HeadTask]
    """It learns from data of the same task."""

    def build(self, *, spec: FeatureSpec, classes: Sequence[str]) -> Head:
        """The live head, initialised from torch's global generator.

        Args:
            spec: the backbone's maps.
            classes: names of the K classes, in the order of the labels.

        Raises:
            HeadError: the head takes other maps, or other classes.
        """
        raise NotImplementedError


NormKind = Literal["none", "group", "layer"]
"""After a convolution: nothing; a norm over groups of channels and all cells; or one over the channels of each cell."""


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise HeadError(f"{name} is {value!r}: {remedy}")


def _require_counts(prefix: str, config: object, names: Sequence[str], least: int) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= least, f"{prefix}.{name}", value, f"it must be at least {least}")


def _require_share(name: str, value: float) -> None:
    _require(0.0 < value <= 1.0, name, value, "give a share above 0 and at most 1")


@dataclass
class PyramidConfig:
    """What every feature pyramid has; its kinds follow."""

    channels: int = 256
    num_extra_levels: int = 1
    """Levels below the coarsest one, each half as large as the one before: 1 is P6 after P2..P5. Proposals only."""
    level_norm: bool = True
    """A trained LayerNorm over the channels of every backbone map (the backbone's own outputs are raw)."""

    def __post_init__(self) -> None:
        _require_counts("neck", self, ("channels",), 1)
        _require_counts("neck", self, ("num_extra_levels",), 0)


@dataclass
class FPNConfig(PyramidConfig):
    """The feature pyramid: one level per backbone map, coarser ones by subsampling the last."""

    def build(self, *, spec: FeatureSpec) -> FPN:
        """The live neck.

        Raises:
            HeadError: the backbone gives one map only, or its strides do not double.
        """
        from permafrost.heads.necks.fpn import FPN

        return FPN(spec=spec, **vars(self))


@dataclass
class ResidualFPNConfig(PyramidConfig):
    """The feature pyramid with residual blocks inside (the paper's Table 2). Where, of which kind and with which norm is not
    published."""

    num_blocks: int = 4
    """Residual blocks of every backbone level."""
    block: Literal["basic", "bottleneck"] = "basic"
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 with a quarter of the width."""
    place: Literal["merged", "lateral"] = "merged"
    """After the top-down sum, or before it."""
    norm: NormKind = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_counts("neck", self, ("num_blocks",), 1)

    def build(self, *, spec: FeatureSpec) -> ResidualFPN:
        """The live neck.

        Raises:
            HeadError: the backbone gives one map only, or its strides do not double.
        """
        from permafrost.heads.necks.residual_fpn import ResidualFPN

        return ResidualFPN(spec=spec, **vars(self))


@dataclass
class BiFPNConfig(PyramidConfig):
    """The bidirectional feature pyramid (EfficientDet). Of the paper's only the number of layers is published; the rest is
    that of its authors' public detection code."""

    num_layers: int = 5
    finest_stride: int = 4
    """Pixels per cell of the finest level: 4 with one extra level is P2..P6, 8 with two is P3..P7. Extra levels take part in
    every layer."""
    separable: bool = False
    """Channel-wise 3x3 and 1x1 convolutions, as in EfficientDet, in place of full 3x3 ones."""
    norm: NormKind = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_counts("neck", self, ("num_layers", "finest_stride"), 1)

    def build(self, *, spec: FeatureSpec) -> BiFPN:
        """The live neck.

        Raises:
            HeadError: the backbone's strides do not double, or none of them is `finest_stride`.
        """
        from permafrost.heads.necks.bifpn import BiFPN

        return BiFPN(spec=spec, **vars(self))


@dataclass
class SimplePyramidConfig(PyramidConfig):
    """The simple feature pyramid of ViTDet: strides 4 to 32 from the single map of a plain backbone."""

    def build(self, *, spec: FeatureSpec) -> SimpleFeaturePyramid:
        """The live neck.

        Raises:
            HeadError: the backbone gives more than one map.
        """
        from permafrost.heads.necks.simple_pyramid import SimpleFeaturePyramid

        return SimpleFeaturePyramid(spec=spec, **vars(self))


NeckConfig = FPNConfig | ResidualFPNConfig | BiFPNConfig | SimplePyramidConfig


@dataclass
class RPNConfig:
    """The region proposal network."""

    anchor_scale: float = 8.0
    """Side of the square anchor in strides of its level."""
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width, at the same area."""
    num_convs: int = 1
    """3x3 convolutions of the pyramid's width before the two predictors."""
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    num_samples: int = 256
    """Anchors per image in the loss."""
    positive_fraction: float = 0.5
    """Largest share of positive ones among them."""
    num_pre_nms_train: int = 2000
    """Best anchors per level that enter non-maximum suppression, in training."""
    num_pre_nms_test: int = 1000
    num_proposals_train: int = 1000
    """Proposals per image that leave it, in training; ground-truth boxes are added to them."""
    num_proposals_test: int = 1000
    nms_iou: float = 0.7
    smooth_l1_beta: float = 0.0
    """Where the box loss turns from squared to absolute; 0 is plain L1."""

    def __post_init__(self) -> None:
        _require(self.anchor_scale > 0, "rpn.anchor_scale", self.anchor_scale, "it must be above 0")
        _require(
            len(self.aspect_ratios) > 0 and all(ratio > 0 for ratio in self.aspect_ratios),
            "rpn.aspect_ratios",
            self.aspect_ratios,
            "give at least one ratio (height over width), each above 0",
        )
        _require_counts("rpn", self, ("num_convs",), 0)
        names = ("num_pre_nms_train", "num_pre_nms_test", "num_proposals_train", "num_proposals_test")
        _require_counts("rpn", self, names, 1)
        _require(
            0.0 <= self.negative_iou <= self.positive_iou <= 1.0,
            "rpn.negative_iou",
            self.negative_iou,
            f"it must lie between 0 and rpn.positive_iou ({self.positive_iou}), which is at most 1",
        )
        _require_share("rpn.nms_iou", self.nms_iou)
        _check_sampling("rpn", self.num_samples, self.positive_fraction)
        _require(self.smooth_l1_beta >= 0, "rpn.smooth_l1_beta", self.smooth_l1_beta, "use 0 for plain L1")


@dataclass
class PoolingConfig:
    """RoIAlign, shared by the box and the mask branch."""

    sampling_ratio: int = 0
    """Points per bin and direction; 0 takes as many as the box covers feature pixels. A fixed 2 is quicker."""
    canonical_size: float = 224.0
    """Side of a box, in pixels, that is pooled from the level of stride 16; half of it goes one level finer."""
    aligned: bool = True
    """Pixel centres at half coordinates. False is the first RoIAlign, half a feature pixel off, as in torchvision."""

    def __post_init__(self) -> None:
        _require_counts("pooling", self, ("sampling_ratio",), 0)
        _require(
            self.canonical_size > 0, "pooling.canonical_size", self.canonical_size, "give a side in pixels above 0"
        )


@dataclass
class BoxHeadConfig:
    """The second stage's classifier and box regressor."""

    resolution: int = 7
    """Side of the pooled region."""
    num_convs: int = 0
    conv_channels: int = 256
    num_fc: int = 2
    fc_channels: int = 1024
    norm: NormKind = "none"
    """After each 3x3 convolution."""
    class_agnostic: bool = False
    """Regress one box for all classes in place of one per class."""
    positive_iou: float = 0.5
    """Overlap with a ground-truth box from which a proposal is positive; below it is background."""
    num_samples: int = 512
    """Proposals per image in the loss."""
    positive_fraction: float = 0.25
    regression_stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    """What (dx, dy, log dw, log dh) are divided by to become the regressor's targets."""
    regression_loss: Literal["smooth_l1", "giou"] = "smooth_l1"
    """Of encoded boxes, or 1 - generalised IoU (Rezatofighi et al. 2019) of decoded ones."""
    regression_weight: float = 1.0
    """What the box loss is multiplied by (10 for GIoU in the Swin papers' Cascade)."""
    smooth_l1_beta: float = 0.0
    score_threshold: float = 0.05
    suppression: Literal["hard", "linear", "gaussian"] = "hard"
    """What becomes of a box that overlaps a better one of its class: dropped, or its score lowered (soft-NMS, Bodla et al.
    2017): times 1 - IoU from `nms_iou` up, or times exp(-IoU^2 / soft_sigma)."""
    nms_iou: float = 0.5
    soft_sigma: float = 0.5
    soft_min_score: float = 0.001
    """Boxes whose lowered score falls below are dropped."""
    num_detections: int = 100
    """Detections kept per image."""

    def __post_init__(self) -> None:
        _require_counts("box", self, ("resolution", "conv_channels", "fc_channels", "num_detections"), 1)
        _require_counts("box", self, ("num_convs",), 0)
        _require_counts("box", self, ("num_fc",), 1)
        _require_share("box.positive_iou", self.positive_iou)
        _require_share("box.nms_iou", self.nms_iou)
        _require(
            0.0 <= self.score_threshold < 1.0,
            "box.score_threshold",
            self.score_threshold,
            "give a probability from 0 to below 1",
        )
        _require(
            len(self.regression_stds) == 4 and all(std > 0 for std in self.regression_stds),
            "box.regression_stds",
            self.regression_stds,
            "give four numbers above 0",
        )
        _check_sampling("box", self.num_samples, self.positive_fraction)
        _require(self.regression_weight > 0, "box.regression_weight", self.regression_weight, "it must be above 0")
        _require(self.soft_sigma > 0, "box.soft_sigma", self.soft_sigma, "it must be above 0")
        _require(0.0 <= self.soft_min_score < 1.0, "box.soft_min_score", self.soft_min_score, "give 0 to below 1")
        _require(self.smooth_l1_beta >= 0, "box.smooth_l1_beta", self.smooth_l1_beta, "use 0 for plain L1")


@dataclass
class MaskHeadConfig:
    """The mask branch: convolutions, one deconvolution that doubles the grid, one map per class."""

    resolution: int = 14
    """Side of the pooled region; masks are twice as large."""
    num_convs: int = 4
    channels: int = 256
    norm: NormKind = "none"
    """After each 3x3 convolution."""

    def __post_init__(self) -> None:
        _require_counts("mask", self, ("resolution", "channels"), 1)
        _require_counts("mask", self, ("num_convs",), 0)


def _check_sampling(prefix: str, num_samples: int, positive_fraction: float) -> None:
    _require(num_samples >= 1, f"{prefix}.num_samples", num_samples, "it must be at least 1")
    _require_share(f"{prefix}.positive_fraction", positive_fraction)
    _require(
        int(num_samples * positive_fraction) >= 1,
        f"{prefix}.positive_fraction",
        positive_fraction,
        f"of {prefix}.num_samples {num_samples} it leaves no room for a positive sample: raise either",
    )


@dataclass
class MaskRCNNConfig(HeadConfig):
    """Mask R-CNN on a feature pyramid (He et al. 2017; Lin et al. 2017)."""

    task: ClassVar[HeadTask] = "detection"

    neck: NeckConfig = field(default_factory=FPNConfig)
    rpn: RPNConfig = field(default_factory=RPNConfig)
    pooling: PoolingConfig = field(default_factory=PoolingConfig)
    box: BoxHeadConfig = field(default_factory=BoxHeadConfig)
    mask: MaskHeadConfig = field(default_factory=MaskHeadConfig)
    ignore_overlap: float = 0.5
    """An anchor or proposal with more than this share of its own area inside a crowd region is no negative."""

    def __post_init__(self) -> None:
        _require(
            0.0 <= self.ignore_overlap <= 1.0,
            "ignore_overlap",
            self.ignore_overlap,
            "give a share from 0 to 1 (1 ignores nothing)",
        )

    def build(self, *, spec: FeatureSpec, classes: Sequence[str]) -> MaskRCNN:
        """The live head, initialised from torch's global generator.

        Args:
            spec: the backbone's maps, as many and with such strides as the neck takes.
            classes: names of the K classes, in the order of the labels.

        Raises:
            HeadError: the neck takes other maps, or there is no class.
        """
        from permafrost.heads.detection.mask_rcnn import build_mask_rcnn

        return build_mask_rcnn(self, spec=spec, classes=classes)
