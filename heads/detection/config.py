"""Configurations of heads that look at regions in several stages: values only, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from permafrost.heads.config import BoxHeadConfig, MaskRCNNConfig
from permafrost.heads.errors import HeadError

if TYPE_CHECKING:
    from permafrost.heads.detection.cascade import CascadeMaskRCNN
    from permafrost.model.spec import FeatureSpec

FIRST_IOU = 0.5
FIRST_STDS = (0.1, 0.1, 0.2, 0.2)


@dataclass
class CascadeConfig(MaskRCNNConfig):
    """Cascade Mask R-CNN (Cai and Vasconcelos 2019): each stage refines the boxes of the one before, under a stricter overlap.

    `box` and `mask` are every stage's but for what is given per stage here.
    """

    stage_ious: tuple[float, ...] = (FIRST_IOU, 0.6, 0.7)
    """Overlap with a ground-truth box from which a stage's proposals are positive; replaces box.positive_iou."""
    stage_weights: tuple[float, ...] = (1.0, 0.5, 0.25)
    """What each stage's losses are multiplied by."""
    stage_stds: tuple[tuple[float, float, float, float], ...] = (
        FIRST_STDS,
        (0.05, 0.05, 0.1, 0.1),
        (0.033, 0.033, 0.067, 0.067),
    )
    """What each stage's regression is divided by; replaces box.regression_stds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = {name: len(getattr(self, name)) for name in ("stage_ious", "stage_weights", "stage_stds")}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise HeadError(f"stages: {found} values: give each one value per stage, at least one")
        if any(weight <= 0 for weight in self.stage_weights):
            raise HeadError(f"stage_weights is {self.stage_weights}: each must be above 0")
        # A value that no stage looks at must not seem to have been heard.
        if self.box.positive_iou != FIRST_IOU:
            raise HeadError(f"box.positive_iou is {self.box.positive_iou}: set stage_ious, which replaces it")
        if tuple(self.box.regression_stds) != FIRST_STDS:
            raise HeadError(f"box.regression_stds is {self.box.regression_stds}: set stage_stds, which replaces it")
        self.boxes()

    @property
    def num_stages(self) -> int:
        """Stages, at least one."""
        return len(self.stage_ious)

    def boxes(self) -> list[BoxHeadConfig]:
        """The box branch of each stage; building them checks their values."""
        made = []
        for number, (iou, stds) in enumerate(zip(self.stage_ious, self.stage_stds), start=1):
            try:
                made.append(BoxHeadConfig(**{**vars(self.box), "positive_iou": iou, "regression_stds": stds}))
            except HeadError as error:
                raise HeadError(f"stage {number}: {error}") from None
        return made

    def build(self, *, spec: FeatureSpec, classes: Sequence[str]) -> CascadeMaskRCNN:
        """The live head, initialised from torch's global generator.

        Raises:
            HeadError: the neck takes other maps, or there is no class.
        """
        from permafrost.heads.detection.cascade import build_cascade

        return build_cascade(self, spec=spec, classes=classes)


@dataclass
class SemanticBranchConfig:
    """Hybrid Task Cascade's branch of dense prediction, learned from a semantic map of each image (`data.semantic`)."""

    num_classes: int = 0
    """Values 0..num_classes-1 of the maps, 255 is ignored; 183 for COCO-stuff. 0: no such branch."""
    level: int = 1
    """Of the pyramid, where all levels are brought together: 1 is stride 8 on P2..P6."""
    num_convs: int = 4
    weight: float = 0.2
    """What its loss is multiplied by."""

    def __post_init__(self) -> None:
        for name, least in (("num_classes", 0), ("level", 0), ("num_convs", 0)):
            if getattr(self, name) < least:
                raise HeadError(f"semantic.{name} is {getattr(self, name)}: it must be at least {least}")
        if self.num_classes > 255:
            raise HeadError(
                f"semantic.num_classes is {self.num_classes}: maps hold 0..254, and 255 for what is ignored"
            )
        if self.weight <= 0:
            raise HeadError(f"semantic.weight is {self.weight}: use num_classes 0 to leave the branch out")


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
        if self.information_flow and self.mask.num_convs == 0:
            raise HeadError(
                "mask.num_convs is 0: information_flow hands on what the convolutions make; give at least 1"
            )
        if self.semantic.num_classes and self.mask.resolution < self.box.resolution:
            raise HeadError(
                f"box.resolution is {self.box.resolution}: with a semantic branch it is pooled from mask.resolution "
                f"({self.mask.resolution}), which must not be smaller"
            )
