"""Heads of the released Mask2Former checkpoints, under our own names.

Those files (Mask2Former's model zoo, written by detectron2) hold `backbone.*` and `sem_seg_head.*`. What follows `sem_seg_head.` are
our names but for two things: the norms of the backbone's outputs, `backbone.norm0` to `norm3`, are parts of the head here
(`level_norms`), and early files call the first content of the queries `static_query`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from permafrost.heads.errors import HeadError

PREFIX = "sem_seg_head."
_MARKS = (f"{PREFIX}pixel_decoder.mask_features.weight", f"{PREFIX}predictor.class_embed.weight")
_NORM = re.compile(r"backbone\.norm(\d)\.(weight|bias)")


def is_released(names: Iterable[str]) -> bool:
    """Whether a checkpoint's names are those of a Mask2Former."""
    return set(_MARKS) <= set(names)


def from_released(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """A released head's tensors under our names, in the file's dtype, and its number of classes K.

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
