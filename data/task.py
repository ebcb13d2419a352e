"""The interface through which the launcher asks things of the data of any task. Imports no torch.

A task's data is a configuration derived from TaskDataConfig with four kinds of live objects behind it: data sets, their targets,
their evaluators, and, for `permafrost predict`, a reader of files without labels. `data.build` makes them; the launcher knows these
interfaces alone, so that a task may come from outside this package.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Protocol, Self

from permafrost._configuration import Configuration
from permafrost.data.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from permafrost.data.findings import Finding
    from permafrost.data.stream.records import ReplacementTracker
    from permafrost.data.types import Sample, SampleKey, Target

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))
"""Which files of a folder are taken for images."""

Split = Literal["train", "val", "test"]

Progress = Callable[[int, int], None]
"""on_progress(done, all), called now and then."""


@dataclass(frozen=True)
class SampleExtent:
    """Size of a training sample, known before any file is there: for predictions of what a run will hold.

    Attributes:
        side: pixels, of the square that the network sees.
        num_frames: T of a clip; None: the sample is an image.
        num_classes: K; None: only the files say.
        objects: most that an image has to tell apart, see `TaskDataConfig.objects_are`; None: only the files say. Of a clip nothing is
            told apart: 1.
    """

    side: int
    num_frames: int | None = None
    num_classes: int | None = None
    objects: int | None = None


@dataclass
class TaskDataConfig(Configuration):
    """Place of a task's data, and the way it becomes samples: values only.

    What this package ships is built by the functions of `data.build`. A configuration from outside brings the methods from `located`
    on, which those functions call; that of a subclass of a shipped one, too: none is built as its parent.
    """

    task: ClassVar[str]
    """Name of the task: heads of the same one learn from the data."""
    input_kind: ClassVar[str] = "image"
    """What `permafrost predict` reads, in a word."""
    input_suffixes: ClassVar[frozenset[str]] = IMAGE_SUFFIXES
    """Which files of a folder it takes. A file that is named itself may have any name."""

    result_names: ClassVar[Mapping[str, str]] = {}
    """Names of the kinds of results in tables, by what stands before the slash in the metrics' names; else they are called that."""
    # Without a type: of most kinds of data it is a field.
    root = ""
    """Folder that the data is read from; "" where it is none, or the cache."""
    many_classes: ClassVar[int] = 1
    """K that a plan assumes where neither the data nor the user says."""
    many_objects: ClassVar[int] = 1
    """Number of things to tell apart that it assumes in an image, a crowded one."""
    objects_are: ClassVar[str] = "objects"
    """What that is, in a word."""

    @property
    def fills_cache(self) -> bool:
        """Tell whether a run writes a built-in world into the cache folder."""
        return False

    def describe(self) -> str:
        """Return the kind of data in a word, and its folder: "coco (data/coco)"."""
        kind = re.sub(r"(Data)?(Config)?$", "", type(self).__name__).lower()
        return f"{kind} ({self.root})" if self.root else kind

    def required_paths(self) -> list[Path]:
        """Return the files and folders that every node must have; none where nothing is read, or a built-in world is written."""
        return []

    def extent(self) -> SampleExtent:
        """Return what a training sample is."""
        raise NotImplementedError

    def seen_with(self, **evaluation: Any) -> Self:
        """Return the same data looked at otherwise in evaluation: with other values in its field `evaluation`, a dataclass.

        Raises:
            DataError: it has no such field, or no `evaluation`.
        """
        own: Any = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}.get("evaluation")
        known = set() if own is None else {field.name for field in dataclasses.fields(own)}
        if unknown := sorted(evaluation.keys() - known):
            raise DataError(
                f"evaluation cannot change {', '.join(unknown)}: the run's data is {self._kind()}, which has no such field"
            )
        changed: dict[str, Any] = {"evaluation": dataclasses.replace(own, **evaluation)} if evaluation else {}
        return dataclasses.replace(self, **changed) if changed else self

    def located(self) -> Self:
        """Return the same configuration with files behind it: a built-in world writes them first."""
        if self.fills_cache:
            self._refuse("located")
        return self

    def build_train(self) -> TaskDataset:
        """Build the training set with augmentation."""
        self._refuse("build_train")

    def build_val(self) -> TaskDataset:
        """Build the validation set without augmentation."""
        self._refuse("build_val")

    def build_test(self, submission: Path) -> TaskDataset:
        """Build the set of samples without public labels, for whose results a benchmark server takes files; there need not be one.

        Args:
            submission: the folder that its evaluators' files are named after or written to.
        """
        raise DataError(f"there is no submission of {self._kind()}: it has no test set (a method build_test)")

    def target_type(self) -> type[Target]:
        """Return the type of its samples' targets."""
        self._refuse("target_type")

    def check(self, *, decode: bool = True, on_progress: Progress | None = None) -> list[Finding]:
        """Return what is wrong with both splits; arguments as of `data.build.check_data`."""
        self._refuse("check")

    def inputs(self, classes: Sequence[str], category_ids: Sequence[int]) -> InputReader:
        """Build a reader of files without labels, for a head that was trained on these classes."""
        self._refuse("inputs")

    def _kind(self) -> str:
        return f"a {type(self).__name__}, for {self.task}"

    def _refuse(self, method: str) -> NoReturn:
        raise DataError(
            f"{type(self).__name__} has no method {method}: permafrost.data.build builds the configurations that permafrost ships, "
            "and any other one, derived from them or not, needs it"
        )


class TaskDataset(ABC):
    """A split. Indexed by SampleKey; a pure function of it. The data sets of a task derive from this.

    Attributes:
        classes: names by label.
        category_ids: the data set's own numbers of the classes, by label; 0..K-1 where it has none.
        notes: what is left out, one line each; to be said at start.
        fingerprint: hash of what the split is made of.
        headline: the metric that decides which checkpoint is best, unless the recipe says otherwise.
        selection: the data set's own ids of the samples in use where a share of a training set is; else None.
        groups: how many samples in a row belong together and are evaluated on one rank, in order (views of an image); None where
            each is by itself.
        max_batch: samples, at most, of one batch in evaluation; None for as many as the recipe says.
    """

    classes: list[str]
    category_ids: list[int]
    notes: list[str]
    fingerprint: str
    headline: str
    selection: list[int] | None = None
    groups: Sequence[int] | None = None
    max_batch: int | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples; of a video all test views count."""

    @abstractmethod
    def __getitem__(self, key: SampleKey) -> Sample:
        """Load, transform and annotate one sample.

        Raises:
            DataError: it cannot be used.
        """

    @property
    def extent(self) -> str:
        """Return how much it holds, in words: "300 images", with their views where there are several."""
        num_images = len(self) if self.groups is None else len(self.groups)
        views = "" if num_images == len(self) else f" ({len(self):,} views)"
        return f"{num_images:,} images{views}"

    @abstractmethod
    def evaluator(self) -> TaskEvaluator:
        """Return a fresh evaluator against the labels of exactly these samples."""

    @abstractmethod
    def tracker(self) -> ReplacementTracker:
        """Return a fresh count of replaced files, with this data set's limit."""

    @abstractmethod
    def metric_names(self) -> list[str]:
        """Return every name that `TaskEvaluator.compute` may give, but for counts."""

    @abstractmethod
    def summary(self, metrics: dict[str, float]) -> str:
        """Return the few metrics that are said after each evaluation, in words."""

    @abstractmethod
    def caption(self, target: Any) -> str:
        """Return a sample's label in a few words."""

    @abstractmethod
    def draw(self, image: Tensor, shown: Any) -> np.ndarray:
        """Draw a sample with its target, or with a head's result for it.

        Args:
            image: `Sample.image`.
            shown: a target or a result of this task.

        Returns:
            (H, W, 3) uint8.
        """


class TaskEvaluator(Protocol):
    """Collects a head's results and scores them.

    Each rank collects its share (`update`), the shares meet on one (`state`, `merge`), and that one scores.
    """

    def update(self, results: Sequence[Any]) -> None:
        """Take in the results of some samples."""

    def state(self) -> Any:
        """Return what this rank collected: plain values, for `merge`."""

    def merge(self, states: Sequence[Any]) -> None:
        """Replace what was collected by the union of all ranks' states, this rank's included."""

    def compute(self) -> dict[str, float]:
        """Return metrics by name: `measure`, or `kind/measure` if a head has several kinds of results.

        A single class's name ends with `-<class>`, and a count's measure begins with `num_`.
        """

    def result_files(self, head: str) -> dict[str, bytes]:
        """Return the content by file name of what is written beside the metrics: results_<head>.json and perhaps more."""

    def pictures(self) -> dict[str, np.ndarray]:
        """Return pictures of what `compute` found, for TensorBoard, (H, W, 3) uint8 by title, such as a confusion matrix."""


class InputReader(Protocol):
    """Files without labels, for one head.

    Attributes:
        suffix: of what `write` writes: ".png".
        threshold: least score of what is kept, where the user gives none.
    """

    suffix: str
    threshold: float

    def read(self, source: Any, index: int) -> tuple[list[Sample], Any]:
        """Return what the head is to see of one input, a sample a view, and what `write` draws on.

        Args:
            source: a path, or pixels that the caller has at hand (an image: what `pictures.read.to_pixels` takes).
            index: its position among the inputs.

        Raises:
            DataError: it cannot be read, with the file's name if it has one.
        """

    def keep(self, results: Sequence[Any], threshold: float) -> Any:
        """Return an input's one typed result, in its own pixels, with the classes' `names`, and without what scores below the threshold."""

    def describe(self, result: Any) -> str:
        """Return what was found, in a few words."""

    def entries(self, result: Any, file: Path) -> list[dict[str, Any]]:
        """Return its part of predictions.json."""

    def write(self, source: Any, result: Any, target: Path) -> None:
        """Draw the result.

        Raises:
            OSError: it cannot be written.
        """
