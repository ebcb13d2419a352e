"""Read heads from files that others released, whatever their task: each task's `released` knows its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from permafrost.heads.base import ReleasedHead
from permafrost.heads.detection import released as detection
from permafrost.heads.segmentation import released as segmentation

KNOWN = "a released detector (neck.*, rpn_head.*, roi_head.*) or Mask2Former (sem_seg_head.*)"
"""The heads that are read here, by the names of their tensors."""
FILES = "the .pth of Mask R-CNN or Cascade Mask R-CNN of the Swin papers' detection code, or the .pkl of Mask2Former's model zoo"


def read_released(tensors: Mapping[str, Tensor], *, checkpoint: Any, file: str) -> ReleasedHead | None:
    """Return the head of a released network under our names; None if it is none of KNOWN.

    Args:
        tensors: all of the file.
        checkpoint: what the file holds, tensors and anything beside them.
        file: its name.

    Raises:
        HeadError: a network of a known kind whose head differs from ours.
    """
    for kind in (detection, segmentation):
        if kind.is_released(tensors):
            return kind.read(tensors, checkpoint=checkpoint, file=file)
    return None
