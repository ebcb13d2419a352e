"""Build the neck that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable

from permafrost.heads.checks import find_builder
from permafrost.heads.necks.bifpn import BiFPN
from permafrost.heads.necks.config import (
    BiFPNConfig,
    FPNConfig,
    PyramidConfig,
    ResidualFPNConfig,
    SimplePyramidConfig,
)
from permafrost.heads.necks.fpn import FPN
from permafrost.heads.necks.residual_fpn import ResidualFPN
from permafrost.heads.necks.simple_pyramid import SimpleFeaturePyramid
from permafrost.model.spec import FeatureSpec

Neck = FPN | BiFPN | SimpleFeaturePyramid

BUILDERS: dict[type[PyramidConfig], Callable[..., Neck]] = {
    FPNConfig: FPN,
    ResidualFPNConfig: ResidualFPN,
    BiFPNConfig: BiFPN,
    SimplePyramidConfig: SimpleFeaturePyramid,
}


def build_neck(config: PyramidConfig, *, spec: FeatureSpec) -> Neck:
    """Return the live neck, initialised from torch's global generator.

    Args:
        config: one of the above, or one with a `build(spec=)` of its own.
        spec: the backbone's maps.

    Raises:
        HeadError: the neck takes other maps, or nothing builds this configuration.
    """
    return find_builder(BUILDERS, config, vars(config), "build(spec=)")(spec=spec)
