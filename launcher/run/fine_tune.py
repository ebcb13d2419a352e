"""Fine-tune fully: backbone and head are one module that an engine trains, for comparison with a frozen backbone.

The module has the form of a head whose features are the images, so that everything which follows from "what is
trainable" follows from it: the optimizer's groups, ZeRO's partitions, clipping, checkpoints, export and import. The loop
calls a backbone that hands its images on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from permafrost.data.types import Batch
from permafrost.heads.base import Head, LossCounts, world_mean_counts
from permafrost.model.spec import FeatureSpec
from permafrost.model.trainable import TrainableBackbone

PURPOSE = "drop_path"
"""Of the generators that drop path draws from, one per sample."""


class FineTuned(Head):
    """A backbone that is trained, with its head; its names are backbone.* and head.*.

    Args:
        backbone: with the weights it starts from.
        head: built for the backbone's maps.
        learning_rate_factor: the backbone's learning rate as a multiple of the head's.
    """

    def __init__(self, backbone: TrainableBackbone, head: Head, *, learning_rate_factor: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.learning_rate_factors = {"backbone.": learning_rate_factor}
        self.no_decay = {"backbone.": backbone.no_decay}

    def forward(
        self, features: Sequence[Tensor], batch: Batch, counts: LossCounts = world_mean_counts
    ) -> dict[str, Tensor] | list[Any]:
        """Run the head on the backbone's maps; `features` is the images alone, (B, 3, H, W) as a backbone takes them."""
        (images,) = features
        generators = [key.generator(PURPOSE) for key in batch.keys] if self.training else None
        return self.head(self.backbone(images, generators), batch, counts)


class ImagesOn:
    """In a frozen backbone's place in the loop: it hands the images on to the module that owns the real one.

    Args:
        backbone: the real one; it is only described.
    """

    stages: tuple[nn.Module, ...] = ()

    def __init__(self, backbone: TrainableBackbone) -> None:
        self.spec: FeatureSpec = backbone.spec
        self.fingerprint: str = backbone.fingerprint
        """Of the weights it started from."""
        self.num_parameters: int = backbone.num_parameters
        self._description = backbone.describe()

    def describe(self) -> dict[str, Any]:
        """Return what was chosen and why."""
        return self._description

    def __call__(self, images: Tensor) -> tuple[Tensor]:
        """Return the images, as the only feature."""
        return (images,)


def join(
    backbone: TrainableBackbone, heads: Mapping[str, Head], *, learning_rate_factor: float
) -> tuple[ImagesOn, dict[str, Head]]:
    """Build what takes the places of a frozen backbone and of its heads."""
    joined: dict[str, Head] = {
        name: FineTuned(backbone, head, learning_rate_factor=learning_rate_factor) for name, head in heads.items()
    }
    assert len(joined) == 1, "one backbone cannot follow several heads' losses"
    return ImagesOn(backbone), joined
