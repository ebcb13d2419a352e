"""Soft-NMS against the paper's loop in plain Python, and as an option of the box branch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from permafrost.heads.detection.config import BoxHeadConfig
from permafrost.heads.detection.roi import suppress


def overlap(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inner = width * height
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def by_the_book(boxes, scores, labels, kind, config) -> list[tuple[float, int]]:
    """Each class by itself, then the best of all classes."""
    kept = []
    for label in set(labels):
        left = {i: scores[i] for i in range(len(boxes)) if labels[i] == label}
        while left:
            best = max(left, key=left.get)
            kept.append((left.pop(best), best))
            for i in left:
                iou = overlap(boxes[best], boxes[i])
                if kind == "gaussian":
                    left[i] *= math.exp(-iou * iou / config.soft_sigma)
                elif iou >= config.nms_iou:
                    left[i] *= 1 - iou
    kept = sorted((pair for pair in kept if pair[0] >= config.soft_min_score), reverse=True)
    return kept[: config.num_detections]


@pytest.mark.parametrize("kind", ["linear", "gaussian"])
@pytest.mark.parametrize("num_detections", [7, 100])
def test_equals_the_papers_loop(kind, num_detections) -> None:
    random = torch.Generator().manual_seed(4)
    corner = torch.rand(60, 2, generator=random, dtype=torch.float64) * 30
    boxes = torch.cat([corner, corner + 10 + torch.rand(60, 2, generator=random) * 15], dim=1)
    scores = torch.rand(60, generator=random, dtype=torch.float64)
    labels = torch.randint(3, (60,), generator=random)
    config = BoxHeadConfig(suppression=kind, nms_iou=0.3, num_detections=num_detections, soft_min_score=0.05)
    index, lowered = suppress(boxes, scores, labels, config)
    expected = by_the_book(boxes.tolist(), scores.tolist(), labels.tolist(), kind, config)
    assert index.tolist() == [i for _, i in expected]
    torch.testing.assert_close(lowered, torch.tensor([s for s, _ in expected], dtype=torch.float64))
    assert len(index) < 60


@pytest.mark.parametrize("kind", ["hard", "linear", "gaussian"])
def test_nothing_to_suppress(kind) -> None:
    config = BoxHeadConfig(suppression=kind)
    index, scores = suppress(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), config)
    assert len(index) == len(scores) == 0


@pytest.mark.parametrize("kind", ["linear", "gaussian"])
def test_the_head_keeps_overlapping_boxes_with_lower_scores(
    kind, small_config, spec, classes, make_batch, make_features, build
) -> None:
    parts = small_config()
    config = replace(parts, box=replace(parts.box, num_detections=500))
    head = build(config, spec, classes).eval()
    with torch.no_grad():
        hard = head(make_features(), make_batch())
        head.box.config = replace(config.box, suppression=kind)
        soft = head(make_features(), make_batch())
    for before, after in zip(hard, soft):
        assert len(after.boxes) > len(before.boxes)
        assert (after.scores[1:] <= after.scores[:-1]).all()
        assert after.scores[0] == before.scores[0]
        assert torch.equal(after.boxes[0], before.boxes[0])
