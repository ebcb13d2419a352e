"""Build what is live from the configuration of data: data sets, checks, readers of files without labels.

What a kind of data brings is a row of KINDS, looked up by the exact type of its configuration. Any other configuration, derived from
one of these or not, brings the methods that TaskDataConfig declares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from permafrost.data.detection.check import check_coco
from permafrost.data.detection.config import CocoDataConfig
from permafrost.data.detection.dataset import CocoDetection
from permafrost.data.detection.inputs import DetectionInputs
from permafrost.data.detection.types import DetectionTarget
from permafrost.data.errors import DataError
from permafrost.data.findings import Finding
from permafrost.data.segmentation.check import check_ade20k
from permafrost.data.segmentation.config import ADE20KDataConfig
from permafrost.data.segmentation.dataset import SceneParsing
from permafrost.data.segmentation.inputs import SegmentationInputs
from permafrost.data.segmentation.types import SegmentationTarget
from permafrost.data.task import InputReader, Progress, TaskDataConfig, TaskDataset
from permafrost.data.types import Target
from permafrost.data.video.check import check_kinetics
from permafrost.data.video.config import KineticsDataConfig
from permafrost.data.video.dataset import KineticsClips
from permafrost.data.video.inputs import VideoInputs
from permafrost.data.video.types import ClipTarget
from permafrost.data.worlds.config import MotionDataConfig, SceneryDataConfig, ShapesDataConfig
from permafrost.data.worlds.files import WorldFiles
from permafrost.data.worlds.motion_files import MOTION
from permafrost.data.worlds.scenery_files import SCENERY
from permafrost.data.worlds.shapes_files import SHAPES


@dataclass(frozen=True)
class Kind:
    """Functions and facts that a kind of data brings.

    Attributes:
        dataset: dataset(config, split), and of what has a test set dataset(config, "test", submission=folder).
        check: check(config, decode=, on_progress=).
        inputs: inputs(config, classes, category_ids).
        target: the type of its samples' targets.
        has_test_set: of samples without public labels.
        world: of a built-in one, what writes its files.
    """

    dataset: Callable[..., TaskDataset]
    check: Callable[..., list[Finding]]
    inputs: Callable[..., InputReader]
    target: type[Target]
    has_test_set: bool = True
    world: WorldFiles | None = None


_COCO = Kind(CocoDetection, check_coco, DetectionInputs, DetectionTarget)
_ADE20K = Kind(SceneParsing, check_ade20k, SegmentationInputs, SegmentationTarget)
_KINETICS = Kind(KineticsClips, check_kinetics, VideoInputs, ClipTarget, has_test_set=False)
KINDS: dict[type[TaskDataConfig], Kind] = {
    CocoDataConfig: _COCO,
    ShapesDataConfig: replace(_COCO, world=SHAPES),
    ADE20KDataConfig: _ADE20K,
    SceneryDataConfig: replace(_ADE20K, world=SCENERY),
    KineticsDataConfig: _KINETICS,
    MotionDataConfig: replace(_KINETICS, world=MOTION),
}


def located(config: TaskDataConfig) -> Any:
    """Return the same configuration with files behind it: of a built-in world `root` names them, and they are written first.

    Raises:
        DataError: they cannot be written, or the folder holds something else.
    """
    kind = KINDS.get(type(config))
    if kind is None:
        return config.located()
    if kind.world is None or not isinstance(config, (ShapesDataConfig, SceneryDataConfig, MotionDataConfig)):
        return config
    return replace(config, root=str(kind.world.ensure(config.world, Path(config.root) if config.root else None)))


def train_set(config: TaskDataConfig) -> TaskDataset:
    """Return the training set, with augmentation.

    Raises:
        DataError: files are missing or malformed; or nothing builds this configuration.
    """
    kind = KINDS.get(type(config))
    return config.build_train() if kind is None else kind.dataset(located(config), "train")


def val_set(config: TaskDataConfig) -> TaskDataset:
    """Return the validation set: every view of every sample, without augmentation.

    Raises:
        DataError: as of `train_set`.
    """
    kind = KINDS.get(type(config))
    return config.build_val() if kind is None else kind.dataset(located(config), "val")


def submission_set(config: TaskDataConfig, submission: Path) -> TaskDataset:
    """Return the samples without public labels, seen as in validation; their evaluators' files are for a benchmark server.

    Args:
        config: of a task with such a benchmark.
        submission: folder that the files are named after or written to.

    Raises:
        DataError: there is no test set; or as of `train_set`.
    """
    kind = KINDS.get(type(config))
    if kind is None or not kind.has_test_set:
        return config.build_test(submission)
    return kind.dataset(located(config), "test", submission=submission)


def check_data(config: TaskDataConfig, *, decode: bool = True, on_progress: Progress | None = None) -> list[Finding]:
    """Return what is wrong with both splits; a run cannot start with the fatal findings.

    Args:
        config: what a run would use.
        decode: decode every file, which finds damaged ones; otherwise only missing files are found.
        on_progress: called with the files done and all files of a split, now and then.

    Raises:
        DataError: nothing checks this configuration.
    """
    kind = KINDS.get(type(config))
    if kind is None:
        return config.check(decode=decode, on_progress=on_progress)
    try:
        config = located(config)
    except DataError as error:
        return [Finding(config.root, str(error))]
    return kind.check(config, decode=decode, on_progress=on_progress)


def input_reader(config: TaskDataConfig, classes: Sequence[str], category_ids: Sequence[int]) -> InputReader:
    """Return a reader of files without labels.

    Args:
        config: how they are looked at.
        classes: that the head was trained on, by label.
        category_ids: the data set's own numbers of these.

    Raises:
        DataError: nothing reads for this configuration.
    """
    kind = KINDS.get(type(config))
    return config.inputs(classes, category_ids) if kind is None else kind.inputs(config, classes, category_ids)


def target_type(config: TaskDataConfig) -> type[Target]:
    """Return the type of its samples' targets.

    Raises:
        DataError: nothing builds this configuration.
    """
    kind = KINDS.get(type(config))
    return config.target_type() if kind is None else kind.target
