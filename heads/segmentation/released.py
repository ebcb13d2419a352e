"""Read heads of the released Mask2Former checkpoints, under our own names.

Those files (Mask2Former's model zoo, written by detectron2) hold `backbone.*` and `sem_seg_head.*`. What follows `sem_seg_head.` are
our names but for two things: the norms of the backbone's outputs, `backbone.norm0` to `norm3`, are parts of the head here
(`level_norms`), and early files call the first content of the queries `static_query`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from permafrost.data.segmentation.classes import ADE20K_CLASSES
from permafrost.heads.base import ReleasedHead
from permafrost.heads.errors import HeadError

PREFIX = "sem_seg_head."
_MARKS = (f"{PREFIX}pixel_decoder.mask_features.weight", f"{PREFIX}predictor.class_embed.weight")
_NORM = re.compile(r"backbone\.norm(\d)\.(weight|bias)")


def is_released(names: Iterable[str]) -> bool:
    """Return whether a checkpoint's names are those of a Mask2Former."""
    return set(_MARKS) <= set(names)


def read(tensors: Mapping[str, Tensor], *, checkpoint: Any, file: str) -> ReleasedHead:
    """Return a released Mask2Former's head; its classes are ADE20K's if there are 150, since no file says; see heads.released."""
    found, num_classes = from_released(tensors)
    if num_classes != len(ADE20K_CLASSES):
        return ReleasedHead.of_unknown_classes(found, num_classes, file, [])
    return ReleasedHead(found, list(ADE20K_CLASSES), ["its classes are taken for ADE20K's 150, in their order"])


def from_released(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Return a released head's tensors under our names, in the file's dtype, and its number of classes K.

    Raises:
        HeadError: two names become one, or the classifier is no matrix of a row for each class and one for none.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _NORM.fullmatch(name):
            own = f"level_norms.{match[1]}.{match[2]}"
        elif name.startswith(PREFIX):
            own = name.removeprefix(PREFIX).replace("predictor.static_query.", "predictor.query_feat.")
        else:
            continue
        if own in found:
            raise HeadError(f"the checkpoint holds {own} twice, once as {name}")
        found[own] = tensor
    classifier = found["predictor.class_embed.weight"]
    if classifier.ndim != 2 or len(classifier) < 2:
        raise HeadError(f"{_MARKS[1]} has the shape {tuple(classifier.shape)}, expected (K + 1, C)")
    return found, len(classifier) - 1
