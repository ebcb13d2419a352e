"""Colours of classes and sheets of pictures: nothing falls off the edge."""

from __future__ import annotations

import numpy as np
import pytest

from permafrost.data.pictures.draw import captioned, class_color, contact_sheet, side_by_side


def test_colours_of_neighbouring_classes_differ() -> None:
    colors = np.array([class_color(label) for label in range(20)], dtype=int)
    assert len({tuple(color) for color in colors}) == 20
    assert np.abs(colors[1:] - colors[:-1]).sum(axis=1).min() > 150


def test_sheets_hold_every_picture_in_its_cell() -> None:
    pictures = [np.full((10 + number, 12, 3), 20 * number, dtype=np.uint8) for number in range(5)]
    sheet = contact_sheet(pictures, columns=2, gap=3)
    assert sheet.shape == (3 * 14 + 2 * 3, 2 * 12 + 3, 3)
    for number, picture in enumerate(pictures):
        top, left = (number // 2) * 17, (number % 2) * 15
        assert np.array_equal(sheet[top : top + picture.shape[0], left : left + 12], picture)
    assert (sheet[-14:, -12:] == 255).all()
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


def test_side_by_side_and_captions() -> None:
    left, right = np.zeros((30, 80, 3), np.uint8), np.full((30, 80, 3), 9, np.uint8)
    both = side_by_side(left, right)
    assert both.shape == (50, 164, 3)
    assert np.array_equal(both[20:, :80], left)
    assert np.array_equal(both[20:, 84:], right)
    assert captioned(left, "words")[:20].max() > 200
