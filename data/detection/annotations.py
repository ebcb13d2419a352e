"""Read COCO JSON files: check every entry, naming its JSON path, and decode segmentations.

pycocotools takes broken files without a word: an annotation of an unknown image or category vanishes, a polygon of
two points is read as a box, a run-length mask of another size shifts every pixel. Everything here is checked before
it reaches pycocotools.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from permafrost.data.detection.masks import decompress_counts
from permafrost.data.errors import DataError
from permafrost.data.findings import Finding
from permafrost.data.pictures.read import size_problem

BOX_OVERHANG = 2.0
"""Pixels by which a box may stick out of its image (rounding of drawing tools) before it counts as out of the image."""


@dataclass
class CocoFile:
    """The content of one annotation file.

    Attributes:
        path: the file.
        digest: sha256 of its bytes, hex.
        images: as in the file.
        annotations: as in the file.
        categories: sorted by id; the position is the label 0..K-1.
        findings: everything wrong with it.
    """

    path: Path
    digest: str
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    findings: list[Finding] = field(default_factory=list)

    @property
    def labels(self) -> dict[int, int]:
        """Return the label of each category id."""
        return {category["id"]: label for label, category in enumerate(self.categories)}


def load_coco_file(path: Path, *, labelled: bool = True) -> CocoFile:
    """Read and check an annotation file; findings are collected, not raised.

    Args:
        path: the JSON.
        labelled: False for a test set's (image_info_test-dev2017.json): annotations, if there are any, are not looked at.

    Raises:
        DataError: it is missing, not JSON, or not of COCO's overall shape, so that nothing more can be said about it.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such annotation file") from error
    except OSError as error:
        raise DataError(f"{path}: the annotation file cannot be read: {error.strerror or error}") from error
    try:
        content = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); expected COCO annotations") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: the JSON is a {type(content).__name__}, expected an object with images, annotations, categories"
        )
    if not labelled:
        content = {**content, "annotations": []}
    for key in ("images", "annotations", "categories"):
        entries = content.get(key)
        if not isinstance(entries, list):
            found = "is missing" if key not in content else f"is a {type(entries).__name__}"
            raise DataError(f"{path}: {key} {found}, expected a list; is this a COCO instances file?")
        for position, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise DataError(f"{path}: {key}[{position}] is a {type(entry).__name__}, expected an object")
    coco_file = CocoFile(
        path, hashlib.sha256(raw).hexdigest(), content["images"], content["annotations"], content["categories"]
    )
    checker = _Checker(coco_file)
    checker.check()
    coco_file.findings = checker.findings
    if all(_is_int(category.get("id")) for category in coco_file.categories):
        coco_file.categories = sorted(coco_file.categories, key=lambda category: category["id"])
    return coco_file


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Checker:
    """One pass over the entries of a file."""

    def __init__(self, coco_file: CocoFile) -> None:
        self.file = coco_file
        self.findings: list[Finding] = []

    def report(self, where: str, what: str, fatal: bool = True, annotation: int | None = None) -> None:
        self.findings.append(Finding(f"{self.file.path}: {where}", what, fatal, annotation))

    def check(self) -> None:
        categories = self._check_categories()
        sizes = self._check_images()
        seen: dict[int, int] = {}
        for position, entry in enumerate(self.file.annotations):
            self._check_annotation(position, entry, categories, sizes, seen)

    def _check_categories(self) -> set[int]:
        ids: dict[int, int] = {}
        names: dict[str, int] = {}
        if not self.file.categories:
            self.report("categories", "the list is empty: there is nothing to detect")
        for position, category in enumerate(self.file.categories):
            where = f"categories[{position}]"
            category_id, name = category.get("id"), category.get("name")
            if not _is_int(category_id):
                self.report(f"{where}.id", f"{category_id!r} is not an integer")
            elif category_id in ids:
                self.report(f"{where}.id", f"{category_id} is also the id of categories[{ids[category_id]}]")
            else:
                ids[category_id] = position
            if not isinstance(name, str) or not name:
                self.report(f"{where}.name", f"{name!r} is not a name")
            elif name in names:
                self.report(f"{where}.name", f"{name!r} is also the name of categories[{names[name]}]")
            else:
                names[name] = position
        return set(ids)

    def _check_images(self) -> dict[int, tuple[int, int] | None]:
        """Check the images; return their (width, height) by id, None where the file gives no usable size."""
        sizes: dict[int, tuple[int, int] | None] = {}
        if not self.file.images:
            self.report("images", "the list is empty")
        for position, image in enumerate(self.file.images):
            where = f"images[{position}]"
            image_id, name = image.get("id"), image.get("file_name")
            width, height = image.get("width"), image.get("height")
            if not _is_int(image_id):
                self.report(f"{where}.id", f"{image_id!r} is not an integer")
                continue
            if image_id in sizes:
                self.report(f"{where}.id", f"{image_id} is the id of an image before it too")
            sizes[image_id] = None
            if not isinstance(name, str) or not name or "\0" in name:
                self.report(f"{where}.file_name", f"{name!r} is not a file name")
            if not _is_int(width) or not _is_int(height):
                self.report(where, f"width {width!r} and height {height!r} must be integers")
            elif problem := size_problem(width, height):
                self.report(where, problem)
            else:
                sizes[image_id] = (width, height)
        return sizes

    def _check_annotation(self, position: int, entry: dict, categories: set[int], sizes: dict, seen: dict) -> None:
        where = f"annotations[{position}]"
        annotation_id = entry.get("id")
        if not _is_int(annotation_id):
            self.report(f"{where}.id", f"{annotation_id!r} is not an integer")
        elif annotation_id in seen:
            self.report(f"{where}.id", f"{annotation_id} is also the id of annotations[{seen[annotation_id]}]")
        else:
            seen[annotation_id] = position
            if annotation_id == 0:
                # pycocotools takes a match with id 0 for no match. Our evaluator numbers anew; other tools will not.
                self.report(
                    f"{where}.id", "0 is never matched by pycocotools; here it is renumbered in memory", fatal=False
                )
        category_id, image_id = entry.get("category_id"), entry.get("image_id")
        if not _is_int(category_id) or category_id not in categories:
            self.report(f"{where}.category_id", f"{category_id!r} is not among the categories")
        if entry.get("iscrowd", 0) not in (0, 1):
            self.report(f"{where}.iscrowd", f"{entry['iscrowd']!r} is neither 0 nor 1")
        if not _is_int(image_id) or image_id not in sizes:
            self.report(f"{where}.image_id", f"{image_id!r} is not among the images")
            return
        size = sizes[image_id]
        if problem := _box_problem(entry.get("bbox"), size):
            self.report(f"{where}.bbox", problem, annotation=position)
        if problem := _segmentation_problem(entry.get("segmentation"), size):
            self.report(f"{where}.segmentation", problem, annotation=position)
        area = entry.get("area", 0)
        if not _is_number(area) or not math.isfinite(area) or area < 0:
            self.report(f"{where}.area", f"{area!r} is not an area", annotation=position)


def _box_problem(box: Any, size: tuple[int, int] | None) -> str | None:
    """Return what is wrong with `bbox` = [x, y, width, height], or None."""
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        return f"{_short(box)} is not [x, y, width, height]"
    x, y, width, height = box
    if not all(math.isfinite(value) for value in box):
        return f"{box} has a value that is not finite"
    if width <= 0 or height <= 0:
        return f"{box} is degenerate: width and height must be above 0"
    if size is None:
        return None
    slack = BOX_OVERHANG
    if x < -slack or y < -slack or x + width > size[0] + slack or y + height > size[1] + slack:
        return f"{box} lies out of the image of {size[0]} x {size[1]}"
    if x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0:
        return f"{box} has no part in the image of {size[0]} x {size[1]}"
    return None


def _segmentation_problem(segmentation: Any, size: tuple[int, int] | None) -> str | None:
    """Return what is wrong with a segmentation (polygons, or run lengths in either form), or None."""
    if isinstance(segmentation, list):
        if not segmentation:
            return "the list of polygons is empty"
        for position, polygon in enumerate(segmentation):
            if not isinstance(polygon, list) or not all(_is_number(value) for value in polygon):
                return f"polygon {position} is not a list of numbers"
            if len(polygon) < 6 or len(polygon) % 2:
                return f"polygon {position} has {len(polygon)} numbers: at least 3 points as x, y, x, y, ... are needed"
            # A sum is finite exactly when all its terms are, short of an overflow that no pixel coordinate reaches.
            if not math.isfinite(sum(polygon)):
                return f"polygon {position} has a value that is not finite"
            # Far points would have pycocotools walk an edge of any length, in memory.
            if size is not None and (min(polygon) < -max(size) or max(polygon) > 2 * max(size)):
                return f"polygon {position} lies out of the image of {size[0]} x {size[1]}"
        return None
    if not isinstance(segmentation, dict):
        return f"{_short(segmentation)} is neither a list of polygons nor a run-length mask"
    given, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(given, list) or len(given) != 2 or not all(_is_int(value) for value in given):
        return f"size {_short(given)} of the run-length mask is not [height, width]"
    if size is not None and tuple(given) != (size[1], size[0]):
        return f"the run-length mask is {given[1]} x {given[0]}, the image {size[0]} x {size[1]}"
    if isinstance(counts, str):
        try:
            counts = decompress_counts(counts)
        except ValueError as error:
            return f"counts of the run-length mask: {error}"
    elif not isinstance(counts, list) or not all(_is_int(value) for value in counts):
        return "counts of the run-length mask is neither a list of integers nor a string"
    if any(value < 0 for value in counts):
        return "counts of the run-length mask has a negative run"
    if sum(counts) != given[0] * given[1]:
        return f"the runs add up to {sum(counts)} pixels, the mask has {given[0] * given[1]}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
