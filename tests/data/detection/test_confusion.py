"""The confusion matrix against one counted by hand, and the pictures of an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from permafrost.data.detection.confusion import confusion_matrix
from permafrost.data.detection.evaluator import CocoEvaluator
from permafrost.data.detection.plots import precision_curves
from permafrost.data.detection.types import DetectionResult
from permafrost.data.pictures.plots import MAX_NAMED, confusion_picture

LABELS = {5: 0, 9: 1}


def truth(label, box, iscrowd=0) -> dict[str, Any]:
    return {"label": label, "bbox": box, "iscrowd": iscrowd}


def seen(category, box, score=0.9) -> dict[str, Any]:
    return {"category_id": category, "bbox": box, "score": score}


def test_the_matrix_is_the_one_counted_by_hand() -> None:
    records = {
        1: {"annotations": [truth(0, [0, 0, 10, 10]), truth(1, [20, 20, 10, 10]), truth(0, [50, 50, 10, 10])]},
        2: {"annotations": [truth(1, [0, 0, 40, 40], iscrowd=1)]},
        3: {"annotations": [truth(1, [0, 0, 10, 10])]},
    }
    found = {
        # Right; a circle taken for the other class; the third is missed; one made up; a second one of a taken object.
        1: [
            seen(5, [0, 0, 10, 10], 0.9), seen(5, [20, 21, 10, 10], 0.8), seen(9, [80, 80, 5, 5], 0.7), seen(5, [0, 1, 10, 10], 0.6)
        ],
        # Inside a crowd: neither right nor wrong. Outside: made up.
        2: [seen(9, [5, 5, 8, 8]), seen(5, [60, 60, 8, 8])],
        # Too unsure to count: the object is missed.
        3: [seen(9, [0, 0, 10, 10], 0.2)],
    }  # fmt: skip
    expected = [[1, 0, 1], [1, 0, 1], [2, 1, 0]]
    np.testing.assert_array_equal(confusion_matrix(records, found, LABELS), expected)


def test_the_better_overlap_wins_and_each_object_is_taken_once() -> None:
    records = {1: {"annotations": [truth(0, [0, 0, 10, 10]), truth(1, [2, 0, 10, 10])]}}
    found = {1: [seen(9, [2, 0, 10, 10], 0.9), seen(9, [2, 0, 10, 10], 0.5)]}
    np.testing.assert_array_equal(confusion_matrix(records, found, LABELS), [[0, 1, 0], [0, 1, 0], [0, 0, 0]])


def test_no_detection_at_all() -> None:
    records = {1: {"annotations": [truth(0, [0, 0, 10, 10])]}, 2: {"annotations": []}}
    np.testing.assert_array_equal(confusion_matrix(records, {}, LABELS), [[0, 0, 1], [0, 0, 0], [0, 0, 0]])


def test_curves_are_drawn_where_a_class_occurs() -> None:
    recalls = np.linspace(0, 1, 101)
    precision = np.full((10, 101, 2), -1.0)
    ious = np.linspace(0.5, 0.95, 10)
    empty = precision_curves({"bbox": precision}, ious, recalls)
    precision[:, :, 0] = np.clip(1.2 - recalls, 0, 1) * np.linspace(1, 0.2, 10)[:, None]
    one = precision_curves({"bbox": precision}, ious, recalls)
    two = precision_curves({"bbox": precision, "segm": precision}, ious, recalls)
    for picture in (empty, one, two):
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
    assert (one != empty).any()
    assert two.shape[1] == 2 * one.shape[1]


@pytest.mark.parametrize("num_classes", [3, MAX_NAMED + 50])
def test_confusion_is_a_picture(num_classes) -> None:
    classes = [f"class {i}" for i in range(num_classes)]
    nothing = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    right = nothing + np.diag(np.arange(num_classes + 1))
    first, second = confusion_picture(nothing, classes), confusion_picture(right, classes)
    assert first.shape == second.shape
    assert first.shape[2] == 3
    assert (first != second).any()


def test_an_evaluator_draws_what_it_has_scored() -> None:
    record = {"id": 1, "file_name": "a.jpg", "height": 40, "width": 40}
    entry = {
        "bbox": [2, 2, 20, 20],
        "segmentation": [[2, 2, 22, 2, 22, 22, 2, 22]],
        "label": 1,
        "iscrowd": 0,
        "area": 400,
    }
    evaluator = CocoEvaluator([{**record, "annotations": [entry]}], ["a", "b"], [3, 7])
    assert evaluator.pictures() == {}
    box = torch.tensor([[2.0, 2.0, 22.0, 22.0]])
    found = DetectionResult(1, box, torch.tensor([1]), torch.tensor([0.9]), None, (40, 40), (40, 40))
    evaluator.update([found])
    assert evaluator.compute()["bbox/AP-b"] == pytest.approx(1.0)
    assert set(evaluator.pictures()) == {"precision_recall", "confusion"}
