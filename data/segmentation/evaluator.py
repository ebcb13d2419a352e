"""Compute mean intersection over union and its kin from one integer confusion matrix.

Every rank counts pixels of its own images at the size of the file; the matrices are summed. Nothing is averaged over images, so
the numbers do not depend on how images were dealt out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from permafrost.data.errors import DataError
from permafrost.data.pictures.geometry import NO_CLASS
from permafrost.data.pictures.plots import confusion_picture
from permafrost.data.pictures.read import ImageError
from permafrost.data.segmentation.merging import ViewMerger
from permafrost.data.segmentation.types import SegmentationResult

Truth = Callable[[int, tuple[int, int]], np.ndarray]
"""The (H, W) uint8 classes of an image, by its id and size."""
NAMES = ("mIoU", "pixel_accuracy", "mean_accuracy")


class SegmentationEvaluator:
    """Turns segments into the class of every pixel, view by view, and counts.

    Each rank collects its share (`update`), the shares meet on one (`state`, `merge`), and that one scores (`compute`). The views
    of an image must reach one rank, in order.

    Args:
        classes: names by label.
        names: file names of the images, by image id.
        truth: truth(image_id, (H, W)): the (H, W) uint8 classes of an image, NO_CLASS where nobody knows; None counts nothing.
        submission: folder for a label PNG of each image: 8-bit gray, 1 to K, of the photo's size, named as the photo (the
            benchmark server's format); made if it is missing.
    """

    def __init__(
        self,
        classes: Sequence[str],
        names: Sequence[str],
        *,
        truth: Truth | None = None,
        submission: Path | None = None,
    ) -> None:
        self.classes = list(classes)
        self.names = list(names)
        self.truth = truth
        self.submission = submission
        self._confusion = np.zeros((len(classes),) * 2, dtype=np.int64)
        self._seen: set[int] = set()
        self._merger = ViewMerger()

    def update(self, results: Sequence[SegmentationResult]) -> None:
        """Take in the results of some views, on any device: what is large stays there.

        Raises:
            DataError: scores are not numbers, an image is unknown or came before, views are out of order, labels or the folder of
                the submission cannot be used.
        """
        for result in results:
            if not 0 <= result.image_id < len(self.names):
                raise DataError(
                    f"results for image {result.image_id}, which is not among the {len(self.names)} evaluated"
                )
            name = self.names[result.image_id]
            if result.image_id in self._seen:
                raise DataError(f"results for image {name} came twice")
            if not (result.class_scores.isfinite().all() and result.mask_logits.isfinite().all()):
                raise DataError(f"{name}: the head gave scores that are not numbers")
            best = self._merger.add(result)
            if best is None:
                continue
            self._seen.add(result.image_id)
            if self.truth is not None:
                self._confusion += self._count(self.truth, result.image_id, best)
            if self.submission is not None:
                self._write(self.submission / f"{Path(name).stem}.png", best)

    def _count(self, truth: Truth, image_id: int, best: torch.Tensor) -> np.ndarray:
        """Count the pixels of one image, (K, K) int64: rows are true classes, columns predicted ones."""
        try:
            true = torch.from_numpy(truth(image_id, (best.shape[0], best.shape[1]))).to(best.device)
        except ImageError as error:
            raise DataError(f"{self.names[image_id]}: {error}; evaluation needs every image") from error
        known = true != NO_CLASS
        number = len(self.classes)
        cells = true[known].long() * number + best[known].long()
        return torch.bincount(cells, minlength=number**2).view(number, number).cpu().numpy()

    def _write(self, path: Path, best: torch.Tensor) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(best.cpu().numpy() + np.uint8(1)).save(path)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror or error}") from error

    def state(self) -> dict[str, Any]:
        """Return what this rank collected, as plain values for `merge`."""
        return {"confusion": self._confusion, "seen": sorted(self._seen), "unfinished": self._merger.unfinished}

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Replace what was collected by the sum over all ranks' states, this rank's included.

        Raises:
            DataError: two ranks give results for one image, or one lacks views of an image.
        """
        confusion = np.zeros_like(self._confusion)
        seen: set[int] = set()
        for state in states:
            if state["unfinished"] is not None:
                raise DataError(f"views of image {self.names[state['unfinished']]} are missing")
            if both := seen.intersection(state["seen"]):
                raise DataError(f"results for image {self.names[min(both)]} came from two ranks")
            seen.update(state["seen"])
            confusion += state["confusion"]
        self._confusion, self._seen = confusion, seen

    @property
    def confusion(self) -> np.ndarray:
        """Return how many pixels of the row's class were taken for the column's, (K, K) int64."""
        return self._confusion

    def compute(self) -> dict[str, float]:
        """Return "semantic/mIoU", "semantic/pixel_accuracy", "semantic/mean_accuracy" (0..1), and "semantic/IoU-<class>".

        Without labels there is nothing to return. Means are over the classes that have a labelled pixel in these images.

        Raises:
            DataError: images without a result, or not one labelled pixel.
        """
        if len(self._seen) < len(self.names):
            first = next(name for number, name in enumerate(self.names) if number not in self._seen)
            raise DataError(
                f"{len(self.names) - len(self._seen)} of {len(self.names)} images have no result, the first: {first}"
            )
        if self.truth is None:
            return {}
        if not self._confusion.any():
            raise DataError(f"not one labelled pixel in {len(self.names)} images: there is nothing to score")
        iou, accuracy, labelled = self._per_class()
        metrics = {
            "semantic/mIoU": float(iou[labelled].mean()),
            "semantic/pixel_accuracy": float(np.trace(self._confusion) / self._confusion.sum()),
            "semantic/mean_accuracy": float(accuracy[labelled].mean()),
        }
        metrics.update({f"semantic/IoU-{self.classes[k]}": float(iou[k]) for k in np.flatnonzero(labelled)})
        return metrics

    def _per_class(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return IoU, recall, and whether there is a labelled pixel, of each class."""
        hits, true, found = np.diag(self._confusion), self._confusion.sum(axis=1), self._confusion.sum(axis=0)
        return hits / np.maximum(true + found - hits, 1), hits / np.maximum(true, 1), true > 0

    def results_json(self) -> list[dict[str, Any]]:
        """Return, for each class with a labelled pixel, its name, labelled and predicted pixels, IoU and accuracy."""
        iou, accuracy, labelled = self._per_class()
        return [
            {
                "class": self.classes[k],
                "labelled_pixels": int(self._confusion[k].sum()),
                "predicted_pixels": int(self._confusion[:, k].sum()),
                "IoU": round(float(iou[k]), 6),
                "accuracy": round(float(accuracy[k]), 6),
            }
            for k in np.flatnonzero(labelled)
        ]

    def result_files(self, head: str) -> dict[str, bytes]:
        """Return files of the numbers in `results_json` and of the confusion matrix, an array of integers; none without labels."""
        if self.truth is None:
            return {}
        matrix = io.BytesIO()
        np.save(matrix, self._confusion)
        listed = json.dumps(self.results_json(), indent=1) + "\n"
        return {f"results_{head}.json": listed.encode(), f"confusion_{head}.npy": matrix.getvalue()}

    def pictures(self) -> dict[str, np.ndarray]:
        """Draw the confusion matrix; nothing without labels."""
        if self.truth is None:
            return {}
        return {"confusion": confusion_picture(self._confusion, self.classes)}
