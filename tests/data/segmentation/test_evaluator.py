"""mIoU and what leads to it: scores of segments, merged views, the confusion matrix over ranks, submission files."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from permafrost.data.build import val_set
from permafrost.data.errors import DataError
from permafrost.data.pictures.geometry import NO_CLASS
from permafrost.data.segmentation import merging
from permafrost.data.segmentation.config import ADE20KDataConfig, SegmentationEvaluationConfig
from permafrost.data.segmentation.evaluator import SegmentationEvaluator
from permafrost.data.segmentation.merging import ViewMerger, best_class, class_scores
from permafrost.data.segmentation.types import SegmentationResult
from permafrost.data.segmentation.views import plan_views
from permafrost.data.types import SampleKey

sys.path.insert(0, str(Path(__file__).parent))
from scene_files import write_scenes

CLASSES = ("sky", "wall", "tree")


def result_of(classes: np.ndarray, image_id: int = 0, num_classes: int = 3, **fields) -> SegmentationResult:
    """One segment for each class, exactly where a map (H, W) has it."""
    masks = torch.stack([torch.from_numpy(classes == k) for k in range(num_classes)]).float() * 40 - 20
    size = classes.shape
    defaults = {"canvas": size, "size": size, "original_size": size}
    return SegmentationResult(image_id, torch.eye(num_classes), masks, **{**defaults, **fields})


def maps(number: int, num_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A true and a predicted map, of which half the pixels agree, some ignored."""
    rng = np.random.default_rng(number)
    true = rng.integers(0, num_classes, (20 + number, 30), dtype=np.uint8)
    predicted = np.where(rng.random(true.shape) < 0.5, true, rng.integers(0, num_classes, true.shape)).astype(np.uint8)
    return np.where(rng.random(true.shape) < 0.1, NO_CLASS, true).astype(np.uint8), predicted


def evaluator(number: int, **fields) -> SegmentationEvaluator:
    """Build an evaluator of so many images, whose truth is that of `maps`."""
    names = [f"photo{index}.jpg" for index in range(number)]
    return SegmentationEvaluator(CLASSES, names, truth=lambda image_id, size: maps(image_id)[0], **fields)


def test_numbers_equal_those_of_plain_sets_of_pixels() -> None:
    ours = evaluator(4)
    for index in range(4):
        ours.update([result_of(maps(index)[1], index)])
    ours.merge([ours.state()])
    true, predicted = (np.concatenate([maps(index)[part].ravel() for index in range(4)]) for part in (0, 1))
    known = true != NO_CLASS
    true, predicted = true[known], predicted[known]
    iou = [((true == k) & (predicted == k)).sum() / ((true == k) | (predicted == k)).sum() for k in range(3)]
    recall = [(predicted[true == k] == k).mean() for k in range(3)]
    metrics = ours.compute()
    assert metrics["semantic/mIoU"] == pytest.approx(np.mean(iou), abs=1e-12)
    assert metrics["semantic/pixel_accuracy"] == pytest.approx((true == predicted).mean(), abs=1e-12)
    assert metrics["semantic/mean_accuracy"] == pytest.approx(np.mean(recall), abs=1e-12)
    for name, value in zip(CLASSES, iou):
        assert metrics[f"semantic/IoU-{name}"] == pytest.approx(value, abs=1e-12)
    listed = ours.results_json()
    assert [entry["class"] for entry in listed] == list(CLASSES)
    assert sum(entry["labelled_pixels"] for entry in listed) == known.sum()


def test_ranks_add_up_to_the_same_integers() -> None:
    whole, parts = evaluator(5), [evaluator(5) for _ in range(3)]
    for index in range(5):
        result = result_of(maps(index)[1], index)
        whole.update([result])
        parts[index % 3].update([result])
    merged = evaluator(5)
    merged.merge([part.state() for part in parts])
    assert merged.confusion.dtype == np.int64
    assert np.array_equal(merged.confusion, whole.confusion)
    assert merged.compute() == whole.compute()
    with pytest.raises(DataError, match="came from two ranks"):
        merged.merge([parts[0].state(), parts[0].state()])


def test_a_class_without_a_labelled_pixel_does_not_count() -> None:
    true = np.array([[0, 0, 1, 1]], dtype=np.uint8)
    ours = SegmentationEvaluator(CLASSES, ["a.jpg"], truth=lambda *_: true)
    ours.update([result_of(np.array([[0, 2, 1, 1]], dtype=np.uint8))])
    metrics = ours.compute()
    assert metrics["semantic/mIoU"] == pytest.approx((0.5 + 1) / 2)
    assert "semantic/IoU-tree" not in metrics


def test_what_cannot_be_scored_is_an_error() -> None:
    ours = evaluator(2)
    good = result_of(maps(0)[1], 0)
    for name in ("class_scores", "mask_logits"):
        bad = dataclasses.replace(good, **{name: torch.full_like(getattr(good, name), float("nan"))})
        with pytest.raises(DataError, match=r"photo0\.jpg.*not numbers"):
            ours.update([bad])
    ours.update([good])
    with pytest.raises(DataError, match="came twice"):
        ours.update([good])
    with pytest.raises(DataError, match="not among the 2"):
        ours.update([result_of(maps(0)[1], 2)])
    with pytest.raises(DataError, match=r"1 of 2 images have no result, the first: photo1\.jpg"):
        ours.compute()
    nothing = SegmentationEvaluator(CLASSES, ["a.jpg"], truth=lambda _, size: np.full(size, NO_CLASS, dtype=np.uint8))
    nothing.update([result_of(maps(0)[1])])
    with pytest.raises(DataError, match="not one labelled pixel"):
        nothing.compute()


def test_scores_are_those_of_the_definition() -> None:
    """Every pixel and class by itself: the sum over segments of class probability times mask probability."""
    random = torch.Generator().manual_seed(0)
    scores = torch.rand(7, 3, generator=random)
    logits = torch.randn(7, 8, 12, generator=random)
    result = SegmentationResult(0, scores, logits, canvas=(32, 48), size=(30, 41), original_size=(60, 82))
    found = class_scores(result)
    assert found.shape == (3, 30, 41)
    large = F.interpolate(logits.double()[None], size=(32, 48), mode="bilinear", align_corners=False)[0].sigmoid()
    for row, column, k in ((0, 0, 0), (29, 40, 2), (13, 7, 1)):
        expected = sum(float(scores[q, k]) * float(large[q, row, column]) for q in range(7))
        assert float(found[k, row, column]) == pytest.approx(expected, rel=1e-5)
    resized = F.interpolate(found[None], size=(60, 82), mode="bilinear", align_corners=False)[0]
    assert torch.equal(best_class(found, (60, 82)), resized.argmax(dim=0).to(torch.uint8))


def test_classes_in_parts_give_the_same_map(monkeypatch) -> None:
    scores = torch.rand(9, 10, 14, generator=torch.Generator().manual_seed(1))
    scores[4] = scores[2]
    whole = best_class(scores, (33, 47))
    monkeypatch.setattr(merging, "_MAX_ELEMENTS", 2 * 33 * 47)
    assert torch.equal(best_class(scores, (33, 47)), whole)


def seen_through(
    truth: np.ndarray, evaluation: SegmentationEvaluationConfig, image_size: int = 16
) -> Iterator[SegmentationResult]:
    """Results of a head that sees a coarse map of the true classes in every view."""
    size = truth.shape
    for view in plan_views(size, image_size, evaluation):
        one = F.one_hot(torch.from_numpy(truth).long(), 3).permute(2, 0, 1).float()
        scaled = F.interpolate(one[None], size=view.scaled, mode="bilinear", align_corners=False)[0]
        (top, left), side = view.place, image_size if evaluation.mode == "slide" else 10**6
        part = scaled[:, top : top + side, left : left + side]
        if view.is_flipped:
            part = part.flip(-1)
        shown = (part.shape[-2], part.shape[-1])
        yield SegmentationResult(0, torch.eye(3), part * 20 - 10, shown, shown, size, view)


@pytest.mark.parametrize(
    "evaluation",
    [
        SegmentationEvaluationConfig(),
        SegmentationEvaluationConfig(flip=True),
        SegmentationEvaluationConfig(scales=(0.75, 1.0, 1.5), flip=True),
        SegmentationEvaluationConfig(mode="slide"),
        SegmentationEvaluationConfig(mode="slide", scales=(1.0, 1.5), flip=True, stride=0.5),
    ],
)
def test_views_of_one_scene_merge_to_it(evaluation) -> None:
    """Quadrants of three classes: every view sees them, mirrored, cut or scaled, and the map is theirs but for the seams."""
    truth = np.zeros((32, 48), dtype=np.uint8)
    truth[:16, 24:], truth[16:] = 1, 2
    merger = ViewMerger()
    found = [merger.add(result) for result in seen_through(truth, evaluation)]
    assert all(one is None for one in found[:-1])
    assert merger.unfinished is None
    wrong = found[-1].numpy() != truth
    assert wrong.mean() < 0.03
    # One row or column beside a seam at most.
    assert not wrong[:14, :22].any()
    assert not wrong[18:].any()


def test_merged_scores_are_means_of_the_views() -> None:
    """Two scales and a flip by hand: the mean of the resized scores decides."""
    random = torch.Generator().manual_seed(4)
    evaluation = SegmentationEvaluationConfig(scales=(0.5, 1.0), flip=True)
    merger, total = ViewMerger(), 0
    for view in plan_views((20, 28), 20, evaluation):
        shown = view.scaled
        result = SegmentationResult(
            0,
            torch.rand(5, 3, generator=random),
            torch.randn(5, *shown, generator=random),
            shown,
            shown,
            (20, 28),
            view,
        )
        scores = class_scores(result)
        scores = scores.flip(-1) if view.is_flipped else scores
        total = total + F.interpolate(scores[None], size=(20, 28), mode="bilinear", align_corners=False)[0]
        found = merger.add(result)
    assert torch.equal(found, total.argmax(dim=0).to(torch.uint8))


def test_views_out_of_order_are_an_error() -> None:
    truth = np.zeros((16, 16), dtype=np.uint8)
    views = list(seen_through(truth, SegmentationEvaluationConfig(flip=True)))
    merger = ViewMerger()
    with pytest.raises(DataError, match="view 1 of image 0 came where view 0"):
        merger.add(views[1])
    merger.add(views[0])
    with pytest.raises(DataError, match="view 0 of image 3 came where view 1 of image 0"):
        merger.add(dataclasses.replace(views[0], image_id=3))
    ours = evaluator(1)
    ours.update([dataclasses.replace(views[0], class_scores=torch.eye(3))])
    with pytest.raises(DataError, match=r"views of image photo0\.jpg are missing"):
        ours.merge([ours.state()])


def test_submission_files_hold_the_labels_of_the_benchmark(tmp_path) -> None:
    ours = SegmentationEvaluator(CLASSES, ["ADE_test_00000001.jpg"], submission=tmp_path / "made")
    found = maps(1)[1]
    ours.update([result_of(found)])
    with Image.open(tmp_path / "made" / "ADE_test_00000001.png") as written:
        assert written.mode == "L"
        assert np.array_equal(np.array(written), found + 1)
    assert ours.compute() == {}
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        SegmentationEvaluator(CLASSES, ["a.jpg"], submission=tmp_path / "file").update([result_of(found)])


def test_a_data_set_scores_itself(tmp_path) -> None:
    """Truth through every view of real files: what the evaluator reads again is what the samples showed."""
    root = write_scenes(tmp_path, num_classes=3)
    (root / "objectInfo150.txt").write_text("Idx\tName\n1\tsky\n2\twall\n3\ttree\n")
    evaluation = SegmentationEvaluationConfig(mode="slide", flip=True)
    dataset = val_set(ADE20KDataConfig(root=str(root), image_size=64, evaluation=evaluation))
    ours = dataset.evaluator()
    for index in range(len(dataset)):
        target = dataset[SampleKey(0, 0, index)].target
        shown = target.semantic.numpy()
        result = result_of(
            shown,
            target.image_id,
            canvas=shown.shape,
            size=target.size,
            original_size=target.original_size,
            view=target.view,
        )
        ours.update([result])
    ours.merge([ours.state()])
    # Where the file has no label anything may be predicted; elsewhere only borders of patches are lost in resizing.
    assert ours.compute()["semantic/mIoU"] > 0.85
