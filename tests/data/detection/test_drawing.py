"""Pictures: the right pixels get the right colour, and nothing falls off the edge."""

from __future__ import annotations

import numpy as np
import torch

from permafrost.data.detection.drawing import draw_detections
from permafrost.data.pictures.draw import class_color


def gray(height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), 100, dtype=torch.uint8)


BOX = torch.tensor([[20.0, 30.0, 60.0, 80.0]])
LABEL = torch.tensor([1])


def test_box_mask_and_label_are_where_they_belong() -> None:
    image = gray(100, 120)
    mask = torch.zeros((1, 100, 120), dtype=torch.bool)
    mask[0, 40:70, 30:50] = True
    picture = draw_detections(image, BOX, LABEL, mask, None, ["cat", "dog"], min_side=0)
    assert picture.shape == (100, 120, 3)
    assert picture.dtype == np.uint8
    color = class_color(1)
    for y, x in ((30, 40), (79, 40), (50, 20), (50, 59)):
        assert tuple(picture[y, x]) == color
    blend = [100 * 0.55 + value * 0.45 for value in color]
    assert np.abs(picture[55, 40] - np.array(blend)).max() <= 1.5
    assert tuple(picture[35, 25]) == (100, 100, 100)
    assert tuple(picture[95, 110]) == (100, 100, 100)
    # The tag stands above the box, black on the class's colour.
    tag = picture[12:30, 20:60].reshape(-1, 3)
    # Text is anti-aliased: at this size its strokes are dark, not all black.
    assert tag.max(axis=1).min() < 60
    assert (tag == color).all(axis=1).sum() > 100
    assert torch.equal(image, gray(100, 120))


def test_grids_on_boxes_are_pasted() -> None:
    grid = torch.zeros(1, 28, 28)
    grid[:, :, 14:] = 1.0
    picture = draw_detections(gray(100, 120), BOX, LABEL, grid, torch.tensor([0.9]), min_side=0).astype(int)
    assert tuple(picture[60, 30]) == (100, 100, 100)
    assert tuple(picture[60, 50]) != (100, 100, 100)


def test_small_pictures_are_enlarged_by_a_whole_factor() -> None:
    picture = draw_detections(gray(50, 64), BOX / 2, LABEL, min_side=320)
    assert picture.shape == (250, 320, 3)
    assert tuple(picture[15 * 5, 20 * 5]) == class_color(1)


def test_scores_hide_and_label_objects() -> None:
    boxes, labels = BOX.repeat(2, 1), torch.tensor([0, 1])
    boxes[1] += 30
    both = draw_detections(gray(120, 120), boxes, labels, None, torch.tensor([0.9, 0.2]), min_side=0)
    one = draw_detections(gray(120, 120), boxes, labels, None, torch.tensor([0.9, 0.2]), min_score=0.5, min_side=0)
    alone = draw_detections(gray(120, 120), boxes[:1], labels[:1], None, torch.tensor([0.9]), min_side=0)
    assert not np.array_equal(both, one)
    assert np.array_equal(one, alone)
    unlabelled = draw_detections(gray(120, 120), boxes[:1], labels[:1], None, None, min_side=0)
    assert not np.array_equal(alone, unlabelled)


def test_nothing_to_draw_and_odd_boxes() -> None:
    empty = draw_detections(
        gray(40, 40), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 28, 28), min_side=0
    )
    assert (empty == 100).all()
    odd = torch.tensor([[-20.0, -5.0, 300.0, 200.0], [39.0, 39.0, 39.5, 39.2], [5.0, 5.0, 5.0, 5.0]])
    picture = draw_detections(
        gray(40, 40), odd, torch.tensor([3, 70, 5]), torch.ones(3, 28, 28), torch.rand(3), min_side=0
    )
    assert picture.shape == (40, 40, 3)
