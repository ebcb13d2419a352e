"""The libraries that compute COCO's average precision, chosen by name: pycocotools, and a faster one with the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from permafrost.data.errors import DataError


@dataclass(frozen=True)
class Scorer:
    """A library's two classes, which are called as pycocotools' are.

    Attributes:
        coco: its COCO.
        evaluation: its COCOeval; the first twelve numbers of `stats` are COCO's.
    """

    coco: Any
    evaluation: Any


def find_scorer(name: str) -> Scorer:
    """Return the library of that name.

    Raises:
        DataError: it is not installed.
    """
    if name == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return Scorer(COCO, COCOeval)
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise DataError(
            f"data.evaluation.scorer is {name!r}, which cannot be imported ({error}): pip install 'permafrost[fast-eval]', or "
            "leave it at pycocotools"
        ) from None
    return Scorer(COCO, COCOeval_faster)
