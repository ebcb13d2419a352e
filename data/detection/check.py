"""Find everything that is wrong with a data set before a run; `permafrost check-data` prints it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from permafrost.data.detection.annotations import CocoFile, load_coco_file
from permafrost.data.detection.config import CocoDataConfig
from permafrost.data.detection.dataset import locate, semantic_maps
from permafrost.data.detection.semantic import SemanticMaps, read_map
from permafrost.data.errors import DataError
from permafrost.data.findings import Finding, inspect_all
from permafrost.data.pictures.read import ImageError, read_image
from permafrost.data.task import Progress


def check_coco(config: CocoDataConfig, *, decode: bool = True, on_progress: Progress | None = None) -> list[Finding]:
    """Check files, JSON entries and every image of both splits; arguments as of `data.build.check_data`, with files in place.

    Returns:
        findings in the order of the files. Training and evaluation refuse to start with the fatal ones; an unreadable
        training image is replaced while training, so it is fatal only in the validation split.
    """
    findings: list[Finding] = []
    for split in ("train", "val"):
        try:
            annotations, folder = locate(config, split)
            coco_file = load_coco_file(annotations)
        except DataError as error:
            findings.append(Finding(str(config.paths(split)[0]), str(error)))
            continue
        droppable = config.bad_annotations == "drop"
        for finding in coco_file.findings:
            forgiven = droppable and finding.annotation is not None
            findings.append(replace(finding, fatal=finding.fatal and not forgiven))
        limit = config.max_val_images if split == "val" else None
        findings.extend(_check_images(coco_file, folder, split == "val", limit, decode, on_progress))
        try:
            maps = semantic_maps(config) if split == "train" else None
        except DataError as error:
            findings.append(Finding("data.semantic", str(error)))
            continue
        if maps is not None and maps.folder is not None:
            findings.extend(_check_maps(coco_file, maps, decode))
    return findings


def _check_maps(coco_file: CocoFile, maps: SemanticMaps, decode: bool) -> list[Finding]:
    """Return findings about the semantic maps of the training images; a damaged one costs its image, a missing one the run."""
    found = []
    for image in coco_file.images:
        name, height, width = image.get("file_name"), image.get("height"), image.get("width")
        if not isinstance(name, str) or not name or not isinstance(height, int) or not isinstance(width, int):
            continue
        path = maps.path(name)
        assert path is not None
        if not path.is_file():
            found.append(Finding(str(path), "there is no such semantic map"))
        elif decode:
            try:
                read_map(path, (height, width), maps.num_classes)
            except ImageError as error:
                found.append(Finding(str(path), str(error), fatal=False))
    return found


def _check_images(
    coco_file: CocoFile,
    folder: Path,
    needs_all: bool,
    limit: int | None,
    decode: bool,
    on_progress: Progress | None,
) -> list[Finding]:
    """Return findings about the image files of one split."""
    images = [image for image in coco_file.images if isinstance(image.get("file_name"), str) and image["file_name"]]
    if limit is not None and all(isinstance(image.get("id"), int) for image in images):
        images = sorted(images, key=lambda image: image["id"])[:limit]

    def problems(image: dict) -> list[Finding]:
        path = folder / image["file_name"]
        if not path.is_file():
            return [Finding(str(path), "there is no such image file")]
        if not decode:
            return []
        height, width = image.get("height"), image.get("width")
        try:
            read_image(path, (height, width) if isinstance(height, int) and isinstance(width, int) else None)
        except ImageError as error:
            return [Finding(str(path), str(error), fatal=needs_all)]
        return []

    return inspect_all(images, problems, on_progress)
