"""A fourth task that lives outside the package: the depth of every pixel, on drawn pictures of discs before a slope.

It is what a user's module would be: configurations, a data set, targets and results, an evaluator, a reader, a head, a recipe.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.data import (
    DataError,
    Finding,
    Sample,
    SampleExtent,
    SampleKey,
    Target,
    TaskDataConfig,
    TaskDataset,
    Tensors,
)
from permafrost.data.pictures.geometry import pad_to, padded_size, resize
from permafrost.data.pictures.read import image_of
from permafrost.data.stream.records import ReplacementTracker
from permafrost.heads import Head, HeadConfig
from permafrost.heads.base import LossCounts, world_mean_counts
from permafrost.launcher import Experiment, HeadExperiment, LoopConfig, OptimizerConfig, ScheduleConfig
from permafrost.model import BackboneConfig

NAMES = ("abs_rel", "rmse")


@dataclass
class DepthTarget(Target):
    """(H, W) float32 depth of an image, 0 where there is none."""

    image_id: int
    depth: Tensor
    size: tuple[int, int]

    @classmethod
    def made_up(cls, key: SampleKey, *, side: int, num_classes: int, objects: int) -> Self:
        """Return one depth everywhere."""
        return cls(key.index, torch.ones(side, side), (side, side))

    @classmethod
    def pixel_bytes(cls, objects: int) -> int:
        """Return those of the depth."""
        return 4

    def padded(self, canvas: tuple[int, int]) -> Self:
        """Return the same with unknown depth around it."""
        return replace(self, depth=pad_to(self.depth, canvas, 0.0))


@dataclass
class DepthResult(Tensors):
    """(h, w) float32 depth that a head sees in the image, its padding cut off."""

    image_id: int
    depth: Tensor


@dataclass
class DepthEvaluationConfig:
    """Views of images in evaluation."""

    flip: bool = False


@dataclass
class DepthDataConfig(TaskDataConfig):
    """Pictures that are drawn on demand."""

    task: ClassVar[str] = "depth"
    many_objects: ClassVar[int] = 1

    num_train: int = 8
    num_val: int = 3
    side: int = 64
    evaluation: DepthEvaluationConfig = field(default_factory=DepthEvaluationConfig)

    def extent(self) -> SampleExtent:
        return SampleExtent(self.side, num_classes=1, objects=1)

    def build_train(self) -> DepthPictures:
        return DepthPictures(self, self.num_train, seed=0)

    def build_val(self) -> DepthPictures:
        return DepthPictures(self, self.num_val, seed=1)

    def check(self, *, decode: bool = True, on_progress: Any = None) -> list[Finding]:
        return []

    def inputs(self, classes: Sequence[str], category_ids: Sequence[int]) -> DepthInputs:
        return DepthInputs()

    def target_type(self) -> type[DepthTarget]:
        return DepthTarget


class DepthPictures(TaskDataset):
    """Discs that are the brighter the nearer they are."""

    headline = "depth/closeness"

    def __init__(self, config: DepthDataConfig, length: int, seed: int) -> None:
        self.config, self.length, self.seed = config, length, seed
        self.classes, self.category_ids, self.notes = ["depth"], [0], []
        self.fingerprint = f"depth {config} {length} {seed}"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: SampleKey) -> Sample:
        side = self.config.side
        draws = torch.rand(3, generator=SampleKey(self.seed, 0, key.index).generator("draw")).tolist()
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        depth = 2 + y / side
        depth = torch.where(
            (y - draws[0] * side) ** 2 + (x - draws[1] * side) ** 2 < (side / 4) ** 2, 1 + draws[2], depth
        )
        image = (255 * (1 - depth / 4)).to(torch.uint8).expand(3, side, side).contiguous()
        return Sample(image, DepthTarget(key.index, depth.float(), (side, side)), key)

    @property
    def extent(self) -> str:
        return f"{self.length} drawn pictures"

    def evaluator(self) -> DepthEvaluator:
        return DepthEvaluator({index: self[SampleKey(0, 0, index)].target.depth for index in range(self.length)})

    def tracker(self) -> ReplacementTracker:
        return ReplacementTracker(self.length, 0.0)

    def metric_names(self) -> list[str]:
        return ["depth/closeness", "depth/error"]

    def summary(self, metrics: dict[str, float]) -> str:
        return f"off by {metrics['depth/error']:.3f}"

    def caption(self, target: DepthTarget) -> str:
        return f"image {target.image_id}, {float(target.depth.min()):.1f} to {float(target.depth.max()):.1f} away"

    def draw(self, image: Tensor, shown: DepthTarget | DepthResult) -> np.ndarray:
        return picture_of(shown.depth)


def picture_of(depth: Tensor) -> np.ndarray:
    """Return (H, W, 3) uint8, the darker the farther."""
    gray = (255 - 60 * depth.clamp(0, 4)).to(torch.uint8)
    return gray[..., None].expand(*gray.shape, 3).numpy()


class DepthEvaluator:
    """The mean error of all images."""

    def __init__(self, truth: dict[int, Tensor]) -> None:
        self.truth, self.errors = truth, {}

    def update(self, results: Sequence[DepthResult]) -> None:
        for result in results:
            truth = self.truth[result.image_id]
            found = F.interpolate(result.depth[None, None].cpu(), size=truth.shape, mode="bilinear")[0, 0]
            self.errors[result.image_id] = float((found - truth).abs().mean())

    def state(self) -> dict[int, float]:
        return self.errors

    def merge(self, states: Sequence[dict[int, float]]) -> None:
        self.errors = {image_id: error for state in states for image_id, error in state.items()}

    def compute(self) -> dict[str, float]:
        error = sum(self.errors.values()) / len(self.truth)
        return {"depth/closeness": 1 / (1 + error), "depth/error": error}

    def result_files(self, head: str) -> dict[str, bytes]:
        return {f"results_{head}.json": json.dumps(self.errors).encode()}

    def pictures(self) -> dict[str, np.ndarray]:
        return {}


class DepthInputs:
    """Files whose depth nobody knows."""

    suffix = ".png"
    threshold = 0.0

    def read(self, source: Any, index: int) -> tuple[list[Sample], Tensor]:
        image = image_of(source)
        size = image.shape[-2], image.shape[-1]
        if min(size) < 32:
            raise DataError(f"{source}: it is {size[1]} x {size[0]}: give at least 32 pixels")
        shown = pad_to(resize(image, size), padded_size(size), 0)
        return [Sample(shown, DepthTarget(index, torch.zeros(shown.shape[-2:]), size), SampleKey(0, 0, index))], image

    def keep(self, results: Sequence[DepthResult], threshold: float) -> DepthResult:
        return results[0]

    def describe(self, result: DepthResult) -> str:
        return f"{float(result.depth.mean()):.2f} away"

    def entries(self, result: DepthResult, file: Path) -> list[dict[str, Any]]:
        return [{"file_name": str(file), "mean_depth": float(result.depth.mean())}]

    def write(self, source: Tensor, result: DepthResult, target: Path) -> None:
        Image.fromarray(picture_of(result.depth)).save(target)


@dataclass
class DepthHeadConfig(HeadConfig):
    """One convolution."""

    task: ClassVar[str] = "depth"

    width: int = 8

    def build(self, *, spec: Any, classes: Sequence[str]) -> DepthHead:
        return DepthHead(spec.channels[0], spec.strides[0], self.width)


class DepthHead(Head):
    """From the finest map to a depth of every cell."""

    def __init__(self, channels: int, stride: int, width: int) -> None:
        super().__init__()
        self.stride = stride
        self.layers = nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, 1, 1), nn.Softplus())

    def forward(
        self, features: Sequence[Tensor], batch: Any, counts: LossCounts = world_mean_counts
    ) -> dict[str, Tensor] | list[DepthResult]:
        found = self.layers(features[0].float())
        if not self.training:
            cut = [tuple(-(-side // self.stride) for side in target.size) for target in batch.targets]
            return [
                DepthResult(target.image_id, one[0, : size[0], : size[1]].float())
                for target, one, size in zip(batch.targets, found, cut)
            ]
        true = torch.stack([target.depth for target in batch.targets])[:, None]
        error = (F.interpolate(found, size=true.shape[-2:], mode="bilinear") - true).abs() * (true > 0)
        return {"depth": error.sum() / counts("pixels", (true > 0).sum())}


def tiny() -> Experiment:
    """Depth from a random nano SwinV2, in seconds."""
    head = HeadExperiment(
        model=DepthHeadConfig(),
        optimizer=OptimizerConfig(learning_rate=0.02, reference_batch=4),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0),
    )
    return Experiment(
        name="depth",
        backbone=BackboneConfig(name="swinv2_nano", weights="random"),
        data=DepthDataConfig(),
        heads={"depth": head},
        loop=LoopConfig(num_steps=20, global_batch=4, num_workers=0, log_every=5, checkpoint_every=20, image_every=20),
    )
