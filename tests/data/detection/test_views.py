"""Multi-scale and flip testing of detectors: what the views are, and how their results become one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pycocotools import mask as mask_api

from permafrost.data.build import train_set, val_set
from permafrost.data.detection.config import EvaluationConfig, JitterConfig
from permafrost.data.detection.evaluator import CocoEvaluator
from permafrost.data.detection.masks import paste_mask
from permafrost.data.detection.types import DetectionResult, DetectionView
from permafrost.data.detection.views import merge_views, on_disk, resample
from permafrost.data.errors import DataError
from permafrost.data.stream.loader import val_loader
from permafrost.data.types import SampleKey
from permafrost.data.worlds.config import ShapesDataConfig, ShapesWorld

SIDE = 64


def result(
    boxes, scores, labels, masks, *, size=(50, 100), view=None, original=(100, 200), image_id=1
) -> DetectionResult:
    return DetectionResult(
        image_id=image_id,
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        scores=torch.tensor(scores, dtype=torch.float32),
        masks=masks,
        size=size,
        original_size=original,
        view=view,
    )


def left_half(n=1, side=4) -> torch.Tensor:
    """Masks that fill the left half of their boxes."""
    mask = torch.zeros(n, side, side)
    mask[:, :, : side // 2] = 1
    return mask


@pytest.fixture
def small_world() -> Callable[..., ShapesDataConfig]:
    def make(**evaluation) -> ShapesDataConfig:
        return ShapesDataConfig(
            image_size=SIDE,
            world=ShapesWorld(num_train=4, num_val=3, image_side=96, objects=(1, 3)),
            jitter=JitterConfig(),
            evaluation=EvaluationConfig(**evaluation),
        )

    return make


def test_views_of_an_image_follow_one_another(small_world) -> None:
    data = val_set(small_world(sizes=(64, 96), flip=True))
    assert (len(data), data.num_views, data.groups) == (12, 4, [4, 4, 4])
    samples = [data[SampleKey(0, 0, index)] for index in range(12)]
    assert [sample.target.image_id for sample in samples] == [i for i in data.image_ids for _ in range(4)]
    assert [sample.target.view.number for sample in samples] == [0, 1, 2, 3] * 3
    assert [sample.target.size for sample in samples[:4]] == [(64, 64), (64, 64), (96, 96), (96, 96)]
    plain, flipped = samples[2], samples[3]
    assert not plain.target.view.is_flipped
    assert flipped.target.view.is_flipped
    torch.testing.assert_close(flipped.image, plain.image.flip(-1))
    torch.testing.assert_close(flipped.target.masks, plain.target.masks.flip(-1))
    assert data.image_path(11) == data.image_path(8) != data.image_path(7)
    # A batch holds views of one image and one size only, so what is found does not depend on it.
    batches = list(val_loader(data, batch_size=3, rank=0, world_size=1, groups=data.groups, max_batch=data.max_batch))
    assert [len(batch.targets) for batch in batches] == [2] * 6
    assert all(len({(target.image_id, target.size) for target in batch.targets}) == 1 for batch in batches)


def test_without_sizes_and_flip_nothing_changes(small_world) -> None:
    data = val_set(small_world())
    assert (len(data), data.num_views) == (3, 1)
    assert data[SampleKey(0, 0, 0)].target.view is None
    # Training knows no views.
    assert train_set(small_world(sizes=(64, 96), flip=True)).num_views == 1


def test_short_sides_and_their_limit_grow_together(small_world) -> None:
    config = EvaluationConfig(resize="short_side", short_side=32, max_side=40, sizes=(32, 64))
    data = val_set(dataclasses.replace(small_world(), evaluation=config))
    assert [data[SampleKey(0, 0, i)].target.size for i in range(2)] == [(32, 32), (64, 64)]


def test_a_mirrored_view_is_turned_back() -> None:
    view = DetectionView(1, 2, is_flipped=True)
    found = on_disk(result([[10, 5, 30, 25]], [0.9], [2], left_half(), view=view))
    torch.testing.assert_close(found.boxes, torch.tensor([[140.0, 10.0, 180.0, 50.0]]))
    torch.testing.assert_close(found.masks, left_half().flip(-1))
    assert found.size == found.original_size == (100, 200)


def test_views_of_one_object_become_one_detection() -> None:
    plain = result([[10, 5, 30, 25]], [0.8], [2], left_half(), view=DetectionView(0, 2))
    mirrored = result([[70, 5, 90, 25]], [0.9], [2], left_half().flip(-1), view=DetectionView(1, 2, is_flipped=True))
    # In a view of twice the size.
    larger = dataclasses.replace(mirrored, boxes=mirrored.boxes * 2, size=(100, 200))
    for second in (mirrored, larger):
        merged = merge_views([plain, second], EvaluationConfig())
        torch.testing.assert_close(merged.boxes, torch.tensor([[20.0, 10.0, 60.0, 50.0]]))
        assert merged.scores.tolist() == pytest.approx([0.9])
        torch.testing.assert_close(merged.masks, left_half(), atol=1e-5, rtol=0)
        assert (merged.size, merged.view) == ((100, 200), None)


def test_masks_vote_by_score_within_their_class_and_best_takes_its_own() -> None:
    boxes = [[10, 10, 30, 30], [10, 10, 30, 30], [10, 10, 30, 30], [60, 10, 80, 30]]
    masks = torch.cat([torch.ones(1, 4, 4), torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    views = [result(boxes, [0.6, 0.2, 0.5, 0.4], [0, 0, 1, 0], masks, view=DetectionView(0, 1))]
    merged = merge_views(views, EvaluationConfig())
    assert merged.labels.tolist() == [0, 1, 0]
    assert merged.scores.tolist() == pytest.approx([0.6, 0.5, 0.4])
    # (0.6 x 1 + 0.2 x 0) / 0.8; the other class and the far box do not vote.
    for mask, expected in zip(merged.masks, (0.75, 0.0, 1.0)):
        torch.testing.assert_close(mask, torch.full((4, 4), expected), atol=1e-5, rtol=0)
    best = merge_views(views, EvaluationConfig(merged_masks="best"))
    torch.testing.assert_close(best.masks[0], torch.ones(4, 4))
    assert len(merge_views(views, EvaluationConfig(num_detections=2)).boxes) == 2
    assert len(merge_views(views, EvaluationConfig(merge_iou=1.0)).boxes) == 4


def test_a_resampled_mask_lies_where_it_lay() -> None:
    cells = torch.linspace(-1, 1, 28)
    disc = (1.2 - cells[:, None] ** 2 - 1.5 * (cells[None] + 0.2) ** 2).clamp(0, 1)[None]
    box, onto = torch.tensor([[20.0, 10.0, 76.0, 66.0]]), torch.tensor([[6.0, 3.0, 90.0, 87.0]])
    first, second = (
        mask_api.decode(paste_mask(mask[0].numpy(), where[0].tolist(), 100, 100))
        for mask, where in ((disc, box), (resample(disc, box, onto), onto))
    )
    assert first.sum() > 1000
    # Only pixels of the border may differ: the other grid is coarser.
    assert (first != second).sum() < 0.02 * first.sum()
    torch.testing.assert_close(resample(disc, box, box), disc, atol=1e-5, rtol=0)


def test_nothing_found_in_any_view_is_no_detection() -> None:
    nothing = result([], [], [], torch.zeros(0, 4, 4), view=DetectionView(0, 2))
    merged = merge_views([nothing, dataclasses.replace(nothing, view=DetectionView(1, 2))], EvaluationConfig())
    assert merged.boxes.shape == (0, 4)
    assert merged.masks.shape == (0, 4, 4)


def record(image_id=1) -> dict[str, Any]:
    return {"id": image_id, "file_name": "a.jpg", "height": 100, "width": 200, "annotations": []}


def test_the_evaluator_waits_for_all_views() -> None:
    evaluator = CocoEvaluator([record()], ["a", "b", "c"], [1, 2, 3])
    first = result([[10, 5, 30, 25]], [0.8], [2], left_half(), view=DetectionView(0, 2))
    second = result([[70, 5, 90, 25]], [0.9], [2], left_half().flip(-1), view=DetectionView(1, 2, is_flipped=True))
    evaluator.update([second])
    with pytest.raises(DataError, match="1 of its 2 views"):
        evaluator.state()
    with pytest.raises(DataError, match="came twice"):
        evaluator.update([second])
    evaluator.update([first])
    (entry,) = evaluator.results_json()
    assert entry["bbox"] == [20.0, 10.0, 40.0, 40.0]
    assert evaluator.state()["found"].keys() == {1}
    with pytest.raises(DataError, match="came twice"):
        evaluator.update([first])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"sizes": (64, 64)}, "different sizes"),
        ({"sizes": (16,)}, "at least 32"),
        ({"merge_iou": 0.0}, "merge_iou"),
        ({"num_detections": 0}, "num_detections"),
    ],
)
def test_impossible_views_are_refused(fields, match) -> None:
    with pytest.raises(DataError, match=match):
        EvaluationConfig(**fields)
