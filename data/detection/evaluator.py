"""Compute COCO's average precision by pycocotools (or a library that is called alike), for boxes and masks.

What pycocotools takes silently is handled before it gets there: no predictions at all (IndexError in its loader), a
score that is not a number (reported as AP 1), a ground-truth annotation with id 0 (never matched), annotations
without `area` or `iscrowd`.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from permafrost.data.detection.config import EvaluationConfig
from permafrost.data.detection.confusion import confusion_matrix
from permafrost.data.detection.masks import encode_segmentation, paste_mask
from permafrost.data.detection.plots import precision_curves
from permafrost.data.detection.scorers import find_scorer
from permafrost.data.detection.server import server_files
from permafrost.data.detection.types import DetectionResult, DetectionView
from permafrost.data.detection.views import merge_views
from permafrost.data.errors import DataError
from permafrost.data.pictures.plots import confusion_picture

STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of COCOeval's twelve numbers, in its order."""


class CocoEvaluator:
    """Collects results image by image and scores them against COCO ground truth.

    All images it was made for count: one without results is an image in which nothing was found. Each rank collects
    its share (`update`), the shares meet on one (`state`, `merge`), and that one scores (`compute`).

    Args:
        records: one per image: id, file_name, height, width, and annotations with bbox (xywh), segmentation, label,
            iscrowd, area.
        classes: names by label.
        category_ids: the data set's category ids by label.
        evaluation: how the views of an image become one result, if there are several.
        submission: the file that lists the test set's images, and the folder that results for COCO's server are named after; None
            is no test set.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        classes: Sequence[str],
        category_ids: Sequence[int],
        evaluation: EvaluationConfig | None = None,
        submission: tuple[Path, Path] | None = None,
    ) -> None:
        self.submission = submission
        self.evaluation = evaluation or EvaluationConfig()
        self.scorer = find_scorer(self.evaluation.scorer)
        self._views: dict[int, list[tuple[DetectionView, DetectionResult]]] = {}
        self.records = {record["id"]: record for record in records}
        self.classes = list(classes)
        self.category_ids = list(category_ids)
        self._found: dict[int, list[dict[str, Any]]] = {}
        self._with_masks: bool | None = None
        self._precisions: dict[str, np.ndarray] = {}

    def update(self, results: Sequence[DetectionResult]) -> None:
        """Take in the results of some images, on any device; of an image with several views, of each.

        Raises:
            DataError: a score or box is not a number, or the image is unknown or came before.
        """
        for result in results:
            result = result.cpu()
            record = self.records.get(result.image_id)
            if record is None:
                raise DataError(
                    f"results for image {result.image_id}, which is not among the {len(self.records)} evaluated"
                )
            views = self._views.setdefault(result.image_id, [])
            if result.image_id in self._found or any(view == result.view for view, _ in views):
                raise DataError(f"results for image {result.image_id} ({record['file_name']}) came twice")
            self._require_finite(result, record)
            if result.view is not None:
                views.append((result.view, result))
                if len(views) < result.view.count:
                    continue
                ordered = sorted(views, key=lambda pair: pair[0].number)
                result = merge_views([one for _, one in ordered], self.evaluation)
            del self._views[result.image_id]
            self._found[result.image_id] = self._converted(result, record)
            self._with_masks = (self._with_masks is not False) and result.masks is not None

    def _require_finite(self, result: DetectionResult, record: dict[str, Any]) -> None:
        name = f"image {result.image_id} ({record['file_name']})"
        if not result.scores.isfinite().all():
            raise DataError(
                f"{name}: the head gave a score that is not a number; pycocotools would count it as perfect"
            )
        if not result.boxes.isfinite().all():
            raise DataError(f"{name}: the head gave a box that is not finite")

    def _converted(self, result: DetectionResult, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the results of one image as COCO entries in pixels of the file."""
        boxes, scores = result.boxes.double().numpy(), result.scores.double().numpy()
        height, width = record["height"], record["width"]
        ratios = (width / result.size[1], height / result.size[0])
        boxes = boxes * np.array(ratios * 2)
        boxes = np.clip(boxes, 0, [width, height, width, height])
        entries = []
        for position, (box, label, score) in enumerate(zip(boxes, result.labels.tolist(), scores)):
            x0, y0, x1, y1 = box.tolist()
            entry = {
                "image_id": result.image_id,
                "category_id": self.category_ids[label],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(score),
            }
            if result.masks is not None:
                entry["segmentation"] = paste_mask(result.masks[position].float().numpy(), box, height, width)
            entries.append(entry)
        return entries

    def state(self) -> dict[str, Any]:
        """Return what this rank collected, as plain Python values for `merge`.

        Raises:
            DataError: of an image some views are missing.
        """
        for image_id, views in self._views.items():
            raise DataError(
                f"image {image_id}: {len(views)} of its {views[0][0].count} views came; all belong to one rank"
            )
        return {"found": self._found, "with_masks": self._with_masks}

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Replace what was collected by the union of all ranks' states, this rank's included.

        Raises:
            DataError: two ranks give results for one image.
        """
        found: dict[int, list[dict[str, Any]]] = {}
        for state in states:
            for image_id, entries in state["found"].items():
                if image_id in found:
                    raise DataError(f"results for image {image_id} came from two ranks")
                found[image_id] = entries
        given = [state["with_masks"] for state in states if state["with_masks"] is not None]
        self._found, self._with_masks = found, all(given) if given else None

    def results_json(self) -> list[dict[str, Any]]:
        """Return the results in COCO's format, by image id: boxes xywh in pixels of the file, masks as compressed run lengths."""
        listed = []
        for image_id in sorted(self._found):
            for entry in self._found[image_id]:
                shown = {**entry, "bbox": [round(value, 3) for value in entry["bbox"]]}
                if "segmentation" in entry:
                    counts = entry["segmentation"]["counts"].decode("ascii")
                    shown["segmentation"] = {"size": list(entry["segmentation"]["size"]), "counts": counts}
                listed.append(shown)
        return listed

    def result_files(self, head: str) -> dict[str, bytes]:
        """Return results_<head>.json with the content of `results_json`; of a test set, the files that COCO's server takes."""
        if self.submission is not None:
            return server_files(self.results_json(), *self.submission)
        return {f"results_{head}.json": json.dumps(self.results_json()).encode()}

    def compute(self) -> dict[str, float]:
        """Return COCO's numbers, 0..1: "bbox/AP", "bbox/AP50", ..., "bbox/AP-<class>"; with masks the same under "segm/".

        Numbers without any ground truth to count (a class or a size that does not occur) are left out; AP, AP50 and
        AP75 are always there. Without any annotation at all there are no numbers: the images of a test set.
        """
        if not any(record["annotations"] for record in self.records.values()):
            return {}
        truth = self._ground_truth()
        kinds = ("bbox",) if self._with_masks is False else ("bbox", "segm")
        metrics: dict[str, float] = {}
        for kind in kinds:
            metrics.update(self._evaluate(truth, kind))
        return metrics

    def _ground_truth(self) -> Any:
        annotations: list[dict[str, Any]] = []
        for record in self.records.values():
            for entry in record["annotations"]:
                encoded = encode_segmentation(entry["segmentation"], record["height"], record["width"])
                area = entry["area"]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": record["id"],
                        "category_id": self.category_ids[entry["label"]],
                        "bbox": entry["bbox"],
                        "segmentation": encoded,
                        "area": float(mask_api.area(encoded)) if area is None else area,
                        "iscrowd": entry["iscrowd"],
                    }
                )
        return self._coco(annotations)

    def _predictions(self, kind: str) -> Any:
        annotations: list[dict[str, Any]] = []
        for image_id in sorted(self._found):
            for entry in self._found[image_id]:
                width, height = entry["bbox"][2:]
                area = width * height if kind == "bbox" else float(mask_api.area(entry["segmentation"]))
                annotations.append({**entry, "id": len(annotations) + 1, "area": area, "iscrowd": 0})
        return self._coco(annotations)

    def _coco(self, annotations: list[dict[str, Any]]) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = self.scorer.coco()
            coco.dataset = {
                "images": [
                    {name: record[name] for name in ("id", "height", "width")} for record in self.records.values()
                ],
                "categories": [{"id": number, "name": name} for number, name in zip(self.category_ids, self.classes)],
                "annotations": annotations,
            }
            coco.createIndex()
        return coco

    def _evaluate(self, truth: Any, kind: str) -> dict[str, float]:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = self.scorer.evaluation(truth, self._predictions(kind), iouType=kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        metrics = {}
        for name, value in zip(STATISTICS, np.asarray(evaluation.stats).tolist()):
            if value >= 0:
                metrics[f"{kind}/{name}"] = value
            elif name in ("AP", "AP50", "AP75"):
                metrics[f"{kind}/{name}"] = 0.0
        # precision: (IoU thresholds, recalls, classes, areas, detection limits); all areas, the largest limit. -1 is
        # "no ground truth".
        precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
        # By label, not by category id.
        columns = [list(evaluation.params.catIds).index(number) for number in self.category_ids]
        self._precisions[kind] = precision[:, :, columns]
        self._axes = (evaluation.params.iouThrs, evaluation.params.recThrs)
        for label, name in enumerate(self.classes):
            values = self._precisions[kind][:, :, label]
            values = values[values > -1]
            if values.size:
                metrics[f"{kind}/AP-{name}"] = float(values.mean())
        return metrics

    def pictures(self) -> dict[str, np.ndarray]:
        """Draw precision over recall and the confusion matrix of boxes, (H, W, 3) uint8 by name; `compute` comes first."""
        if not self._precisions:
            return {}
        labels = {number: label for label, number in enumerate(self.category_ids)}
        matrix = confusion_matrix(self.records, self._found, labels)
        return {
            "precision_recall": precision_curves(self._precisions, *self._axes),
            "confusion": confusion_picture(matrix, self.classes),
        }
