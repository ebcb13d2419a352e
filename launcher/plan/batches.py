"""Made-up micro-batches of each task, of which a plan needs the shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permafrost.data.detection.types import DetectionTarget
from permafrost.data.segmentation.types import SegmentationTarget
from permafrost.data.types import Batch, SampleKey
from permafrost.data.video.types import ClipTarget


@dataclass(frozen=True)
class PlannedData:
    """What a recipe's training samples are.

    Attributes:
        task: of the data.
        num_classes: K.
        objects: in each image: annotated objects, or classes that occur; see data.task.SampleExtent.
        num_frames: T of a clip; None: images.
        maps: into how many maps per level the backbone turns a clip; None: images.
    """

    task: str
    num_classes: int
    objects: int
    num_frames: int | None = None
    maps: int | None = None

    @property
    def unit(self) -> str:
        """What a batch is counted in."""
        return "images" if self.num_frames is None else "clips"

    def lead(self, batch: int) -> tuple[int, ...]:
        """What stands before (C, H, W) in the shape of a map."""
        return (batch,) if self.maps is None else (batch, self.maps)

    def image_shape(self, batch: int, side: int) -> tuple[int, ...]:
        """Of `Batch.images`."""
        return (batch, 3, side, side) if self.num_frames is None else (batch, self.num_frames, 3, side, side)

    def num_bytes(self, batch: int, side: int) -> int:
        """Of a micro-batch on the device: images, and what is known of each pixel; boxes and labels do not count."""
        per_pixel = {"detection": 3 + self.objects, "segmentation": 4, "video": 3 * (self.num_frames or 1)}
        return batch * side * side * per_pixel[self.task]

    def batch(self, batch: int, side: int) -> Batch:
        """Samples of squares of `side` pixels; equal arguments give equal batches."""
        make = {"detection": self._scene, "segmentation": self._regions, "video": self._clip}[self.task]
        keys = [SampleKey(0, 0, index) for index in range(batch)]
        targets = [make(key, side) for key in keys]
        return Batch(torch.zeros(self.image_shape(batch, side), dtype=torch.uint8), targets, keys)

    def _labels(self, key: SampleKey, count: int) -> Tensor:
        return torch.randint(self.num_classes, (count,), generator=key.generator("plan/labels"))

    def _scene(self, key: SampleKey, side: int) -> DetectionTarget:
        """Objects of all sizes, everywhere."""
        generator, objects = key.generator("plan"), self.objects
        # Diameters of 4 % to 60 % of the image, most of them small, as in photographs.
        sides = side * 0.04 * 15 ** torch.rand(objects, 2, generator=generator).prod(dim=1, keepdim=True).expand(-1, 2)
        corner = torch.rand(objects, 2, generator=generator) * (side - sides)
        boxes = torch.cat([corner, corner + sides], dim=1)
        masks = torch.zeros(objects, side, side, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
            mask[top : bottom + 1, left : right + 1] = True
        return DetectionTarget(
            image_id=key.index,
            boxes=boxes,
            labels=self._labels(key, objects),
            masks=masks,
            ignore_boxes=torch.zeros(0, 4),
            size=(side, side),
            original_size=(side, side),
            semantic=torch.zeros(side, side, dtype=torch.uint8),
        )

    def _regions(self, key: SampleKey, side: int) -> SegmentationTarget:
        """As many classes as there are to be, in upright stripes."""
        count = min(self.objects, self.num_classes)
        stripes = torch.arange(side) * count // side
        return SegmentationTarget(
            image_id=key.index,
            labels=torch.arange(min(count, side)),
            semantic=stripes.to(torch.uint8).expand(side, side).contiguous(),
            size=(side, side),
            original_size=(side, side),
        )

    def _clip(self, key: SampleKey, side: int) -> ClipTarget:
        return ClipTarget(video_id=key.index, view=0, label=self._labels(key, 1)[0])
