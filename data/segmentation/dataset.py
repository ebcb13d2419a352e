"""Read semantic segmentation in the layout of ADE20K's SceneParsing release (Zhou et al., CVPR 2017).

    root/images/training/*.jpg      root/annotations/training/*.png      root/objectInfo150.txt
    root/images/validation/*.jpg    root/annotations/validation/*.png

A label PNG has its photo's name and size; 0 is ignore, 1 to 150 are the classes. Names and places are fields of ADE20KDataConfig.
Nothing under the root is ever written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from permafrost.data.errors import DataError
from permafrost.data.findings import Finding, raise_fatal
from permafrost.data.pictures.geometry import NO_CLASS
from permafrost.data.pictures.read import ImageError, open_image, read_image
from permafrost.data.segmentation.classes import read_classes
from permafrost.data.segmentation.config import ADE20KDataConfig
from permafrost.data.segmentation.drawing import draw_classes
from permafrost.data.segmentation.evaluator import NAMES, SegmentationEvaluator
from permafrost.data.segmentation.labels import read_labels
from permafrost.data.segmentation.merging import best_class, class_scores
from permafrost.data.segmentation.transforms import SegmentationJitter
from permafrost.data.segmentation.types import SegmentationResult, SegmentationTarget, SegmentationView
from permafrost.data.segmentation.views import num_whole_views, plan_views, see
from permafrost.data.stream.records import PackedRecords, ReplacementTracker, spread
from permafrost.data.task import Split, TaskDataset
from permafrost.data.types import Sample, SampleKey

LAYOUT = """expected the layout of ADE20K's SceneParsing release (every name is a field of `data`):
  ROOT/{train_images}/*.jpg   ROOT/{train_annotations}/*.png
  ROOT/{val_images}/*.jpg   ROOT/{val_annotations}/*.png"""
PHOTO_SUFFIXES = frozenset((".jpg", ".jpeg", ".png"))
MISSING_LABELS = "photos without labels"
MISSING_PHOTO = "labels without a photo"


class SceneParsing(TaskDataset):
    """Photos with the class of every pixel, ready for the network.

    In training index i is photo i; a pair that cannot be used is replaced by the next usable one, and says so in
    `Sample.replaced`. In evaluation an index is one view of one photo, a photo's views following one another, and an unusable
    pair is an error.

    Args:
        config: with files behind it.
        split: "train" augments; "val" and "test" give the views of `evaluation`; "test" has no labels.
        submission: folder that evaluators write a label PNG of each image to; None writes none.

    Attributes:
        category_ids: labels in the files, 1..K.
        fingerprint: hash of the names of files and classes.

    Raises:
        DataError: the layout is another one, there is no photo, or photos and labels do not pair; says how many.
    """

    headline = "semantic/mIoU"
    groups: Sequence[int]

    def __init__(self, config: ADE20KDataConfig, split: Split, *, submission: Path | None = None) -> None:
        self.config, self.is_train, self.submission = config, split == "train", submission
        pairs = find_test_photos(config) if split == "test" else self._labelled(split)
        if not pairs:
            raise DataError(f"{config.root}: not one {'training' if self.is_train else 'validation'} image")
        self.classes = read_classes(Path(config.root).expanduser() / config.class_info)
        self.category_ids = list(range(1, len(self.classes) + 1))
        self.notes: list[str] = []
        names = "\n".join(f"{photo.name} {labels and labels.name}" for photo, labels in pairs)
        self.fingerprint = hashlib.sha256(f"{names}\n{self.classes}".encode()).hexdigest()
        self.records = PackedRecords([(str(photo), labels and str(labels)) for photo, labels in pairs])
        self.jitter = SegmentationJitter(config.image_size, config.jitter)
        self.groups = [1] * len(pairs) if self.is_train else self._count_views([photo for photo, _ in pairs])
        self._ends = np.cumsum(self.groups)
        # The last photo read for evaluation: its views follow one another.
        self._last: tuple[int, Tensor, Tensor] | None = None

    def _labelled(self, split: str) -> Sequence[tuple[Path, Path]]:
        pairs, findings = find_pairs(*locate(self.config, split))
        raise_fatal(findings, "`permafrost check-data` lists them all")
        return pairs if self.is_train else spread(pairs, self.config.max_val_images)

    def _count_views(self, photos: Sequence[Path]) -> list[int]:
        evaluation = self.config.evaluation
        if evaluation.mode == "whole":
            return [num_whole_views(evaluation)] * len(photos)
        counts = []
        for photo in photos:
            # How many windows there are depends on the photo's size, which its header says.
            try:
                with open_image(photo) as image:
                    size = (image.height, image.width)
            except Exception as error:
                raise DataError(f"{photo}: {error}; evaluation needs every image") from error
            counts.append(len(plan_views(size, self.config.image_size, evaluation)))
        return counts

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def num_images(self) -> int:
        """Return the number of photos, each counted once."""
        return len(self.records)

    def image_path(self, index: int) -> Path:
        """Return the photo of sample `index`."""
        return Path(self.records[self._image_of(index)][0])

    def _image_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def read(self, image_id: int) -> tuple[Tensor, Tensor]:
        """Read a photo (3, H, W) uint8 and classes (H, W) uint8, NO_CLASS where nobody knows.

        Raises:
            ImageError: either cannot be used.
        """
        photo, labels = self.records[image_id]
        image = read_image(Path(photo))
        size = (image.shape[-2], image.shape[-1])
        if labels is None:
            return image, torch.full(size, NO_CLASS, dtype=torch.uint8)
        return image, torch.from_numpy(read_labels(Path(labels), size, len(self.classes)).classes)

    def __getitem__(self, key: SampleKey) -> Sample:
        """Load and transform one photo.

        Raises:
            DataError: in evaluation, the pair cannot be used; in training, neither can a long row of its neighbours.
        """
        return self._training_sample(key) if self.is_train else self._view(key)

    def _training_sample(self, key: SampleKey) -> Sample:
        replaced: list[tuple[str, str]] = []
        for step in range(min(len(self), 1000)):
            image_id = (key.index + step) % len(self)
            try:
                image, labels = self.read(image_id)
            except ImageError as error:
                replaced.append((self.records[image_id][0], str(error)))
                continue
            original = (image.shape[-2], image.shape[-1])
            image, labels, size = self.jitter(image, labels, key.generator("augment"))
            return Sample(image, _target(image_id, labels, size, original), key, replaced)
        raise DataError(
            f"{replaced[0][0]}: {replaced[0][1]}; and none of the {len(replaced) - 1} images after it can be used"
        )

    def _view(self, key: SampleKey) -> Sample:
        image_id = self._image_of(key.index)
        if self._last is None or self._last[0] != image_id:
            try:
                self._last = (image_id, *self.read(image_id))
            except ImageError as error:
                raise DataError(f"{self.records[image_id][0]}: {error}; evaluation needs every image") from error
        _, image, labels = self._last
        config = self.config
        original = (image.shape[-2], image.shape[-1])
        number = key.index - int(self._ends[image_id]) + self.groups[image_id]
        view = plan_views(original, config.image_size, config.evaluation)[number]
        window = config.image_size if config.evaluation.mode == "slide" else None
        image, labels, size = see(image, labels, view, window)
        return Sample(image, _target(image_id, labels, size, original, view), key)

    def evaluator(self) -> SegmentationEvaluator:
        records = [self.records[index] for index in range(self.num_images)]
        truth: Callable[[int, tuple[int, int]], np.ndarray] | None = None
        if records[0][1] is not None:

            def truth(image_id: int, size: tuple[int, int]) -> np.ndarray:
                return read_labels(Path(records[image_id][1]), size, len(self.classes)).classes

        return SegmentationEvaluator(
            self.classes, [os.path.basename(photo) for photo, _ in records], truth=truth, submission=self.submission
        )

    def tracker(self) -> ReplacementTracker:
        return ReplacementTracker(self.num_images, self.config.corrupt_share)

    def metric_names(self) -> list[str]:
        """Return the names of the means, and of the IoU of each class."""
        return [f"semantic/{name}" for name in (*NAMES, *(f"IoU-{name}" for name in self.classes))]

    def summary(self, metrics: dict[str, float]) -> str:
        """Return the mean IoU and the pixels' accuracy."""
        return f"mIoU {metrics['semantic/mIoU']:.3f}, pixel accuracy {metrics['semantic/pixel_accuracy']:.3f}"

    def caption(self, target: SegmentationTarget) -> str:
        """Say which image it is, and which classes it shows."""
        shown = ", ".join(self.classes[label] for label in target.labels[:3].tolist())
        more = f" and {len(target.labels) - 3} more" if len(target.labels) > 3 else ""
        return f"image {target.image_id}: {shown or 'nothing labelled'}{more}"

    def draw(self, image: Tensor, shown: SegmentationTarget | SegmentationResult) -> np.ndarray:
        """Draw a sample with the classes of its pixels in colours, and a legend; a result's at the size of the sample."""
        height, width = shown.size
        image = image[:, :height, :width]
        if isinstance(shown, SegmentationTarget):
            return draw_classes(image, shown.semantic[:height, :width], self.classes)
        return draw_classes(image, best_class(class_scores(shown), shown.size), self.classes)


def _target(
    image_id: int,
    labels: Tensor,
    size: tuple[int, int],
    original: tuple[int, int],
    view: SegmentationView | None = None,
) -> SegmentationTarget:
    present = labels.unique()
    return SegmentationTarget(image_id, present[present != NO_CLASS].long(), labels, size, original, view)


def locate(config: ADE20KDataConfig, split: str) -> tuple[Path, Path]:
    """Return the folders of photos and labels of a split, which are there.

    Raises:
        DataError: one is not; says the layout that is expected, and which one was found where it is known.
    """
    root = Path(config.root).expanduser()
    layout = LAYOUT.format(**vars(config))
    if not root.is_dir():
        raise DataError(f"data.root is {str(config.root)!r}: there is no such folder; {layout}")
    for folder in config.paths(split):
        if folder.is_dir():
            continue
        if is_full_release(root):
            raise DataError(
                f"{root} holds the full release of ADE20K: thousands of classes, coded in *_seg.png beside the photos. Its "
                "150 classes and their benchmark are the SceneParsing release, ADEChallengeData2016.zip: give that folder as "
                f"data.root; {layout}"
            )
        inner = root / "ADEChallengeData2016"
        hint = f"is {inner} meant? " if inner.is_dir() else ""
        raise DataError(f"{folder}: there is no such folder; {hint}{layout}")
    return config.paths(split)


def is_full_release(root: Path) -> bool:
    """Tell whether a folder looks like the full release of ADE20K, in its form of 2016 or of 2021, or the folder above it."""
    tops = [root, *root.glob("ADE20K_20*")]
    if any((top / name).exists() for top in tops for name in ("index_ade20k.mat", "index_ade20k.pkl", "images/ADE")):
        return True
    training = root / "images" / "training"
    # Scenes by first letter: images/training/a/abbey/ADE_train_00000970_seg.png.
    return training.is_dir() and next(training.glob("*/*/*_seg.png"), None) is not None


def find_pairs(photos: Path, annotations: Path) -> tuple[list[tuple[Path, Path]], list[Finding]]:
    """Return photos with the labels of their name, sorted; and what has no counterpart."""
    images, labels = _listed(photos, PHOTO_SUFFIXES), _listed(annotations, frozenset((".png",)))
    findings = [
        Finding(
            str(photos / images[stem]), f"there is no {annotations / stem}.png with its labels", kind=MISSING_LABELS
        )
        for stem in images.keys() - labels.keys()
    ]
    findings += [
        Finding(str(annotations / labels[stem]), f"there is no photo of this name in {photos}", kind=MISSING_PHOTO)
        for stem in labels.keys() - images.keys()
    ]
    if not images:
        findings.append(Finding(str(photos), f"the folder holds no photo ({', '.join(sorted(PHOTO_SUFFIXES))})"))
    pairs = [(photos / name, annotations / labels[stem]) for stem, name in sorted(images.items()) if stem in labels]
    return pairs, sorted(findings, key=lambda finding: finding.path)


def find_test_photos(config: ADE20KDataConfig) -> list[tuple[Path, None]]:
    """Return (photo, no labels) of `test_images`, sorted.

    Raises:
        DataError: there are none.
    """
    folder = Path(config.root).expanduser() / Path(config.test_images).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"data.test_images is {config.test_images!r}: there is no folder {folder}; give one of photos, under data.root or "
            "with its whole path"
        )
    photos = _listed(folder, PHOTO_SUFFIXES)
    if not photos:
        raise DataError(f"{folder} holds no photo ({', '.join(sorted(PHOTO_SUFFIXES))})")
    return [(folder / name, None) for name in photos.values()]


def _listed(folder: Path, suffixes: frozenset[str]) -> dict[str, str]:
    """Return file names by stem, in order; list the folder once, which is quicker than asking for every file."""
    names = sorted(name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in suffixes)
    return {os.path.splitext(name)[0]: name for name in names}
