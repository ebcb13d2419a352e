"""A small world for heads: random feature maps and random but valid targets, all from given seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from permafrost.data.detection.types import DetectionTarget
from permafrost.data.types import Batch, SampleKey
from permafrost.heads.base import Head
from permafrost.heads.build import build_head
from permafrost.heads.detection.config import BoxHeadConfig, MaskHeadConfig, MaskRCNNConfig, PoolingConfig, RPNConfig
from permafrost.heads.necks.config import FPNConfig
from permafrost.model.spec import FeatureSpec

CLASSES = ("circle", "square", "star")
SEMANTIC_CLASSES = 5


@pytest.fixture
def spec() -> FeatureSpec:
    return FeatureSpec(channels=(8, 12, 16, 20), strides=(4, 8, 16, 32))


@pytest.fixture
def classes() -> tuple[str, ...]:
    return CLASSES


@pytest.fixture
def small_config() -> Callable[..., MaskRCNNConfig]:
    """A function: a head of a few thousand parameters, with any part replaced."""

    def make(**parts) -> MaskRCNNConfig:
        defaults = {
            "neck": FPNConfig(channels=16),
            "rpn": RPNConfig(
                anchor_scale=4.0,
                num_samples=32,
                num_pre_nms_train=60,
                num_pre_nms_test=60,
                num_proposals_train=40,
                num_proposals_test=40,
            ),
            "pooling": PoolingConfig(sampling_ratio=2),
            "box": BoxHeadConfig(fc_channels=24, num_samples=16, resolution=5),
            "mask": MaskHeadConfig(num_convs=1, channels=12, resolution=6),
        }
        return MaskRCNNConfig(**{**defaults, **parts})

    return make


@pytest.fixture
def make_target() -> Callable[..., DetectionTarget]:
    """A function: an image's ground truth, rectangles as masks."""

    def make(index, *, num_objects=4, side=96, size=None, num_ignored=0) -> DetectionTarget:
        random = torch.Generator().manual_seed(1000 + index)
        height, width = size or (side, side)
        limits = torch.tensor([width, height], dtype=torch.float32)
        wh = 12 + torch.rand(num_objects + num_ignored, 2, generator=random) * 36
        xy = torch.rand(num_objects + num_ignored, 2, generator=random) * (limits - wh)
        boxes = torch.cat([xy, xy + wh], dim=1)
        masks = torch.zeros(num_objects, side, side, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist()):
            mask[y1:y2, x1:x2] = True
        return DetectionTarget(
            image_id=100 + index,
            boxes=boxes[:num_objects],
            labels=torch.randint(len(CLASSES), (num_objects,), generator=random),
            masks=masks,
            ignore_boxes=boxes[num_objects:],
            size=(height, width),
            original_size=(2 * height, 2 * width),
            semantic=torch.randint(SEMANTIC_CLASSES, (side, side), generator=random, dtype=torch.uint8),
        )

    return make


@pytest.fixture
def make_batch(make_target) -> Callable[..., Batch]:
    """A function: a batch with the given number of objects per image."""

    def make(num_objects=(4, 2), *, first=0, side=96, **options) -> Batch:
        indices = range(first, first + len(num_objects))
        return Batch(
            images=torch.zeros(len(num_objects), 3, side, side, dtype=torch.uint8),
            targets=[make_target(i, num_objects=n, side=side, **options) for i, n in zip(indices, num_objects)],
            keys=[SampleKey(seed=5, epoch=2, index=i) for i in indices],
        )

    return make


@pytest.fixture
def make_features(spec) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A function: the maps of images `first`, `first + 1`, ..., each a function of its own number."""

    def make(num_images=2, *, first=0, side=96, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
        levels = [[] for _ in spec.channels]
        for i in range(first, first + num_images):
            random = torch.Generator().manual_seed(i)
            for level, channels, stride in zip(levels, spec.channels, spec.strides):
                cells = -(-side // stride)
                level.append(torch.randn(channels, cells, cells, generator=random, dtype=torch.float64))
        return tuple(torch.stack(maps).to(dtype).to(memory_format=torch.channels_last) for maps in levels)

    return make


def select(batch, order) -> Batch:
    """The batch made of the given images."""
    return Batch(batch.images[order], [batch.targets[i] for i in order], [batch.keys[i] for i in order])


@pytest.fixture(name="select")
def _select() -> Callable[..., Batch]:
    return select


def build(config, spec, classes, *, seed=0, spread=0.05) -> Head:
    """A head whose predictors are no longer near zero, so that every part of it decides something."""
    torch.manual_seed(seed)
    head = build_head(config, spec=spec, classes=classes)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return head


@pytest.fixture(name="build")
def _build() -> Callable[..., Head]:
    return build


def run_counting(head, *args) -> tuple[Any, dict[str, int]]:
    """The head's answer, and how often each submodule ran."""
    calls = dict.fromkeys((name for name, _ in head.named_modules()), 0)

    def hook(name) -> Callable[..., None]:
        def count(*_) -> None:
            calls[name] += 1

        return count

    handles = [module.register_forward_hook(hook(name)) for name, module in head.named_modules()]
    try:
        return head(*args), calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(name="run_counting")
def _run_counting() -> Callable[..., tuple[Any, dict[str, int]]]:
    return run_counting
