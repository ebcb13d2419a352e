"""Read detection data in COCO's layout: any JSON of instances with its folder of images.

    root/annotations/instances_train2017.json    root/train2017/*.jpg
    root/annotations/instances_val2017.json      root/val2017/*.jpg

Names and places are fields of CocoDataConfig; classes are read from the JSON. Nothing under the root is ever written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from permafrost.data.detection.annotations import CocoFile, load_coco_file
from permafrost.data.detection.config import CocoDataConfig, MultiScaleConfig
from permafrost.data.detection.copy_paste import paste
from permafrost.data.detection.drawing import draw_detections
from permafrost.data.detection.evaluator import STATISTICS, CocoEvaluator
from permafrost.data.detection.masks import decode_masks
from permafrost.data.detection.semantic import INSTANCES, SemanticMaps
from permafrost.data.detection.transforms import FitTransform, JitterTransform, MultiScaleTransform, NetworkInput, Scene
from permafrost.data.detection.types import DetectionResult, DetectionTarget, DetectionView
from permafrost.data.errors import DataError
from permafrost.data.findings import Finding, raise_fatal
from permafrost.data.pictures.read import ImageError, image_of, read_image
from permafrost.data.stream.records import Listing, PackedRecords, ReplacementTracker, choose_share
from permafrost.data.task import Split, TaskDataset
from permafrost.data.types import Sample, SampleKey

LAYOUT = """expected COCO's layout (every name is a field of `data`):
  ROOT/{train_annotations}   ROOT/{train_images}/*.jpg
  ROOT/{val_annotations}   ROOT/{val_images}/*.jpg
  ROOT/{test_annotations}   ROOT/{test_images}/*.jpg   (for submission files only)"""
MIN_SCORE = 0.5
"""Least score of an object that is drawn."""


class CocoDetection(TaskDataset):
    """Images with boxes, labels and masks, ready for the network.

    Every annotation is checked at construction. In evaluation an index is one view of one image, an image's views following one
    another. In training an image file that cannot be decoded is replaced by the
    next readable one, and says so in `Sample.replaced`; in evaluation it is an error.

    Args:
        config: with files behind it.
        split: "train" augments; "val" and "test" resize, in the views of `evaluation`.
        submission: of "test", of which only images and categories are read: what the server's files are named after.

    Attributes:
        fingerprint: hash of the annotation file and of the list of images used.
        image_ids: of the images used, in the order of the indices.
        num_views: of each image, in evaluation; 1 in training.
        max_batch: views of one size that follow one another, where there are several.

    Raises:
        DataError: a file is missing or malformed; says which, where inside of it, and what was expected; of a missing root or folder
            the layout that is expected.
    """

    headline = "bbox/AP"

    def __init__(self, config: CocoDataConfig, split: Split, *, submission: Path | None = None) -> None:
        annotations, self.image_folder = locate(config, split)
        self.config, self.annotation_file, self.submission = config, annotations, submission
        self.is_train = split == "train"
        self.views = [(None, False)] if self.is_train else config.evaluation.views()
        self.num_views = len(self.views)
        if self.num_views > 1:
            self.max_batch = 2 if config.evaluation.flip else 1
        self.transforms = make_transforms(config, self.is_train)
        self.copy_paste = config.copy_paste if self.is_train else 0.0
        self.semantic = semantic_maps(config) if self.is_train else None
        self.notes: list[str] = []
        coco_file = load_coco_file(annotations, labelled=submission is None)
        dropped = refuse_or_drop(coco_file.findings, config.bad_annotations)
        records = group_by_image(coco_file, dropped)
        raise_fatal(missing_images(records, self.image_folder))
        if dropped:
            first = next(finding for finding in coco_file.findings if finding.annotation in dropped)
            self.notes.append(f"{len(dropped)} annotations are left out as unusable, the first: {first}")
        records = self._training_records(records) if self.is_train else records
        if split == "val":
            records = records[: config.max_val_images]
        has_object = any(not entry["iscrowd"] for record in records for entry in record["annotations"])
        if submission is None and not has_object:
            raise DataError(
                f"{annotations}: not one object in {len(records)} images: there is nothing to learn or to score"
            )
        self.classes = [category["name"] for category in coco_file.categories]
        self.category_ids = [category["id"] for category in coco_file.categories]
        listing = "\n".join(f"{record['id']} {record['file_name']}" for record in records)
        self.fingerprint = hashlib.sha256(f"{coco_file.digest}\n{listing}".encode()).hexdigest()
        self.image_ids = [record["id"] for record in records]
        self.selection = self.image_ids if self.is_train and config.train_share < 1 else None
        self.records = PackedRecords(records)
        if self.semantic is not None:
            self._check_semantic(self.semantic, records)

    def _training_records(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the share of the images that is trained on, without those that hold no object unless they are wanted."""
        config, name = self.config, self.annotation_file.name
        if config.train_share < 1:
            num_images, share, seed = len(records), config.train_share, config.train_share_seed
            chosen = choose_share((record["id"] for record in records), share, seed)
            records = [record for record in records if record["id"] in chosen]
            self.notes.append(
                f"{len(records)} of {num_images} images of {name} are used: a share of {share} by seed {seed}"
            )
        if not config.train_empty_images:
            filled = [record for record in records if any(not entry["iscrowd"] for entry in record["annotations"])]
            if empty := len(records) - len(filled):
                self.notes.append(f"{empty} of {len(records)} images of {name} hold no object and are left out")
            records = filled
        return records

    def __len__(self) -> int:
        return len(self.records) * self.num_views

    @property
    def groups(self) -> list[int]:  # type: ignore[override]  # computed, not set
        """Return how many indices in a row are views of one image."""
        return [self.num_views] * len(self.records)

    def _check_semantic(self, semantic: SemanticMaps, records: Sequence[dict[str, Any]]) -> None:
        """Raise where an image has no map; whether its values fit shows when it is read, or in `permafrost check-data`."""
        if semantic.folder is None:
            if semantic.num_classes != len(self.classes) + 1:
                raise DataError(
                    f"data.semantic_classes is {semantic.num_classes}: painted from instances, maps have "
                    f"{len(self.classes)} classes and the background: set it to {len(self.classes) + 1}"
                )
            return
        names = [{"file_name": str(Path(record["file_name"]).with_suffix(".png"))} for record in records]
        raise_fatal(missing_images(names, semantic.folder))

    def image_path(self, index: int) -> Path:
        """Return the file of one image."""
        return self.image_folder / self.records[index // self.num_views]["file_name"]

    def __getitem__(self, key: SampleKey) -> Sample:
        """Load, transform and annotate one image.

        Raises:
            DataError: in evaluation, the image cannot be read; in training, neither can a long row of its neighbours.
        """
        replaced: list[tuple[str, str]] = []
        image_number, number = divmod(key.index, self.num_views)
        view = DetectionView(number, self.num_views, self.views[number][1]) if self.num_views > 1 else None
        for step in range(min(len(self.records), 1000)):
            record = self.records[(image_number + step) % len(self.records)]
            path = self.image_folder / record["file_name"]
            try:
                image = read_image(path, (record["height"], record["width"]))
                # Its semantic map may be unreadable, too, without which the image is of no use.
                scene, labels = self._transformed(image, record, key.generator("augment"), number)
            except ImageError as error:
                if not self.is_train:
                    raise DataError(f"{path}: {error}; evaluation needs every image") from error
                replaced.append((str(path), str(error)))
                continue
            scene, labels = self._pasted(scene, labels, key, replaced)
            return Sample(scene.image, to_target(scene, labels, record, view), key, replaced)
        raise DataError(
            f"{replaced[0][0]}: {replaced[0][1]}; and none of the {len(replaced) - 1} images after it can be read"
        )

    def _transformed(
        self, image: torch.Tensor, record: dict, generator: torch.Generator, view: int = 0
    ) -> tuple[NetworkInput, torch.Tensor]:
        """Return the scene as the network sees it, and the (N,) int64 labels of its objects."""
        height, width = record["height"], record["width"]
        objects = [entry for entry in record["annotations"] if not entry["iscrowd"]]
        crowds = [entry["bbox"] for entry in record["annotations"] if entry["iscrowd"]]
        masks = torch.from_numpy(decode_masks([entry["segmentation"] for entry in objects], height, width))
        labels = [entry["label"] for entry in objects]
        crowd_boxes = torch.tensor(crowds, dtype=torch.float32).reshape(-1, 4)
        crowd_boxes[:, 2:] += crowd_boxes[:, :2]
        semantic = None if self.semantic is None else self.semantic.load(record, masks, labels)
        result = self.transforms[view](Scene(image, masks, crowd_boxes, semantic), generator)
        return result, torch.tensor(labels, dtype=torch.int64)[result.kept]

    def _pasted(
        self, scene: NetworkInput, labels: torch.Tensor, key: SampleKey, replaced: list[tuple[str, str]]
    ) -> tuple[NetworkInput, torch.Tensor]:
        """Return, with the configured probability, the scene with objects of another image on top."""
        if not self.copy_paste:
            return scene, labels
        generator = key.generator("paste")
        draw, which = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        if draw >= self.copy_paste:
            return scene, labels
        record = self.records[int(which * len(self))]
        try:
            image = read_image(self.image_folder / record["file_name"], (record["height"], record["width"]))
            above, above_labels = self._transformed(image, record, key.generator("augment pasted"))
        except ImageError as error:
            replaced.append((str(self.image_folder / record["file_name"]), str(error)))
            return scene, labels
        return paste(scene, labels, above, above_labels, generator, min_box_side=self.config.jitter.min_box_side)

    def evaluator(self) -> CocoEvaluator:
        submission = None if self.submission is None else (self.annotation_file, self.submission)
        return CocoEvaluator(list(self.records), self.classes, self.category_ids, self.config.evaluation, submission)

    def tracker(self) -> ReplacementTracker:
        return ReplacementTracker(len(self), self.config.corrupt_share)

    def metric_names(self) -> list[str]:
        """Return the names of COCOeval's numbers and of each class, for boxes and masks."""
        labels = [f"AP-{name}" for name in self.classes]
        return [f"{kind}/{name}" for kind in ("bbox", "segm") for name in (*STATISTICS, *labels)]

    def summary(self, metrics: dict[str, float]) -> str:
        """Return the two APs."""
        return ", ".join(f"{tag} {metrics[tag]:.3f}" for tag in ("bbox/AP", "segm/AP") if tag in metrics)

    def caption(self, target: DetectionTarget) -> str:
        """Say which image it is, and how many objects it shows."""
        return f"image {target.image_id}, {len(target.boxes)} objects"

    def draw(self, image: torch.Tensor, shown: DetectionTarget | DetectionResult) -> np.ndarray:
        """Draw the objects on the image; of a result those with a score from MIN_SCORE up."""
        scores = shown.scores if isinstance(shown, DetectionResult) else None
        return draw_detections(image, shown.boxes, shown.labels, shown.masks, scores, self.classes, min_score=MIN_SCORE)


def locate(config: CocoDataConfig, split: str) -> tuple[Path, Path]:
    """Return the annotation file and the image folder of a split, which are there.

    Raises:
        DataError: one is not; says the layout that is expected.
    """
    annotations, images = config.paths(split)
    layout = LAYOUT.format(**vars(config))
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise DataError(f"data.root is {str(config.root)!r}: there is no such folder; {layout}")
    if not annotations.is_file():
        raise DataError(f"{annotations}: there is no such annotation file; {layout}")
    if not images.is_dir():
        raise DataError(f"{images}: there is no such folder of images; {layout}")
    return annotations, images


def refuse_or_drop(findings: Sequence[Finding], bad_annotations: str) -> set[int]:
    """Raise for fatal findings; under "drop" the positions of the annotations to leave out are returned instead.

    Raises:
        DataError: findings that are fatal under this policy.
    """
    curable = {finding.annotation for finding in findings if finding.fatal and finding.annotation is not None}
    if bad_annotations == "drop":
        raise_fatal([finding for finding in findings if finding.annotation is None])
        return curable
    remedy = "Repair the file, or leave such annotations out with data.bad_annotations drop" if curable else ""
    raise_fatal(findings, remedy)
    return set()


def group_by_image(coco_file: CocoFile, dropped: set[int]) -> list[dict[str, Any]]:
    """Return one record per image, by id, with labels 0..K-1 instead of category ids; annotations stay in the file's order."""
    labels = coco_file.labels
    records = {
        image["id"]: {**{name: image[name] for name in ("id", "file_name", "height", "width")}, "annotations": []}
        for image in sorted(coco_file.images, key=lambda image: image["id"])
    }
    for position, entry in enumerate(coco_file.annotations):
        if position in dropped:
            continue
        record = {name: entry[name] for name in ("bbox", "segmentation")}
        record.update(label=labels[entry["category_id"]], iscrowd=int(entry.get("iscrowd", 0)), area=entry.get("area"))
        records[entry["image_id"]]["annotations"].append(record)
    return list(records.values())


def missing_images(records: Sequence[dict[str, Any]], folder: Path) -> list[Finding]:
    """Return findings for images without a file."""
    listing, paths = Listing(), [os.path.join(folder, record["file_name"]) for record in records]
    return [Finding(path, "there is no such image file") for path in paths if not listing.has(path)]


def make_transforms(config: CocoDataConfig, train: bool) -> list[JitterTransform | MultiScaleTransform | FitTransform]:
    """Return what turns scenes into the network's input: the augmentation, or the resizing of each view in evaluation."""
    size, jitter, evaluation = config.image_size, config.jitter, config.evaluation
    if not train:
        return [FitTransform(size, evaluation, size=side, is_flipped=flip) for side, flip in evaluation.views()]
    return [MultiScaleTransform(jitter) if isinstance(jitter, MultiScaleConfig) else JitterTransform(size, jitter)]


def semantic_maps(config: CocoDataConfig) -> SemanticMaps | None:
    """Return where a configuration's semantic maps are; None where it asks for none."""
    if not config.semantic:
        return None
    folder = None if config.semantic == INSTANCES else Path(config.root).expanduser() / config.semantic
    if folder is not None and not folder.is_dir():
        raise DataError(
            f"data.semantic is {config.semantic!r}: there is no folder {folder}; give one of PNGs named as the training "
            f'images, under data.root, or "{INSTANCES}" to paint the annotated objects'
        )
    return SemanticMaps(folder, config.semantic_classes)


def to_target(
    scene: NetworkInput, labels: torch.Tensor, record: dict[str, Any], view: DetectionView | None = None
) -> DetectionTarget:
    """Return what is known about a scene: its objects, labels and maps, the image's id and size on disk."""
    return DetectionTarget(
        image_id=record["id"],
        boxes=scene.boxes,
        labels=labels,
        masks=scene.masks,
        ignore_boxes=scene.ignore_boxes,
        size=scene.size,
        original_size=(record["height"], record["width"]),
        semantic=scene.semantic,
        view=view,
    )


def inference_sample(source: Any, image_size: int, image_id: int = 0, transform: FitTransform | None = None) -> Sample:
    """Return an image without annotations, resized as in evaluation: into the square, unless a transform is given.

    Args:
        source: a path, or what `pictures.read.to_pixels` takes.
        image_size: side of the square, pixels.
        image_id: what its results are listed under.
        transform: what resizes and pads it.

    Raises:
        DataError: it cannot be read.
    """
    image = image_of(source)
    height, width = image.shape[-2:]
    scene = Scene(image, torch.zeros((0, height, width), dtype=torch.uint8), torch.zeros((0, 4)))
    result = (transform or FitTransform(image_size))(scene)
    record = {"id": image_id, "height": height, "width": width}
    target = to_target(result, torch.zeros(0, dtype=torch.int64), record)
    return Sample(result.image, target, SampleKey(0, 0, image_id))
