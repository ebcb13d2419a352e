"""Define the linear video head: what the average of the frozen features knows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from permafrost.data.types import SampleKey
from permafrost.heads.video.clip_head import ClipHead
from permafrost.heads.video.config import LinearVideoConfig
from permafrost.model.spec import FeatureSpec


class LinearVideoHead(ClipHead):
    """Average pool over frames and cells, one linear layer (the paper, Table 4).

    Args:
        spec: the backbone's maps.
        classes: names of the K classes.
        config: norm and dropout.
    """

    def __init__(self, *, spec: FeatureSpec, classes: Sequence[str], config: LinearVideoConfig) -> None:
        super().__init__(spec=spec, classes=classes, config=config, width=spec.channels[-1])

    def mix(self, tokens: Tensor, map_size: tuple[int, int], keys: Sequence[SampleKey]) -> Tensor:
        """Return the tokens as they are: the frames' order does not matter."""
        return tokens
