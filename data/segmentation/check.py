"""Find everything that is wrong with a segmentation data set before a run."""

from __future__ import annotations

from pathlib import Path

from permafrost.data.errors import DataError
from permafrost.data.findings import Finding, inspect_all
from permafrost.data.pictures.read import ImageError, read_image
from permafrost.data.segmentation.classes import read_classes
from permafrost.data.segmentation.config import ADE20KDataConfig
from permafrost.data.segmentation.dataset import find_pairs, locate
from permafrost.data.segmentation.labels import LabelError, read_labels
from permafrost.data.task import Progress

UNREADABLE_PHOTO = "unreadable photos"


def check_ade20k(
    config: ADE20KDataConfig, *, decode: bool = True, on_progress: Progress | None = None
) -> list[Finding]:
    """Check folders, pairs, and every photo with its labels; arguments as of `data.build.check_data`, with files in place.

    Returns:
        findings, each with its kind. Training and evaluation refuse to start with pairs that are incomplete; a pair that cannot be
        used is replaced while training, so it is fatal only in the validation split.
    """
    try:
        num_classes = len(read_classes(Path(config.root).expanduser() / config.class_info))
    except DataError as error:
        return [Finding(config.root, str(error))]
    findings: list[Finding] = []
    for split in ("train", "val"):
        try:
            pairs, missing = find_pairs(*locate(config, split))
        except DataError as error:
            findings.append(Finding(str(config.paths(split)[0]), str(error)))
            continue
        findings.extend(missing)
        if decode:
            findings.extend(_check_pairs(pairs, num_classes, split == "val", on_progress))
    return findings


def _check_pairs(
    pairs: list[tuple[Path, Path]], num_classes: int, needs_all: bool, on_progress: Progress | None
) -> list[Finding]:
    def problems(pair: tuple[Path, Path]) -> list[Finding]:
        photo, labels = pair
        try:
            image = read_image(photo)
        except ImageError as error:
            return [Finding(str(photo), str(error), fatal=needs_all, kind=UNREADABLE_PHOTO)]
        try:
            notes = read_labels(labels, (image.shape[-2], image.shape[-1]), num_classes).notes
        except LabelError as error:
            return [Finding(str(labels), str(error), fatal=needs_all, kind=error.kind)]
        return [Finding(str(labels), text, fatal=False, kind=kind) for kind, text in notes]

    return inspect_all(pairs, problems, on_progress)
