"""What the launcher asks of the data of any task. Imports no torch.

A task's data is a configuration derived from TaskDataConfig with three kinds of live objects behind it: data sets, their
evaluators, and, for `permafrost predict`, a reader of files without labels. The launcher knows these interfaces alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from permafrost.data.findings import Finding
    from permafrost.data.stream.records import ReplacementTracker
    from permafrost.data.types import Sample, SampleKey

Task = Literal["detection", "segmentation", "video"]

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))
"""Which files of a folder are taken for images."""

Progress = Callable[[int, int], None]
"""on_progress(done, all), called now and then."""


@dataclass(frozen=True)
class SampleExtent:
    """What a training sample is, before any file is there: for predictions of what a run will hold.

    Attributes:
        side: pixels, of the square that the network sees.
        num_frames: T of a clip; None: the sample is an image.
        num_classes: K; None: only the files say.
        objects: most that an image has to tell apart: annotated objects (detection), classes that occur (segmentation); None: only
            the files say. Of a clip nothing is told apart: 1.
    """

    side: int
    num_frames: int | None = None
    num_classes: int | None = None
    objects: int | None = None


@dataclass
class TaskDataConfig:
    """Where a task's data is and how it becomes samples: values only; `build_*` makes the live data sets."""

    task: ClassVar[Task]
    """Heads of the same task learn from it."""
    input_kind: ClassVar[str] = "image"
    """What `permafrost predict` reads, in a word."""
    input_suffixes: ClassVar[frozenset[str]] = IMAGE_SUFFIXES
    """Which files of a folder it takes. A file that is named itself may have any name."""

    @property
    def fills_cache(self) -> bool:
        """Whether a run writes a built-in world into the cache folder."""
        return False

    def required_paths(self) -> list[Path]:
        """Files and folders that every node must have; none of a built-in world."""
        raise NotImplementedError

    def located(self) -> TaskDataConfig:
        """The same configuration with files behind it: a built-in world writes them first."""
        return self

    def extent(self) -> SampleExtent:
        """What a training sample is."""
        raise NotImplementedError

    def build_train(self) -> TaskDataset:
        """The training set with augmentation."""
        raise NotImplementedError

    def build_val(self) -> TaskDataset:
        """The validation set without augmentation."""
        raise NotImplementedError

    def check(self, *, decode: bool = True, on_progress: Progress | None = None) -> list[Finding]:
        """What is wrong with both splits; a run cannot start with the fatal findings.

        Args:
            decode: Decode every file, which finds damaged ones; otherwise only missing files are found.
            on_progress: Called with the files done and all files of a split.
        """
        raise NotImplementedError

    def inputs(self, classes: Sequence[str], category_ids: Sequence[int]) -> InputReader:
        """A reader of files without labels, for a head that was trained on these classes."""
        raise NotImplementedError


class TaskDataset(Protocol):
    """A split. Indexed by SampleKey; a pure function of it.

    Attributes:
        classes: names by label.
        category_ids: the data set's own numbers of the classes, by label; 0..K-1 where it has none.
        notes: what is left out, one line each; to be said at start.
        fingerprint: hash of what the split is made of.
        selection: the data set's own ids of the samples in use where a share of a training set is; else None.
        headline: the metric that decides which checkpoint is best, unless the recipe says otherwise.
        groups: how many samples in a row belong together and are evaluated on one rank, in order (views of an image); absent where
            each is by itself.
    """

    classes: list[str]
    category_ids: list[int]
    notes: list[str]
    fingerprint: str
    selection: list[int] | None
    headline: str

    def __len__(self) -> int:
        """Samples; of a video all test views count."""

    def __getitem__(self, key: SampleKey) -> Sample: ...

    @property
    def extent(self) -> str:
        """How much it holds, in words: "300 images"."""

    def evaluator(self) -> TaskEvaluator:
        """A fresh evaluator against the labels of exactly these samples."""

    def tracker(self) -> ReplacementTracker:
        """A fresh count of replaced files, with this data set's limit."""

    def metric_names(self) -> list[str]:
        """Every name that `TaskEvaluator.compute` may give, but for counts."""

    def summary(self, metrics: dict[str, float]) -> str:
        """The few metrics that are said after each evaluation, in words."""

    def caption(self, target: Any) -> str:
        """A sample's label in a few words."""

    def draw(self, image: Tensor, shown: Any) -> np.ndarray:
        """A sample with its target, or with a head's result for it.

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
        """What this rank collected: plain values, for `merge`."""

    def merge(self, states: Sequence[Any]) -> None:
        """Replace what was collected by the union of all ranks' states, this rank's included."""

    def compute(self) -> dict[str, float]:
        """Metrics by name. A name is `measure`, or `kind/measure` where a head has several kinds of results; a single class's
        is followed by `-<class>`, and a count's measure begins with `num_`."""

    def result_files(self, head: str) -> dict[str, bytes]:
        """Content by file name of what is written beside the metrics: results_<head>.json and perhaps more."""

    def pictures(self) -> dict[str, np.ndarray]:
        """After `compute`: pictures of it for TensorBoard, (H, W, 3) uint8 by title, such as a confusion matrix."""


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
        """Return one typed result of an input's samples, in its own pixels and with the classes' `names`, without what scores below
        the threshold."""

    def describe(self, result: Any) -> str:
        """What was found, in a few words."""

    def entries(self, result: Any, file: Path) -> list[dict[str, Any]]:
        """Its part of predictions.json."""

    def write(self, source: Any, result: Any, target: Path) -> None:
        """Draw the result.

        Raises:
            OSError: it cannot be written.
        """
