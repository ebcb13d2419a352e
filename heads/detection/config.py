"""Configure the heads that find and mask objects: values only, no torch.

Defaults are the public Mask R-CNN recipe of the Swin papers' detection code (FPN 256, 2fc box head, 4-conv mask head).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from permafrost._configuration import Configuration
from permafrost.heads.checks import require, require_counts, require_positive, require_shares
from permafrost.heads.config import HeadConfig
from permafrost.heads.errors import HeadError
from permafrost.heads.necks.config import FPNConfig, NeckConfig, NormKind

FIRST_IOU = 0.5
FIRST_STDS = (0.1, 0.1, 0.2, 0.2)


@dataclass
class RPNConfig(Configuration):
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
    """The error at which the box loss turns from squared to absolute; 0 is plain L1."""

    def __post_init__(self) -> None:
        require_positive("rpn.", self, "anchor_scale")
        require(
            len(self.aspect_ratios) > 0 and all(ratio > 0 for ratio in self.aspect_ratios),
            "rpn.aspect_ratios",
            self.aspect_ratios,
            "give at least one ratio (height over width), each above 0",
        )
        require_counts("rpn.", self, "num_convs", least=0)
        require_counts(
            "rpn.", self, "num_pre_nms_train", "num_pre_nms_test", "num_proposals_train", "num_proposals_test"
        )
        require(
            0.0 <= self.negative_iou <= self.positive_iou <= 1.0,
            "rpn.negative_iou",
            self.negative_iou,
            f"it must lie between 0 and rpn.positive_iou ({self.positive_iou}), which is at most 1",
        )
        require_shares("rpn.", self, "nms_iou")
        _check_sampling("rpn.", self)


@dataclass
class PoolingConfig(Configuration):
    """RoIAlign, shared by the box and the mask branch."""

    sampling_ratio: int = 0
    """Points per bin and direction; 0 takes as many as the box covers feature pixels. A fixed 2 is quicker."""
    canonical_size: float = 224.0
    """Side of a box, in pixels, that is pooled from the level of stride 16; half of it goes one level finer."""
    aligned: bool = True
    """Pixel centres at half coordinates. False is the first RoIAlign, half a feature pixel off, as in torchvision."""

    def __post_init__(self) -> None:
        require_counts("pooling.", self, "sampling_ratio", least=0)
        require(self.canonical_size > 0, "pooling.canonical_size", self.canonical_size, "give a side in pixels above 0")


@dataclass
class BoxHeadConfig(Configuration):
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
    """Divisors that turn (dx, dy, log dw, log dh) into the regressor's targets."""
    regression_loss: Literal["smooth_l1", "giou"] = "smooth_l1"
    """The loss of encoded boxes, or 1 - generalised IoU (Rezatofighi et al. 2019) of decoded ones."""
    regression_weight: float = 1.0
    """Factor of the box loss (10 for GIoU in the Swin papers' Cascade)."""
    smooth_l1_beta: float = 0.0
    score_threshold: float = 0.05
    suppression: Literal["hard", "linear", "gaussian"] = "hard"
    """The fate of a box that overlaps a better one of its class: dropped, or its score lowered (soft-NMS, Bodla et al.
    2017): times 1 - IoU from `nms_iou` up, or times exp(-IoU^2 / soft_sigma)."""
    nms_iou: float = 0.5
    soft_sigma: float = 0.5
    soft_min_score: float = 0.001
    """Boxes whose lowered score falls below are dropped."""
    num_detections: int = 100
    """Detections kept per image."""

    def __post_init__(self) -> None:
        require_counts("box.", self, "resolution", "conv_channels", "fc_channels", "num_detections", "num_fc")
        require_counts("box.", self, "num_convs", least=0)
        require_shares("box.", self, "positive_iou", "nms_iou")
        require(
            0.0 <= self.score_threshold < 1.0,
            "box.score_threshold",
            self.score_threshold,
            "give a probability from 0 to below 1",
        )
        require(
            len(self.regression_stds) == 4 and all(std > 0 for std in self.regression_stds),
            "box.regression_stds",
            self.regression_stds,
            "give four numbers above 0",
        )
        _check_sampling("box.", self)
        require_positive("box.", self, "regression_weight", "soft_sigma")
        require(0.0 <= self.soft_min_score < 1.0, "box.soft_min_score", self.soft_min_score, "give 0 to below 1")


@dataclass
class MaskHeadConfig(Configuration):
    """The mask branch: convolutions, one deconvolution that doubles the grid, one map per class."""

    resolution: int = 14
    """Side of the pooled region; masks are twice as large."""
    num_convs: int = 4
    channels: int = 256
    norm: NormKind = "none"
    """After each 3x3 convolution."""

    def __post_init__(self) -> None:
        require_counts("mask.", self, "resolution", "channels")
        require_counts("mask.", self, "num_convs", least=0)


def _check_sampling(prefix: str, config: RPNConfig | BoxHeadConfig) -> None:
    samples, fraction = config.num_samples, config.positive_fraction
    require_counts(prefix, config, "num_samples")
    require_shares(prefix, config, "positive_fraction")
    require(
        int(samples * fraction) >= 1,
        f"{prefix}positive_fraction",
        fraction,
        f"of {prefix}num_samples {samples} it leaves no room for a positive sample: raise either",
    )
    require(config.smooth_l1_beta >= 0, f"{prefix}smooth_l1_beta", config.smooth_l1_beta, "use 0 for plain L1")


@dataclass
class MaskRCNNConfig(HeadConfig):
    """Mask R-CNN on a feature pyramid (He et al. 2017; Lin et al. 2017)."""

    task: ClassVar[str] = "detection"

    neck: NeckConfig = field(default_factory=FPNConfig)
    rpn: RPNConfig = field(default_factory=RPNConfig)
    pooling: PoolingConfig = field(default_factory=PoolingConfig)
    box: BoxHeadConfig = field(default_factory=BoxHeadConfig)
    mask: MaskHeadConfig = field(default_factory=MaskHeadConfig)
    ignore_overlap: float = 0.5
    """An anchor or proposal with more than this share of its own area inside a crowd region is no negative."""

    def __post_init__(self) -> None:
        require(
            0.0 <= self.ignore_overlap <= 1.0,
            "ignore_overlap",
            self.ignore_overlap,
            "give a share from 0 to 1 (1 ignores nothing)",
        )


@dataclass
class CascadeConfig(MaskRCNNConfig):
    """Cascade Mask R-CNN (Cai and Vasconcelos 2019): each stage refines the boxes of the one before, under a stricter overlap.

    `box` and `mask` are every stage's but for what is given per stage here.
    """

    stage_ious: tuple[float, ...] = (FIRST_IOU, 0.6, 0.7)
    """Overlap with a ground-truth box from which a stage's proposals are positive; replaces box.positive_iou."""
    stage_weights: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Factors of each stage's losses."""
    stage_stds: tuple[tuple[float, float, float, float], ...] = (
        FIRST_STDS,
        (0.05, 0.05, 0.1, 0.1),
        (0.033, 0.033, 0.067, 0.067),
    )
    """Divisors of each stage's regression; replaces box.regression_stds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = {name: len(getattr(self, name)) for name in ("stage_ious", "stage_weights", "stage_stds")}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise HeadError(f"stages: {found} values: give each one value per stage, at least one")
        weights, iou, stds = self.stage_weights, self.box.positive_iou, self.box.regression_stds
        require(all(weight > 0 for weight in weights), "stage_weights", weights, "each must be above 0")
        # A value that no stage looks at must not seem to have been heard.
        require(iou == FIRST_IOU, "box.positive_iou", iou, "set stage_ious, which replaces it")
        require(tuple(stds) == FIRST_STDS, "box.regression_stds", stds, "set stage_stds, which replaces it")
        self.boxes()

    @property
    def num_stages(self) -> int:
        """Stages, at least one."""
        return len(self.stage_ious)

    def boxes(self) -> list[BoxHeadConfig]:
        """Return the box branch of each stage; building them checks their values."""
        made = []
        for number, (iou, stds) in enumerate(zip(self.stage_ious, self.stage_stds), start=1):
            try:
                made.append(BoxHeadConfig(**{**vars(self.box), "positive_iou": iou, "regression_stds": stds}))
            except HeadError as error:
                raise HeadError(f"stage {number}: {error}") from None
        return made


@dataclass
class SemanticBranchConfig(Configuration):
    """Hybrid Task Cascade's branch of dense prediction, learned from a semantic map of each image (`data.semantic`)."""

    num_classes: int = 0
    """Values 0..num_classes-1 of the maps, 255 is ignored; 183 for COCO-stuff. 0: no such branch."""
    level: int = 1
    """Level of the pyramid where all levels are brought together: 1 is stride 8 on P2..P6."""
    num_convs: int = 4
    weight: float = 0.2
    """Factor of its loss."""
    resize: Literal["before", "after"] = "before"
    """Place of the resizing to that level's size: before the other levels' 1x1 convolution and ReLU, as in the public code, or after
    them, as in runs of before 2026-11-29. The two do not commute."""

    def __post_init__(self) -> None:
        require_counts("semantic.", self, "num_classes", "level", "num_convs", least=0)
        own = self.num_classes
        require(own <= 255, "semantic.num_classes", own, "maps hold 0..254, and 255 for what is ignored")
        require(self.weight > 0, "semantic.weight", self.weight, "use num_classes 0 to leave the branch out")


@dataclass
class HTCConfig(CascadeConfig):
    """Hybrid Task Cascade (Chen et al. 2019): a cascade whose mask branches learn on refined boxes and from each other.

    Defaults are the public recipe: one box for all classes, smooth L1 with beta 1, score threshold 0.001.
    """

    box: BoxHeadConfig = field(
        default_factory=lambda: BoxHeadConfig(class_agnostic=True, smooth_l1_beta=1.0, score_threshold=0.001)
    )
    interleaved: bool = True
    """Each stage's masks are learned on the boxes that this stage's box branch has refined."""
    information_flow: bool = True
    """Each mask branch starts from the features of the one before."""
    semantic: SemanticBranchConfig = field(default_factory=SemanticBranchConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.information_flow or self.mask.num_convs > 0,
            "mask.num_convs",
            self.mask.num_convs,
            "information_flow hands on what the convolutions make; give at least 1",
        )
        require(
            not self.semantic.num_classes or self.mask.resolution >= self.box.resolution,
            "box.resolution",
            self.box.resolution,
            f"with a semantic branch it is pooled from mask.resolution ({self.mask.resolution}), which must not be smaller",
        )

    def check_data(self, data: Any) -> None:
        """Raise HeadError if a semantic branch is wanted and the images come without maps of as many classes."""
        wanted = self.semantic.num_classes
        if not wanted:
            return
        if not getattr(data, "semantic", ""):
            raise HeadError(
                f"semantic.num_classes is {wanted} but data.semantic is empty: name the folder of semantic maps "
                '("stuffthingmaps/train2017"), or "instances"; or set semantic.num_classes 0 to do without the branch'
            )
        if wanted != data.semantic_classes:
            raise HeadError(
                f"semantic.num_classes is {wanted} but data.semantic_classes is {data.semantic_classes}: they must be the same"
            )
