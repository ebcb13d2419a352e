"""Convert COCO's segmentations and masks on a box's own grid: polygons, run lengths in three forms, pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_api


def decompress_counts(text: str) -> list[int]:
    """Return the run lengths of COCO's compressed string: signed base-32 digits, low first; from the fourth on, differences.

    Raises:
        ValueError: a character outside the code, or a last number without an end.
    """
    try:
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError as error:
        raise ValueError("a character is outside the code") from error
    if codes.size == 0:
        raise ValueError("the string is empty")
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError("a character is outside the code")
    ends = np.flatnonzero((codes & 32) == 0)
    if ends.size == 0 or ends[-1] != codes.size - 1:
        raise ValueError("the last number has no end")
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 8:
        raise ValueError("a number has too many digits")
    places = np.arange(codes.size) - np.repeat(starts, ends - starts + 1)
    values = np.add.reduceat((codes & 31) << (5 * places), starts)
    # Bit 4 of the last digit is the sign: extend it upwards.
    values -= np.where(codes[ends] & 16, np.int64(1) << (5 * (ends - starts + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values.tolist()


def encode_segmentation(segmentation: list | dict, height: int, width: int) -> dict[str, Any]:
    """Return pycocotools' compressed run lengths ({"counts": bytes, "size"}) of any checked segmentation."""
    if isinstance(segmentation, list):
        return mask_api.merge(mask_api.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_api.frPyObjects(segmentation, height, width)
    return {"counts": segmentation["counts"].encode("ascii"), "size": [height, width]}


def decode_masks(segmentations: Sequence[list | dict], height: int, width: int) -> np.ndarray:
    """Return the masks of one image's segmentations, uint8 0 or 1, (N, height, width)."""
    if not segmentations:
        return np.zeros((0, height, width), dtype=np.uint8)
    encoded = [encode_segmentation(segmentation, height, width) for segmentation in segmentations]
    return np.ascontiguousarray(mask_api.decode(encoded).transpose(2, 0, 1))


def paste_mask(probabilities: np.ndarray, box: Sequence[float], height: int, width: int) -> dict[str, Any]:
    """Put a mask from its box's own grid into an image, as run lengths, touching only the box's pixels.

    The grid's cells fill the box; a pixel takes the bilinear interpolation of the cell centres at its own centre,
    zero beyond the grid, and belongs to the object from 0.5 up. Pasting into whole images instead costs ten times as
    much on COCO.

    Args:
        probabilities: (M, M).
        box: xyxy in pixels of the image; fractions count.
        height: of the image.
        width: of the image.

    Returns:
        pycocotools' compressed run lengths, {"counts": bytes, "size": [height, width]}.
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    left, right = _pixel_range(x0, x1, width)
    top, bottom = _pixel_range(y0, y1, height)
    if left >= right or top >= bottom:
        return mask_api.frPyObjects({"counts": [height * width], "size": [height, width]}, height, width)
    rows = _interpolation(probabilities.shape[0], y0, y1, top, bottom)
    columns = _interpolation(probabilities.shape[1], x0, x1, left, right)
    patch = rows @ probabilities.astype(np.float32) @ columns.T >= 0.5
    return _encode_patch(patch, top, left, height, width)


def _pixel_range(start: float, stop: float, length: int) -> tuple[int, int]:
    """Return the first and behind-the-last pixel that an interval touches, within 0..length."""
    return max(0, int(np.floor(start))), min(length, int(np.ceil(stop)))


def _interpolation(cells: int, start: float, stop: float, first: int, last: int) -> np.ndarray:
    """Return weights (last - first, cells) of linear interpolation at those pixels' centres; the cells fill start..stop."""
    centres = (np.arange(first, last) + 0.5 - start) * (cells / max(stop - start, 1e-6)) - 0.5
    distance = np.abs(centres[:, None] - np.arange(cells)[None])
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)


def _encode_patch(patch: np.ndarray, top: int, left: int, height: int, width: int) -> dict[str, Any]:
    """Return the run lengths of an image that is zero outside a boolean patch: only the patch's columns are looked at."""
    columns = np.zeros((patch.shape[1], height), dtype=bool)
    columns[:, top : top + patch.shape[0]] = patch.T
    flat = np.concatenate([[False], columns.ravel(), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + left * height
    counts = np.diff(np.concatenate([[0], changes, [height * width]]))
    return mask_api.frPyObjects({"counts": counts.tolist(), "size": [height, width]}, height, width)
