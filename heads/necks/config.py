"""Configure necks, which mix the levels of a feature pyramid: values only, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from permafrost._configuration import Configuration
from permafrost.heads.checks import require_counts

NormKind = Literal["none", "group", "layer"]
"""After a convolution: nothing; a norm over groups of channels and all cells; or one over the channels of each cell."""


@dataclass
class PyramidConfig(Configuration):
    """The fields that every feature pyramid has; its kinds follow. One from outside this package has a method `build(spec=)`."""

    channels: int = 256
    num_extra_levels: int = 1
    """Levels below the coarsest one, each half as large as the one before: 1 is P6 after P2..P5. Proposals only."""
    level_norm: bool = True
    """A trained LayerNorm over the channels of every backbone map (the backbone's own outputs are raw)."""

    def __post_init__(self) -> None:
        require_counts("neck.", self, "channels")
        require_counts("neck.", self, "num_extra_levels", least=0)


@dataclass
class FPNConfig(PyramidConfig):
    """The feature pyramid: one level per backbone map, coarser ones by subsampling the last."""


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
        require_counts("neck.", self, "num_blocks")


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
        require_counts("neck.", self, "num_layers", "finest_stride")


@dataclass
class SimplePyramidConfig(PyramidConfig):
    """The simple feature pyramid of ViTDet: strides 4 to 32 from the single map of a plain backbone."""


NeckConfig = FPNConfig | ResidualFPNConfig | BiFPNConfig | SimplePyramidConfig
