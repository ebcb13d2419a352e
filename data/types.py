"""Samples and batches, which data sets of any task hand to heads. Shapes: B batch, T frames, H W size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import Field, dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleKey:
    """Position of a sample in the stream: everything random about it is a function of these three numbers.

    Augmentation in a worker and sampling inside a head draw from generators derived from the key, so the result does
    not depend on the number of workers, ranks or nodes, nor on what ran before.
    """

    seed: int
    epoch: int
    index: int

    def generator(self, purpose: str) -> torch.Generator:
        """Return a fresh CPU generator for one named purpose; equal keys and purposes give equal streams."""
        digest = hashlib.sha256(f"{self.seed}/{self.epoch}/{self.index}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


class Tensors:
    """Base of dataclasses that hold tensors among other values: results, targets."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def to(self, device: torch.device | str) -> Self:
        """Return the same with its tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def cpu(self) -> Self:
        """Return the same with its tensors in host memory."""
        return self._with(Tensor.cpu)

    def pin_memory(self) -> Self:
        """Return the same with its tensors in page-locked memory, from where copies to a GPU are asynchronous."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)


class Target(Tensors):
    """Base of what is known about a sample: what batches and plans ask of the targets of any task."""

    @classmethod
    def made_up(cls, key: SampleKey, *, side: int, num_classes: int, objects: int) -> Self:
        """Return a target for `permafrost plan`, which needs its shapes; equal arguments give equal targets.

        Args:
            key: of the sample.
            side: of the square image, pixels.
            num_classes: K.
            objects: what the image has to tell apart; see `TaskDataConfig.objects_are`.
        """
        raise NotImplementedError

    @classmethod
    def pixel_bytes(cls, objects: int) -> int:
        """Return the bytes of a target on the device for each pixel of its image; what does not grow with the image does not count."""
        return 0

    def padded(self, canvas: tuple[int, int]) -> Self:
        """Return the same for an image that lies at the upper left of a larger (height, width); nothing changes by default."""
        return self

    def ids(self) -> dict[str, int]:
        """Return the data set's own numbers of the sample, by name: all fields that end in `_id`."""
        return {name: value for name, value in vars(self).items() if name.endswith("_id")}


@dataclass
class Sample:
    """One image as a data set gives it.

    Attributes:
        image: (3, H, W) uint8; a clip is (T, 3, H, W).
        target: what is known about it, in the task's own type.
        key: where it stands in the stream.
        replaced: files that could not be read and in whose place this image stands: (path, reason).
    """

    image: Tensor
    target: Any
    key: SampleKey
    replaced: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Batch:
    """One rank's share of a step.

    Attributes:
        images: (B, 3, H, W) uint8, padded bottom and right to one size (with `geometry.PAD_COLOR`); clips are
            (B, T, 3, H, W).
        targets: one per image or clip, in the task's own type.
        keys: one per image.
        replaced: files that could not be read and were replaced by a neighbour: (path, reason).
        is_padding: True for a batch that only keeps ranks in step during evaluation; its results are dropped.
    """

    images: Tensor
    targets: list[Any]
    keys: list[SampleKey]
    replaced: list[tuple[str, str]] = field(default_factory=list)
    is_padding: bool = False

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch with its tensors on `device`."""
        targets = [target.to(device) for target in self.targets]
        return replace(self, images=self.images.to(device, non_blocking=True), targets=targets)

    def pin_memory(self) -> Batch:
        """Return the same batch with its tensors in page-locked memory; torch's DataLoader calls this."""
        return replace(self, images=self.images.pin_memory(), targets=[target.pin_memory() for target in self.targets])
