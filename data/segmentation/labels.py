"""Read PNGs of labels: 0 is ignore, 1 to K are the classes. In memory classes are 0 to K - 1, and NO_CLASS is ignore.

A label that is no class would, unseen, index beyond a table on the device, or be learnt as a class that does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from permafrost.data.pictures.geometry import NO_CLASS
from permafrost.data.pictures.read import ImageError, open_image, size_problem

PALETTE = "label PNGs with a palette"
SIXTEEN_BIT = "label PNGs of 16 bits"
MODE = "label PNGs of several channels"
OUTSIDE = "labels outside the classes"
SIZE = "label PNGs of another size than their photo"
ALL_IGNORED = "images without any label"
UNREADABLE = "unreadable label PNGs"


class LabelError(ImageError):
    """A label PNG cannot be used; `kind` says what it has in common with others.

    Attributes:
        kind: one of this module's names.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass
class Labels:
    """The content of a label PNG.

    Attributes:
        classes: (H, W) uint8, 0..K-1 or NO_CLASS.
        notes: (kind, text) of what is unusual about it, though usable.
    """

    classes: np.ndarray
    notes: list[tuple[str, str]]


def read_labels(path: Path, size: tuple[int, int] | None, num_classes: int) -> Labels:
    """Read a label PNG.

    Written as 8-bit gray, as ADE20K's are. A palette's indices and 16-bit values are taken as they stand where they are labels;
    a gray palette whose tones are not its indices is refused, because either could be meant.

    Args:
        path: the file.
        size: (height, width) of the photo; None takes any.
        num_classes: K.

    Raises:
        LabelError: missing, damaged, of another size, or with values that are no labels.
    """
    try:
        with open_image(path) as image:
            if size is not None and (image.height, image.width) != tuple(size):
                raise LabelError(
                    SIZE, f"the labels are {image.width} x {image.height}, their photo is {size[1]} x {size[0]}"
                )
            if problem := size_problem(image.width, image.height):
                raise LabelError(UNREADABLE, problem)
            notes = _check_mode(image)
            values = np.array(image)
    except FileNotFoundError as error:
        raise LabelError(UNREADABLE, "there is no such file of labels") from error
    except ImageError:
        raise
    except Exception as error:
        # PIL's plug-ins raise errors of many kinds on damaged files.
        raise LabelError(UNREADABLE, f"the labels cannot be read: {type(error).__name__}: {error}") from error
    if values.min() < 0 or values.max() > num_classes:
        found, counts = np.unique(values[(values < 0) | (values > num_classes)], return_counts=True)
        shown = ", ".join(f"{value} ({count} pixels)" for value, count in list(zip(found, counts))[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        hint = ""
        if NO_CLASS in found:
            hint = "; in annotations that were converted for other programs 255 is ignore, and classes count from 0"
        raise LabelError(OUTSIDE, f"labels {shown}{more} are not in 0..{num_classes}{hint}")
    # 0 wraps around to 255.
    classes = values.astype(np.uint8) - np.uint8(1)
    if not values.any():
        notes.append((ALL_IGNORED, "all pixels are 0 (ignore): nothing is learnt from it, nothing scored"))
    return Labels(classes, notes)


def _check_mode(image: Image.Image) -> list[tuple[str, str]]:
    """Check an image's kind of pixels; return what is to be said about it, as (kind, sentence).

    Raises:
        LabelError: they are no labels.
    """
    if image.mode == "L":
        return []
    if image.mode == "P":
        used = np.unique(np.array(image))
        palette = np.zeros((256, 3), dtype=np.uint8)
        given = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)[:256]
        palette[: len(given)] = given
        tones = palette[used]
        is_gray = bool((tones == tones[:, :1]).all())
        if is_gray and not np.array_equal(tones[:, 0], used):
            raise LabelError(
                PALETTE,
                "it has a gray palette whose tones are not its indices, so either could be the labels: save it as 8-bit gray",
            )
        return [(PALETTE, "it has a palette: its indices are taken as the labels")]
    if image.mode.startswith("I"):
        return [(SIXTEEN_BIT, "it has 16 bits a pixel: its values are taken as the labels")]
    hint = ""
    if image.mode in ("RGB", "RGBA"):
        hint = "; colours in place of labels are what the full release of ADE20K has, or a picture for people"
    raise LabelError(MODE, f"it is of mode {image.mode}, expected one channel of 8 bits{hint}")
