"""Read maps of the class of every pixel, such as COCO-stuff's, which lie beside the images of a data set in COCO's layout.

COCO-stuff's pixel maps (stuffthingmaps/train2017/<image>.png) hold 0..181, things and stuff, and 255 where nobody labelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from permafrost.data.pictures.geometry import NO_CLASS
from permafrost.data.pictures.read import ImageError, open_image

INSTANCES = "instances"


class SemanticMaps:
    """Source of the maps of a data set: a folder of PNGs, or the annotated objects.

    Args:
        folder: of PNGs with the images' names; None paints the annotated objects.
        num_classes: values 0..num_classes-1 and NO_CLASS are allowed.
    """

    def __init__(self, folder: Path | None, num_classes: int) -> None:
        self.folder = folder
        self.num_classes = num_classes

    def path(self, file_name: str) -> Path | None:
        """Return the path of the map of an image file, or None where the map is painted."""
        return None if self.folder is None else (self.folder / file_name).with_suffix(".png")

    def load(self, record: dict[str, Any], masks: Tensor, labels: Sequence[int]) -> Tensor:
        """Read or paint the (H, W) uint8 map of one image.

        Args:
            record: of the image; its file_name, height and width.
            masks: (N, H, W) uint8 of its objects.
            labels: N of 0..K-1; later objects are painted over earlier ones, all over the background, whose class is
                num_classes - 1.

        Raises:
            ImageError: the file is missing or damaged, of another size, or holds other values.
        """
        path = self.path(record["file_name"])
        if path is None:
            painted = torch.full((record["height"], record["width"]), self.num_classes - 1, dtype=torch.uint8)
            for mask, label in zip(masks, labels):
                painted[mask.bool()] = label
            return painted
        return torch.from_numpy(read_map(path, (record["height"], record["width"]), self.num_classes))


def read_map(path: Path, size: tuple[int, int], num_classes: int) -> np.ndarray:
    """Read the (H, W) uint8 class of every pixel from a PNG of one channel, gray or palette.

    Raises:
        ImageError: there is none, or it is of another size or holds other values.
    """
    try:
        with open_image(path) as image:
            if image.mode not in ("L", "P"):
                raise ImageError(f"the semantic map is of mode {image.mode}, expected one channel of 8 bits")
            if (image.height, image.width) != tuple(size):
                raise ImageError(
                    f"the semantic map is {image.width} x {image.height}, the annotations say {size[1]} x {size[0]}"
                )
            values = np.array(image, dtype=np.uint8)
    except FileNotFoundError as error:
        raise ImageError("there is no such semantic map") from error
    except ImageError:
        raise
    except Exception as error:
        # PIL's plug-ins raise errors of many kinds on damaged files.
        raise ImageError(f"the semantic map cannot be read: {type(error).__name__}: {error}") from error
    known = values[values != NO_CLASS]
    if known.size and known.max() >= num_classes:
        raise ImageError(
            f"the semantic map holds {known.max()}: data.semantic_classes allows 0..{num_classes - 1} and {NO_CLASS}"
        )
    return values
