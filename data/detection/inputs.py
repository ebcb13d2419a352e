"""Images without labels, for a detection head: read, drawn on, and listed in COCO's results format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from permafrost.data.detection.config import CocoDataConfig
from permafrost.data.detection.dataset import inference_sample
from permafrost.data.detection.evaluator import CocoEvaluator
from permafrost.data.pictures.draw import draw_detections
from permafrost.data.pictures.read import read_image
from permafrost.data.pictures.transforms import FitTransform
from permafrost.data.types import DetectionResult, Sample


class DetectionInputs:
    """See InputReader. Images are resized as in evaluation and drawn on in their own size.

    Args:
        config: how images are resized.
        classes: names by label.
        category_ids: the data set's category ids by label.
    """

    suffix = ".png"
    threshold = 0.5

    def __init__(self, config: CocoDataConfig, classes: Sequence[str], category_ids: Sequence[int]) -> None:
        self.config, self.classes, self.category_ids = config, list(classes), list(category_ids)

    def read(self, file: Path, index: int) -> tuple[list[Sample], Tensor]:
        """One sample, and the file's own image (3, H, W) uint8.

        Raises:
            DataError: it cannot be read.
        """
        size = self.config.image_size
        sample = inference_sample(file, size, index, FitTransform(size, self.config.evaluation))
        return [sample], read_image(file)

    def keep(self, results: Sequence[DetectionResult], threshold: float) -> DetectionResult:
        """The one image's result with the objects from the threshold up."""
        (found,) = results
        shown = found.scores >= threshold
        masks = None if found.masks is None else found.masks[shown]
        return replace(
            found, boxes=found.boxes[shown], labels=found.labels[shown], scores=found.scores[shown], masks=masks
        )

    def describe(self, result: DetectionResult) -> str:
        """How many objects of each class."""
        counts = Counter(self.classes[label] for label in result.labels.tolist())
        return ", ".join(f"{count} {label}" for label, count in counts.most_common()) or "nothing"

    def entries(self, result: DetectionResult, file: Path) -> list[dict[str, Any]]:
        """Entries of COCO's results format in pixels of the file, with `file_name` besides, highest score first."""
        height, width = result.original_size
        record = {"id": result.image_id, "file_name": str(file), "height": height, "width": width, "annotations": []}
        evaluator = CocoEvaluator([record], self.classes, self.category_ids)
        evaluator.update([result])
        return [{"image_id": entry["image_id"], "file_name": str(file), **entry} for entry in evaluator.results_json()]

    def write(self, source: Tensor, result: DetectionResult, target: Path) -> None:
        """A PNG of the image with the objects drawn on it."""
        Image.fromarray(draw_result(source, result, self.classes)).save(target)


def draw_result(image: Tensor, result: DetectionResult, classes: Sequence[str]) -> np.ndarray:
    """The file's own image (3, H, W) uint8 with the result drawn on it; (H', W', 3) uint8, small ones enlarged."""
    (height, width), (original_height, original_width) = result.size, result.original_size
    scale = result.boxes.new_tensor([original_width / width, original_height / height] * 2)
    return draw_detections(image, result.boxes * scale, result.labels, result.masks, result.scores, classes)
