"""Photos without labels, for a segmentation head: they are read in the views of evaluation, overlaid with colours, and listed by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from permafrost.data.pictures.geometry import NO_CLASS
from permafrost.data.pictures.read import image_of
from permafrost.data.segmentation.config import ADE20KDataConfig
from permafrost.data.segmentation.drawing import class_shares, draw_classes
from permafrost.data.segmentation.merging import ViewMerger
from permafrost.data.segmentation.types import SegmentationResult, SegmentationTarget
from permafrost.data.segmentation.views import plan_views, see
from permafrost.data.types import Sample, SampleKey

_NAMED = 4


@dataclass
class ClassMap:
    """The class of every pixel of one photo.

    Attributes:
        image_id: position among the inputs.
        classes: (H, W) uint8, of the photo's size.
        names: of the K classes; `names[classes[y, x]]` is a pixel's.
    """

    image_id: int
    classes: Tensor
    names: list[str] = field(repr=False)


class SegmentationInputs:
    """Reads photos without labels for a segmentation head.

    Args:
        config: which views a photo is seen in.
        classes: names by label.
        category_ids: not needed; every kind of reader is made alike.
    """

    suffix = ".png"
    threshold = 0.0

    def __init__(self, config: ADE20KDataConfig, classes: Sequence[str], category_ids: Sequence[int]) -> None:
        self.config, self.classes = config, list(classes)

    def read(self, source: Any, index: int) -> tuple[list[Sample], Tensor]:
        """Return one sample for each view, and the photo (3, H, W) uint8.

        Raises:
            DataError: it cannot be read.
        """
        image = image_of(source)
        original = (image.shape[-2], image.shape[-1])
        unknown = torch.full(original, NO_CLASS, dtype=torch.uint8)
        side, evaluation = self.config.image_size, self.config.evaluation
        samples = []
        for view in plan_views(original, side, evaluation):
            shown, labels, size = see(image, unknown, view, side if evaluation.mode == "slide" else None)
            nothing = torch.zeros(0, dtype=torch.int64)
            target = SegmentationTarget(index, nothing, labels, size, original, view)
            samples.append(Sample(shown, target, SampleKey(0, 0, index)))
        return samples, image

    def keep(self, results: Sequence[SegmentationResult], threshold: float) -> ClassMap:
        """Return the photo's classes over all its views; every pixel has one, whatever the threshold."""
        merger = ViewMerger()
        for result in results:
            classes = merger.add(result)
        assert classes is not None
        return ClassMap(results[0].image_id, classes, self.classes)

    def describe(self, result: ClassMap) -> str:
        """Return the largest classes with their shares of the pixels."""
        shares = class_shares(result.classes)
        more = f", {len(shares) - _NAMED} more" if len(shares) > _NAMED else ""
        return ", ".join(f"{self.classes[label]} {share:.0%}" for label, share in shares[:_NAMED]) + more

    def entries(self, result: ClassMap, file: Path) -> list[dict[str, Any]]:
        """Return each class that occurs: its label in the files (from 1), name, and share of the pixels, the largest first."""
        shares = class_shares(result.classes)
        found = [{"label": k + 1, "class": self.classes[k], "share": round(share, 6)} for k, share in shares]
        return [{"image_id": result.image_id, "file_name": str(file), "classes": found}]

    def write(self, source: Tensor, result: ClassMap, target: Path) -> None:
        """Write the photo under the classes' colours, with a legend, and <name>_labels.png (8-bit gray, 1 to K, as the benchmark's)."""
        Image.fromarray(draw_classes(source, result.classes, self.classes)).save(target)
        labels = result.classes.numpy() + np.uint8(1)
        Image.fromarray(labels).save(target.with_stem(f"{target.stem}_labels"))
