"""Segmentations in all their forms, decoded as pycocotools does."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from permafrost.data.detection.masks import decode_masks, decompress_counts


def runs(mask: np.ndarray) -> list[int]:
    """Lengths of equal values in column order, zeros first, counted one by one."""
    counts, current = [0], 0
    for value in mask.ravel(order="F"):
        if value != current:
            counts.append(0)
            current = value
        counts[-1] += 1
    return counts


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (480, 640), (3, 2000)])
def test_compressed_counts_are_read_as_pycocotools_writes_them(shape, density) -> None:
    mask = (np.random.default_rng(7).random(shape) < density).astype(np.uint8)
    text = mask_api.encode(np.asfortranarray(mask))["counts"].decode()
    assert decompress_counts(text) == runs(mask)


def test_large_and_shrinking_runs() -> None:
    mask = np.zeros((900, 900), dtype=np.uint8)
    mask[10:890, 500] = 1
    mask[5, 700] = 1
    text = mask_api.encode(np.asfortranarray(mask))["counts"].decode()
    assert decompress_counts(text) == runs(mask)


@pytest.mark.parametrize("text", ["", "p", "1o", "é", "0 1", "\x00", "o" * 30 + "1"])
def test_text_that_is_no_code_is_refused(text) -> None:
    with pytest.raises(ValueError, match=r"outside the code|no end|is empty|too many digits"):
        decompress_counts(text)


def test_all_forms_give_the_masks_of_pycocotools() -> None:
    mask = np.random.default_rng(0).random((20, 30)) < 0.3
    text = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    forms = [
        [[2.5, 3.0, 20.0, 4.5, 11.0, 18.2], [22, 2, 29, 2, 29, 9, 22, 9]],
        {"counts": text, "size": [20, 30]},
        {"counts": runs(mask), "size": [20, 30]},
    ]
    decoded = decode_masks(forms, 20, 30)
    assert decoded.shape == (3, 20, 30)
    assert decoded.dtype == np.uint8
    assert decoded.flags["C_CONTIGUOUS"]
    coco = COCO()
    coco.imgs = {1: {"height": 20, "width": 30}}
    for found, form in zip(decoded, forms):
        assert np.array_equal(found, coco.annToMask({"image_id": 1, "segmentation": form}))
    assert np.array_equal(decoded[1], mask)
    assert decode_masks([], 4, 5).shape == (0, 4, 5)
