"""Try each neck and head of the paper's detection on the built-in world `shapes`, for one CPU. Their results are not measured."""

from __future__ import annotations

from permafrost.configs.quickstart import quickstart
from permafrost.heads import (
    BiFPNConfig,
    CascadeConfig,
    HTCConfig,
    MaskRCNNConfig,
    NeckConfig,
    ResidualFPNConfig,
    SemanticBranchConfig,
)
from permafrost.launcher import Experiment

NUM_SHAPES = 8
"""Classes of the built-in world."""


def _shapes(name: str, *, kind: type[MaskRCNNConfig] = MaskRCNNConfig, neck: NeckConfig | None = None) -> Experiment:
    """Return the quickstart with another head or neck."""
    experiment = quickstart()
    experiment.name = f"paper_shapes_{name}"
    head = experiment.heads["detection"]
    head.model = kind(**vars(head.model))
    head.model.neck = neck or head.model.neck
    return experiment


def fpn() -> Experiment:
    """FPN, Mask R-CNN, on the built-in world `shapes`.

        permafrost train detection_shapes:fpn

    Hardware: one CPU core, as the quickstart.
    """
    return _shapes("fpn")


def residual_fpn() -> Experiment:
    """Residual FPN, Mask R-CNN, on the built-in world `shapes`.

        permafrost train detection_shapes:residual_fpn

    Hardware: one CPU core, as the quickstart.
    """
    return _shapes("residual_fpn", neck=ResidualFPNConfig(channels=64, num_extra_levels=0))


def bifpn() -> Experiment:
    """BiFPN, Mask R-CNN, on the built-in world `shapes`.

        permafrost train detection_shapes:bifpn

    Hardware: one CPU core, as the quickstart.
    """
    return _shapes("bifpn", neck=BiFPNConfig(channels=64, num_extra_levels=0))


def cascade() -> Experiment:
    """FPN, Cascade, on the built-in world `shapes`.

        permafrost train detection_shapes:cascade

    Hardware: one CPU core, as the quickstart.
    """
    return _shapes("cascade", kind=CascadeConfig)


def bifpn_cascade() -> Experiment:
    """BiFPN, Cascade, on the built-in world `shapes`.

        permafrost train detection_shapes:bifpn_cascade

    Hardware: one CPU core, as the quickstart.
    """
    return _shapes("bifpn_cascade", kind=CascadeConfig, neck=BiFPNConfig(channels=64, num_extra_levels=0))


def htc() -> Experiment:
    """BiFPN, HTC with a semantic branch, on the built-in world `shapes`.

        permafrost train detection_shapes:htc

    Hardware: one CPU core, as the quickstart.
    """
    experiment = _shapes("htc", kind=HTCConfig, neck=BiFPNConfig(channels=64, num_extra_levels=0))
    model = experiment.heads["detection"].model
    assert isinstance(model, HTCConfig)
    model.box.class_agnostic = True
    model.semantic = SemanticBranchConfig(num_classes=NUM_SHAPES + 1, num_convs=2)
    experiment.data.semantic_classes = NUM_SHAPES + 1
    experiment.data.semantic = "instances"
    return experiment
