"""Make up micro-batches, of which a plan needs the shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from permafrost.data.types import Batch, SampleKey, Target


@dataclass(frozen=True)
class PlannedData:
    """Training samples of a recipe, as far as a plan needs to know them.

    Attributes:
        target: type of what is known about each.
        num_classes: K.
        objects: in each image; see data.task.SampleExtent.
        num_frames: T of a clip; None: images.
        maps: into how many maps per level the backbone turns a clip; None: images.
    """

    target: type[Target]
    num_classes: int
    objects: int
    num_frames: int | None = None
    maps: int | None = None

    @property
    def unit(self) -> str:
        """Return what a batch is counted in."""
        return "images" if self.num_frames is None else "clips"

    def lead(self, batch: int) -> tuple[int, ...]:
        """Return what stands before (C, H, W) in the shape of a map."""
        return (batch,) if self.maps is None else (batch, self.maps)

    def image_shape(self, batch: int, side: int) -> tuple[int, ...]:
        """Return the shape of `Batch.images`."""
        return (batch, 3, side, side) if self.num_frames is None else (batch, self.num_frames, 3, side, side)

    def num_bytes(self, batch: int, side: int) -> int:
        """Return the bytes of a micro-batch on the device: images, and what is known of each pixel."""
        return batch * side * side * (3 * (self.num_frames or 1) + self.target.pixel_bytes(self.objects))

    def batch(self, batch: int, side: int) -> Batch:
        """Return samples of squares of `side` pixels; equal arguments give equal batches."""
        keys = [SampleKey(0, 0, index) for index in range(batch)]
        size = {"side": side, "num_classes": self.num_classes, "objects": self.objects}
        targets = [self.target.made_up(key, **size) for key in keys]
        return Batch(torch.zeros(self.image_shape(batch, side), dtype=torch.uint8), targets, keys)
