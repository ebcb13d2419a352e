"""Scores against pycocotools called directly, and against answers known beforehand."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.nn import functional
from torchvision.ops import roi_align

from permafrost.data.build import val_set
from permafrost.data.detection.config import EvaluationConfig
from permafrost.data.detection.dataset import CocoDetection
from permafrost.data.detection.evaluator import STATISTICS, CocoEvaluator
from permafrost.data.detection.masks import decode_masks, paste_mask
from permafrost.data.detection.types import DetectionResult, DetectionTarget
from permafrost.data.errors import DataError
from permafrost.data.types import SampleKey


def targets_of(dataset: CocoDetection) -> list[DetectionTarget]:
    return [dataset[SampleKey(0, 0, index)].target for index in range(len(dataset))]


def grids(masks: torch.Tensor, boxes: torch.Tensor, side: int) -> torch.Tensor:
    """Masks (N, H, W) resampled to each box's own grid, (N, side, side)."""
    if not len(boxes):
        return torch.zeros(0, side, side)
    rois = torch.cat([torch.arange(len(boxes))[:, None].float(), boxes], dim=1)
    return roi_align(masks[:, None].float(), rois, side, 1.0, sampling_ratio=2, aligned=True)[:, 0]


def result_of(target: DetectionTarget, with_masks: bool = True, **changes) -> DetectionResult:
    """The truth as a prediction."""
    fields = {
        "image_id": target.image_id,
        "boxes": target.boxes,
        "labels": target.labels,
        "scores": torch.linspace(1.0, 0.5, len(target.boxes)),
        "masks": grids(target.masks, target.boxes, 28) if with_masks else None,
        "size": target.size,
        "original_size": target.original_size,
    }
    return DetectionResult(**{**fields, **changes})


def exact_results(dataset: CocoDetection, scale: float = 1.0) -> list[DetectionResult]:
    """The annotations themselves as predictions of a network whose input is the file scaled by `scale`, without rounding."""
    results = []
    for record in dataset.records:
        height, width = record["height"], record["width"]
        entries = [entry for entry in record["annotations"] if not entry["iscrowd"]]
        boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = torch.from_numpy(decode_masks([entry["segmentation"] for entry in entries], height, width))
        result = DetectionResult(
            image_id=record["id"],
            boxes=boxes * scale,
            labels=torch.tensor([entry["label"] for entry in entries], dtype=torch.int64),
            scores=torch.linspace(1.0, 0.5, len(entries)),
            masks=grids(masks, boxes, 28),
            size=(round(height * scale), round(width * scale)),
            original_size=(height, width),
        )
        results.append(result)
    return results


def noisy_results(dataset: CocoDetection, seed: int) -> list[DetectionResult]:
    """Truth with boxes shaken, some lost, some labels wrong, some invented: an AP well inside 0..1."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for target in targets_of(dataset):
        kept = torch.rand(len(target.boxes), generator=generator) < 0.8
        boxes = torch.cat([target.boxes[kept], target.boxes[:1] * 0.6])
        labels = torch.cat([target.labels[kept], target.labels[:1]])
        masks = torch.cat([grids(target.masks, target.boxes, 28)[kept], torch.rand(min(1, len(target.boxes)), 28, 28)])
        boxes = boxes + torch.randn(boxes.shape, generator=generator) * 1.5
        boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], dim=1)
        wrong = torch.rand(len(labels), generator=generator) < 0.15
        labels = torch.where(wrong, (labels + 1) % len(dataset.classes), labels)
        scores = torch.rand(len(labels), generator=generator)
        results.append(result_of(target, boxes=boxes, labels=labels, scores=scores, masks=masks))
    return results


def direct(annotation_file, results_json: list[dict], kind: str) -> COCOeval:
    """pycocotools as its demo uses it, from the files."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file))
        stripped = [{k: v for k, v in entry.items() if kind == "bbox" or k != "bbox"} for entry in results_json]
        evaluation = COCOeval(truth, truth.loadRes(stripped), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def test_truth_as_prediction_scores_1(shapes_config) -> None:
    dataset = val_set(shapes_config)
    evaluator = dataset.evaluator()
    evaluator.update([result_of(target) for target in targets_of(dataset)])
    metrics = evaluator.compute()
    assert metrics["bbox/AP"] == pytest.approx(1.0)
    # Thin parts of large objects are lost between 28 x 28 cells.
    assert metrics["segm/AP50"] == pytest.approx(1.0)
    assert metrics["segm/AP"] > 0.95


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0, 8.0])
def test_boxes_and_masks_are_scaled_back_to_the_file(shapes_config, scale) -> None:
    """The annotations at another network size come back exactly: boxes to the bit, masks as far as 28 x 28 cells hold them."""
    dataset = val_set(shapes_config)
    evaluator = dataset.evaluator()
    evaluator.update(exact_results(dataset, scale))
    metrics = evaluator.compute()
    assert metrics["bbox/AP"] == pytest.approx(1.0)
    assert metrics["segm/AP"] > 0.95


def test_boxes_of_an_image_that_is_not_square(hand_made) -> None:
    """48 x 64 fitted into 32: size (24, 32), so everything doubles on the way back."""
    dataset = val_set(hand_made.config(image_size=32))
    target = next(target for target in targets_of(dataset) if target.image_id == 21)
    evaluator = dataset.evaluator()
    boxes = torch.tensor([[1.0, 2.0, 11.0, 7.5], [30.0, 20.0, 40.0, 30.0]])
    evaluator.update(
        [result_of(target, boxes=boxes, labels=torch.tensor([2, 0]), scores=torch.tensor([0.9, 0.5]), masks=None)]
    )
    first, second = evaluator.results_json()
    assert first == {"image_id": 21, "category_id": 70, "bbox": [2, 4, 20, 11], "score": pytest.approx(0.9)}
    # Clipped to the image.
    assert second["bbox"] == [60, 40, 4, 8]
    assert second["category_id"] == 5


@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_are_those_of_pycocotools(shapes_config, seed) -> None:
    dataset = val_set(shapes_config)
    evaluator = dataset.evaluator()
    evaluator.update(noisy_results(dataset, seed))
    # Through text, as `predict` writes it. The boxes there are rounded to a thousandth of a pixel.
    listed = json.loads(json.dumps(evaluator.results_json()))
    metrics = evaluator.compute()
    for kind in ("bbox", "segm"):
        expected = direct(dataset.annotation_file, listed, kind)
        assert 0.1 < metrics[f"{kind}/AP"] < 0.9
        for name, value in zip(STATISTICS, expected.stats):
            if value < 0:
                assert f"{kind}/{name}" not in metrics
            else:
                assert metrics[f"{kind}/{name}"] == pytest.approx(value, abs=1e-9)
        for position, category_id in enumerate(expected.params.catIds):
            name = dataset.classes[dataset.category_ids.index(category_id)]
            values = expected.eval["precision"][:, :, position, 0, 2]
            assert metrics[f"{kind}/AP-{name}"] == pytest.approx(values[values > -1].mean(), abs=1e-9)


def test_max_val_images_scores_those_only(shapes_config) -> None:
    part = val_set(replace(shapes_config, max_val_images=6))
    evaluator = part.evaluator()
    evaluator.update([result_of(target) for target in targets_of(part)])
    assert evaluator.compute()["bbox/AP"] == pytest.approx(1.0)
    # The same six against all 24 leave the others' objects unfound.
    whole = val_set(shapes_config).evaluator()
    whole.update([result_of(target) for target in targets_of(part)])
    assert whole.compute()["bbox/AP"] < 0.6


def test_no_predictions_score_0(shapes_config) -> None:
    dataset = val_set(shapes_config)
    assert dataset.evaluator().compute()["bbox/AP"] == 0.0
    evaluator = dataset.evaluator()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    evaluator.update([result_of(target, **empty, masks=torch.zeros(0, 28, 28)) for target in targets_of(dataset)])
    metrics = evaluator.compute()
    assert set(metrics.values()) == {0.0}
    for name in ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP75", "bbox/AP-ring"):
        assert name in metrics
    assert evaluator.results_json() == []


def test_a_head_without_masks_has_no_mask_scores(shapes_config) -> None:
    dataset = val_set(shapes_config)
    evaluator = dataset.evaluator()
    evaluator.update([result_of(target, with_masks=False) for target in targets_of(dataset)])
    metrics = evaluator.compute()
    assert metrics["bbox/AP"] == pytest.approx(1.0)
    assert not any(name.startswith("segm") for name in metrics)
    assert "segmentation" not in evaluator.results_json()[0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("scores", float("nan"), "score that is not a number"), ("boxes", float("inf"), "box that is not finite")],
)
def test_numbers_that_are_none_name_the_image(shapes_config, field, value, message) -> None:
    dataset = val_set(shapes_config)
    target = next(target for target in targets_of(dataset) if len(target.boxes))
    result = result_of(target)
    getattr(result, field).view(-1)[0] = value
    with pytest.raises(DataError, match=message) as error:
        dataset.evaluator().update([result])
    assert f"image {target.image_id} ({target.image_id:012d}.jpg)" in str(error.value)


def test_unknown_and_repeated_images_are_refused(shapes_config) -> None:
    dataset = val_set(shapes_config)
    target = targets_of(dataset)[0]
    evaluator = dataset.evaluator()
    with pytest.raises(DataError, match="image 5, which is not among the 24"):
        evaluator.update([result_of(target, image_id=5)])
    evaluator.update([result_of(target)])
    with pytest.raises(DataError, match="came twice"):
        evaluator.update([result_of(target)])


def test_ranks_together_score_as_one(shapes_config) -> None:
    import pickle

    dataset = val_set(shapes_config)
    results = noisy_results(dataset, seed=3)
    alone, parts = dataset.evaluator(), [dataset.evaluator() for _ in range(3)]
    alone.update(results)
    for position, result in enumerate(results):
        parts[position % 2].update([result])
    # The third rank had padding batches only.
    states = [pickle.loads(pickle.dumps(part.state())) for part in parts]
    parts[0].merge(states)
    assert parts[0].compute() == alone.compute()
    assert parts[0].results_json() == alone.results_json()
    with pytest.raises(DataError, match="two ranks"):
        parts[1].merge([states[0], states[0]])


def test_annotation_ids_from_0_lose_nothing(hand_made) -> None:
    """pycocotools alone never counts the annotation with id 0 as found."""
    for number, entry in enumerate(hand_made.content["val"]["annotations"]):
        entry["id"] = number
    dataset = val_set(hand_made.write())
    evaluator = dataset.evaluator()
    evaluator.update(exact_results(dataset))
    assert evaluator.compute()["bbox/AP"] == pytest.approx(1.0)
    assert direct(hand_made.json("val"), evaluator.results_json(), "bbox").stats[0] < 0.99


def test_annotations_without_area_and_crowd_flag(hand_made) -> None:
    for entry in hand_made.content["val"]["annotations"]:
        del entry["area"]
        if not entry["iscrowd"]:
            del entry["iscrowd"]
    dataset = val_set(hand_made.write())
    evaluator = dataset.evaluator()
    evaluator.update(exact_results(dataset))
    metrics = evaluator.compute()
    assert metrics["bbox/AP"] == pytest.approx(1.0)
    assert "bbox/APs" in metrics
    assert "bbox/APl" not in metrics


def test_detections_on_crowds_are_not_counted_as_wrong(hand_made) -> None:
    dataset = val_set(hand_made.config())
    scores = {}
    for label in (0, 2):
        evaluator = dataset.evaluator()
        for result in exact_results(dataset):
            if result.image_id == 12:
                # The surest detection of all lies on the crowd of apples (0).
                result.boxes = torch.cat([result.boxes, torch.tensor([[0.0, 0.0, 1.0, 5.0]])])
                result.labels = torch.cat([result.labels, torch.tensor([label])])
                result.scores = torch.cat([result.scores, torch.tensor([2.0])])
                result.masks = torch.cat([result.masks, torch.ones(1, 28, 28)])
            evaluator.update([result])
        scores[label] = evaluator.compute()
    # An apple there is ignored; a pear is a false positive ahead of every true one.
    assert scores[0]["bbox/AP"] == pytest.approx(1.0)
    assert scores[2]["bbox/AP-pear"] < 0.9
    assert scores[2]["bbox/AP-apple"] == pytest.approx(1.0)


def test_computing_prints_nothing(shapes_config, capfd) -> None:
    dataset = val_set(shapes_config)
    evaluator = dataset.evaluator()
    evaluator.update(noisy_results(dataset, 0))
    capfd.readouterr()
    evaluator.compute()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "box",
    [
        (3.0, 4.0, 17.0, 15.0),
        (3.3, 4.7, 17.2, 15.9),
        (-4.5, -3.0, 8.0, 9.5),
        (20.5, 10.5, 45.0, 33.0),
        (5.2, 5.2, 5.9, 28.0),
        (0.0, 0.0, 40.0, 30.0),
        (11.0, 12.0, 11.0, 12.0),
        (50.0, 50.0, 60.0, 60.0),
    ],
)
def test_pasting_is_grid_sampling_of_the_whole_image(box) -> None:
    """Against torch's grid_sample over every pixel of the image, in float64."""
    height, width = 30, 40
    generator = torch.Generator().manual_seed(1)
    probabilities = functional.interpolate(torch.rand((1, 1, 5, 5), generator=generator, dtype=torch.float64), 14)
    probabilities = functional.interpolate(probabilities, 28, mode="bilinear", align_corners=False)
    x0, y0, x1, y1 = box
    grid_x = (torch.arange(width).double() + 0.5 - x0) / max(x1 - x0, 1e-6) * 2 - 1
    grid_y = (torch.arange(height).double() + 0.5 - y0) / max(y1 - y0, 1e-6) * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(grid_x[None], grid_y[:, None]), dim=-1)[None]
    whole = functional.grid_sample(probabilities, grid, align_corners=False)[0, 0].numpy()
    encoded = paste_mask(probabilities[0, 0].numpy(), box, height, width)
    pasted = mask_api.decode(encoded)
    assert encoded["size"] == [height, width]
    sure = np.abs(whole - 0.5) > 1e-5
    inside = np.zeros((height, width), dtype=bool)
    inside[
        max(0, int(np.floor(y0))) : max(0, int(np.ceil(y1))), max(0, int(np.floor(x0))) : max(0, int(np.ceil(x1)))
    ] = True
    expected = (whole >= 0.5) & inside
    assert np.array_equal(pasted[sure], expected[sure])
    # Beyond the box grid_sample fades to zero within half a cell: it is at most at the border that the two could differ.
    assert ((whole >= 0.5) & ~inside).sum() <= 2 * (height + width)


def test_pasting_touches_only_the_box() -> None:
    """A small box in a large image takes no time that depends on the image."""
    import time

    probabilities = np.ones((28, 28))
    start = time.perf_counter()
    for _ in range(20):
        encoded = paste_mask(probabilities, (4000.0, 2000.0, 4020.0, 2030.0), 8000, 8000)
    assert (time.perf_counter() - start) / 20 < 0.05
    assert mask_api.area(encoded) == 20 * 30
    assert mask_api.toBbox(encoded).tolist() == [4000, 2000, 20, 30]


@pytest.mark.parametrize("with_masks", [True, False])
def test_the_faster_scorer_gives_the_same_numbers(shapes_config, with_masks) -> None:
    dataset = val_set(shapes_config)
    results = [replace(one, masks=one.masks if with_masks else None) for one in noisy_results(dataset, 0)]
    found = {}
    for name in ("pycocotools", "faster_coco_eval"):
        config = EvaluationConfig(scorer=name)
        evaluator = CocoEvaluator(list(dataset.records), dataset.classes, dataset.category_ids, config)
        evaluator.update(results)
        found[name] = evaluator.compute()
    assert found["faster_coco_eval"] == pytest.approx(found["pycocotools"], abs=1e-9)
    assert 0.05 < found["pycocotools"]["bbox/AP"] < 0.95
    assert ("segm/AP" in found["pycocotools"]) == with_masks


def test_a_scorer_that_is_not_installed_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(DataError, match=r"pip install 'permafrost\[fast-eval\]'"):
        CocoEvaluator([], [], [], EvaluationConfig(scorer="faster_coco_eval"))
