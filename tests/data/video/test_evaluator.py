"""Video accuracy: views averaged, ties against the true class, shares of ranks, and what an accuracy is over."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from permafrost.data import ClipResult, DataError, VideoEvaluator
from permafrost.data.pictures.plots import confusion_picture

CLASSES = [f"c{i}" for i in range(7)]


def results_of(scores, *, unreadable=()) -> list[ClipResult]:
    """One result per (video, view) of scores (N, V, K)."""
    return [
        ClipResult(video, view, torch.tensor(row), (video, view) not in unreadable)
        for video, views in enumerate(scores)
        for view, row in enumerate(views)
    ]


def make(num_videos=20, num_views=3, seed=0, **options) -> tuple[VideoEvaluator, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 7, num_videos)
    scores = rng.dirichlet(np.ones(7), (num_videos, num_views)).astype(np.float32)
    return VideoEvaluator(labels, CLASSES, num_views=num_views, **options), labels, scores


def test_top1_and_top5_are_those_of_a_plain_count() -> None:
    evaluator, labels, scores = make(200)
    evaluator.update(results_of(scores))
    metrics = evaluator.compute()
    mean = scores.astype(np.float64).mean(axis=1)
    order = np.argsort(-mean, axis=1)
    assert metrics["video/top1"] == pytest.approx((order[:, 0] == labels).mean())
    assert metrics["video/top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(axis=1).mean())
    for number, name in enumerate(CLASSES):
        assert metrics[f"video/top1-{name}"] == pytest.approx((order[labels == number, 0] == number).mean())
    each = [metrics[f"video/top1-{name}"] for name in CLASSES]
    assert metrics["video/mean_class"] == pytest.approx(np.mean(each))
    matrix = evaluator.confusion()
    assert matrix.sum() == 200
    assert np.trace(matrix) == round(metrics["video/top1"] * 200)
    assert (matrix.sum(axis=1) == np.bincount(labels, minlength=7)).all()


def test_views_are_averaged_as_probabilities_and_can_outvote_one() -> None:
    evaluator = VideoEvaluator([0], CLASSES[:2], num_views=3)
    evaluator.update(results_of(np.array([[[0.2, 0.8], [0.9, 0.1], [0.6, 0.4]]], dtype=np.float32)))
    assert evaluator.compute()["video/top1"] == 1.0
    (entry,) = evaluator.results_json()
    assert entry["top"][0] == {"label": "c0", "score": pytest.approx(0.566667)}
    assert entry["num_views"] == 3


def test_a_head_that_says_nothing_is_wrong() -> None:
    evaluator = VideoEvaluator([0, 1, 2], CLASSES)
    evaluator.update(results_of(np.full((3, 1, 7), 1 / 7, dtype=np.float32)))
    metrics = evaluator.compute()
    assert metrics["video/top1"] == 0.0
    assert metrics["video/top5"] == 0.0


def test_ranks_shares_meet_in_one() -> None:
    whole, _, scores = make()
    results = results_of(scores)
    whole.update(results)
    shares = []
    for part in (results[::2], results[1::2]):
        evaluator, _, _ = make()
        evaluator.update(part)
        shares.append(evaluator.state())
    evaluator.merge(shares)
    assert evaluator.compute() == whole.compute()
    with pytest.raises(DataError, match="came from two ranks"):
        evaluator.merge([shares[0], shares[0]])


def test_an_accuracy_says_what_it_is_over() -> None:
    evaluator, labels, scores = make(20, num_missing=4)
    evaluator.update(results_of(scores, unreadable={(5, 1), (9, 0), (9, 2)}))
    metrics = evaluator.compute()
    assert (metrics["video/num_videos"], metrics["video/num_clips"]) == (18, 54)
    assert (metrics["video/num_unreadable"], metrics["video/num_missing"]) == (2, 4)
    kept = [i for i in range(20) if i not in (5, 9)]
    expected = (scores.astype(np.float64).mean(axis=1).argmax(axis=1) == labels)[kept].mean()
    assert metrics["video/top1"] == pytest.approx(expected)
    assert len(evaluator.results_json()) == 18


def test_what_cannot_be_scored_is_named() -> None:
    evaluator, _, scores = make()
    results = results_of(scores)
    with pytest.raises(DataError, match="60 of 60 views have no result"):
        evaluator.compute()
    evaluator.update(results[:1])
    with pytest.raises(DataError, match="two results for view 0 of video 0"):
        evaluator.update(results[:1])
    with pytest.raises(DataError, match="view 3 of video 0, which the data set does not have"):
        evaluator.update([ClipResult(0, 3, results[0].scores)])
    with pytest.raises(DataError, match="not finite"):
        evaluator.update([ClipResult(0, 1, torch.full((7,), float("nan")))])
    broken, _, scores = make()
    broken.update(results_of(scores, unreadable={(video, 0) for video in range(11)}))
    with pytest.raises(DataError, match="11 of 20 validation videos cannot be decoded, 10 are tolerated"):
        broken.compute()


@pytest.mark.parametrize("count", [3, 60])
def test_the_confusion_matrix_is_a_picture_that_shows_the_diagonal(count) -> None:
    names = [f"class {i}" for i in range(count)]
    right = confusion_picture(np.eye(count, dtype=np.int64) * 4, names)
    wrong = confusion_picture(np.roll(np.eye(count, dtype=np.int64) * 4, 1, axis=1), names)
    assert right.dtype == np.uint8
    assert right.shape[2] == 3
    assert right.shape == wrong.shape
    assert (right != wrong).any()
