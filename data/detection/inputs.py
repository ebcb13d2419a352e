"""Images without labels, for a detection head: they are read, drawn on, and listed in COCO's results format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from permafrost.data.detection.config import CocoDataConfig
from permafrost.data.detection.dataset import inference_sample
from permafrost.data.detection.drawing import draw_detections, paste_masks
from permafrost.data.detection.evaluator import CocoEvaluator
from permafrost.data.detection.transforms import FitTransform
from permafrost.data.detection.types import DetectionResult
from permafrost.data.pictures.read import image_of
from permafrost.data.types import Sample


@dataclass
class Detections:
    """Objects found in one image, in that image's own pixels, the surest first.

    Attributes:
        found: the head's own result.
        classes: names by label.
    """

    found: DetectionResult
    classes: list[str] = field(repr=False)

    @property
    def boxes(self) -> Tensor:
        """Return the boxes, (N, 4) float32 xyxy."""
        (height, width), (original_height, original_width) = self.found.size, self.found.original_size
        return self.found.boxes * self.found.boxes.new_tensor([original_width / width, original_height / height] * 2)

    @property
    def labels(self) -> Tensor:
        """Return the labels, (N,) int64 in 0..K-1."""
        return self.found.labels

    @property
    def scores(self) -> Tensor:
        """Return the scores, (N,) float32 in [0, 1]."""
        return self.found.scores

    @property
    def names(self) -> list[str]:
        """Return the class of each object."""
        return [self.classes[label] for label in self.found.labels.tolist()]

    @cached_property
    def masks(self) -> Tensor | None:
        """Return the objects' pixels, (N, H, W) bool; None of a head without masks."""
        if self.found.masks is None:
            return None
        return paste_masks(self.found.masks, self.boxes, *self.found.original_size)


class DetectionInputs:
    """Reads images without labels for a detection head: resized as in evaluation, drawn on in their own size.

    Args:
        config: how images are resized.
        classes: names by label.
        category_ids: the data set's category ids by label.
    """

    suffix = ".png"
    threshold = 0.5

    def __init__(self, config: CocoDataConfig, classes: Sequence[str], category_ids: Sequence[int]) -> None:
        self.config, self.classes, self.category_ids = config, list(classes), list(category_ids)

    def read(self, source: Any, index: int) -> tuple[list[Sample], Tensor]:
        """Return one sample, and the image itself (3, H, W) uint8.

        Raises:
            DataError: it cannot be read.
        """
        image, size = image_of(source), self.config.image_size
        return [inference_sample(image, size, index, FitTransform(size, self.config.evaluation))], image

    def keep(self, results: Sequence[DetectionResult], threshold: float) -> Detections:
        """Return the one image's objects from the threshold up."""
        (found,) = results
        shown = found.scores >= threshold
        masks = None if found.masks is None else found.masks[shown]
        boxes, labels, scores = found.boxes[shown], found.labels[shown], found.scores[shown]
        return Detections(replace(found, boxes=boxes, labels=labels, scores=scores, masks=masks), self.classes)

    def describe(self, result: Detections) -> str:
        """Return how many objects of each class there are."""
        counts = Counter(result.names)
        return ", ".join(f"{count} {label}" for label, count in counts.most_common()) or "nothing"

    def entries(self, result: Detections, file: Path) -> list[dict[str, Any]]:
        """Return entries of COCO's results format in pixels of the file, with `file_name` besides, highest score first."""
        found = result.found
        height, width = found.original_size
        record = {"id": found.image_id, "file_name": str(file), "height": height, "width": width, "annotations": []}
        evaluator = CocoEvaluator([record], self.classes, self.category_ids)
        evaluator.update([found])
        return [{"image_id": entry["image_id"], "file_name": str(file), **entry} for entry in evaluator.results_json()]

    def write(self, source: Tensor, result: Detections, target: Path) -> None:
        """Write a PNG of the image with the objects drawn on it, small images enlarged."""
        found = result.found
        picture = draw_detections(source, result.boxes, found.labels, found.masks, found.scores, self.classes)
        Image.fromarray(picture).save(target)
