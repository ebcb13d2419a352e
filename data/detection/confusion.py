"""The confusion matrix of a detector: it counts true classes against found ones, with what was missed and what was made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

MIN_SCORE = 0.3
"""Detections below are left out: at the threshold of an AP's evaluation most are noise."""
MIN_IOU = 0.5


def confusion_matrix(
    records: Mapping[int, dict[str, Any]], found: Mapping[int, Sequence[dict[str, Any]]], labels: Mapping[int, int]
) -> np.ndarray:
    """Count how often objects of a class (rows) are found as one of a class (columns); the last row and column are the background.

    In each image the detections, best first, take the object they overlap most of those that are left, whatever its class, from an
    overlap of MIN_IOU up; one that gets none counts as background found as its class, unless it lies in a crowd region (more than
    MIN_IOU of its area). Objects that nobody took are found as background.

    Args:
        records: of each image, by id; see CocoEvaluator.
        found: of each image, entries in COCO's results format; boxes alone decide.
        labels: label of each of the data set's category ids.

    Returns:
        (K + 1, K + 1) int64.
    """
    background = len(labels)
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    for image_id, record in records.items():
        objects = [entry for entry in record["annotations"] if not entry["iscrowd"]]
        crowds = [entry["bbox"] for entry in record["annotations"] if entry["iscrowd"]]
        seen = sorted(
            (entry for entry in found.get(image_id, ()) if entry["score"] >= MIN_SCORE),
            key=lambda entry: -entry["score"],
        )
        truth = [entry["label"] for entry in objects]
        left = np.ones(len(objects), dtype=bool)
        if seen and objects:
            overlaps = _overlaps(
                [entry["bbox"] for entry in seen], [entry["bbox"] for entry in objects], is_crowd=False
            )
        in_crowd = np.zeros(len(seen), dtype=bool)
        if seen and crowds:
            in_crowd = _overlaps([entry["bbox"] for entry in seen], crowds, is_crowd=True).max(axis=1) > MIN_IOU
        for position, entry in enumerate(seen):
            label = labels[entry["category_id"]]
            if left.any():
                candidates = np.where(left, overlaps[position], -1.0)
                best = int(candidates.argmax())
                if candidates[best] >= MIN_IOU:
                    left[best] = False
                    matrix[truth[best], label] += 1
                    continue
            if not in_crowd[position]:
                matrix[background, label] += 1
        for missed in np.flatnonzero(left):
            matrix[truth[missed], background] += 1
    return matrix


def _overlaps(boxes: Sequence[Sequence[float]], others: Sequence[Sequence[float]], *, is_crowd: bool) -> np.ndarray:
    """Return the (N, M) IoU of xywh boxes; of a crowd, the share of each box that lies inside."""
    first, second = np.asarray(boxes, dtype=np.float64), np.asarray(others, dtype=np.float64)
    return np.asarray(mask_api.iou(first, second, [int(is_crowd)] * len(second)))
