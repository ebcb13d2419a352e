"""Matching against torchvision's Matcher, crowd regions, and sampling by key."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from permafrost.data.types import SampleKey
from permafrost.heads.detection.sampling import NEGATIVE, POSITIVE, UNUSED, drop_ignored, match_boxes, sample_balanced


def random_boxes(count, seed, side=80) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    xy = torch.rand(count, 2, generator=random) * side
    return torch.cat([xy, xy + 5 + torch.rand(count, 2, generator=random) * 30], dim=1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("high", "low", "low_quality"), [(0.7, 0.3, True), (0.5, 0.5, False), (0.6, 0.2, False)])
def test_matching_equals_torchvision(seed, high, low, low_quality) -> None:
    candidates, gt_boxes = random_boxes(400, seed), random_boxes(7, 50 + seed)
    matcher = Matcher(high, low, allow_low_quality_matches=low_quality)
    expected = matcher(box_iou(gt_boxes, candidates))
    index, labels = match_boxes(
        candidates, gt_boxes, positive_iou=high, negative_iou=low, allow_low_quality=low_quality
    )
    assert torch.equal(labels == POSITIVE, expected >= 0)
    assert torch.equal(labels == NEGATIVE, expected == Matcher.BELOW_LOW_THRESHOLD)
    assert torch.equal(labels == UNUSED, expected == Matcher.BETWEEN_THRESHOLDS)
    assert torch.equal(index[expected >= 0], expected[expected >= 0])
    assert (labels == POSITIVE).any()


def test_no_ground_truth_makes_everything_negative() -> None:
    index, labels = match_boxes(random_boxes(9, 0), torch.zeros(0, 4), positive_iou=0.7, negative_iou=0.3)
    assert index.tolist() == [0] * 9
    assert labels.tolist() == [NEGATIVE] * 9


def test_a_box_that_touches_nothing_makes_nothing_positive() -> None:
    far, empty = torch.tensor([500.0, 500, 520, 520]), torch.tensor([10.0, 10, 10, 10])
    candidates = torch.cat([random_boxes(20, 0), empty[None]])
    for box in (far, empty):
        _, labels = match_boxes(candidates, box[None], positive_iou=0.7, negative_iou=0.3, allow_low_quality=True)
        assert labels.tolist() == [NEGATIVE] * 21


def test_negatives_inside_a_crowd_are_unused() -> None:
    crowd = torch.tensor([[10.0, 10, 30, 30], [60, 60, 70, 70]])
    candidates = torch.tensor(
        [
            [12.0, 12, 20, 20],  # inside
            [12.0, 12, 20, 20],  # inside, but positive
            [20.0, 10, 41, 30],  # 10/21 of it inside
            [20.0, 10, 39, 30],  # 10/19 of it inside
            [0.0, 0, 100, 100],  # holds the crowd, mostly outside of it
            [60.0, 60, 70, 70],  # the second region itself
            [80.0, 80, 90, 90],
        ]
    )
    labels = torch.tensor([NEGATIVE, POSITIVE, NEGATIVE, NEGATIVE, NEGATIVE, NEGATIVE, UNUSED])
    found = drop_ignored(labels, candidates, crowd, overlap=0.5)
    assert found.tolist() == [UNUSED, POSITIVE, NEGATIVE, UNUSED, NEGATIVE, UNUSED, UNUSED]
    assert torch.equal(drop_ignored(labels, candidates, crowd[:0], overlap=0.5), labels)
    assert torch.equal(drop_ignored(labels, candidates, crowd, overlap=1.0), labels)


def labels_of(num_positive, num_negative, num_unused, seed=0) -> torch.Tensor:
    labels = torch.tensor([POSITIVE] * num_positive + [NEGATIVE] * num_negative + [UNUSED] * num_unused)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


KEYS = [SampleKey(1, 0, i) for i in range(4)]


@pytest.mark.parametrize(
    ("have", "expected"),
    [
        ((50, 100, 10), (4, 12)),
        ((3, 100, 10), (3, 13)),
        ((0, 100, 10), (0, 16)),
        ((50, 5, 10), (4, 5)),
        ((2, 3, 1), (2, 3)),
        ((0, 0, 8), (0, 0)),
    ],
)
def test_numbers_of_samples(have, expected) -> None:
    labels = labels_of(*have)
    samples = sample_balanced([labels], KEYS[:1], "rpn", num_samples=16, positive_fraction=0.25)
    index, positive, valid = samples.index[0], samples.is_positive[0], samples.is_valid[0]
    assert (positive.sum(), (valid & ~positive).sum()) == expected
    assert (labels[index[positive]] == POSITIVE).all()
    assert (labels[index[valid & ~positive]] == NEGATIVE).all()
    assert len(set(index[valid].tolist())) == sum(expected)
    # Positive ones come first, unused slots last.
    assert torch.equal(positive, torch.arange(len(positive)) < expected[0])
    assert torch.equal(valid, torch.arange(len(valid)) < sum(expected))


def chosen(samples, row) -> list[int]:
    return samples.index[row][samples.is_valid[row]].tolist()


def test_the_draw_depends_on_the_key_alone() -> None:
    """Not on the other images, their number or length, the order, nor on the global generator."""
    options = {"num_samples": 16, "positive_fraction": 0.5}
    labels = [labels_of(20, 60 + 30 * i, 5, seed=i) for i in range(4)]
    torch.manual_seed(0)
    together = sample_balanced(labels, KEYS, "roi", **options)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for order in ([3, 1, 0, 2], [2], [0, 2]):
        again = sample_balanced([labels[i] for i in order], [KEYS[i] for i in order], "roi", **options)
        for row, i in enumerate(order):
            assert chosen(again, row) == chosen(together, i)
    assert torch.equal(torch.get_rng_state(), state)


def test_key_and_purpose_change_the_draw() -> None:
    options = {"num_samples": 16, "positive_fraction": 0.5}
    labels = labels_of(40, 100, 5)
    draws = [
        tuple(chosen(sample_balanced([labels], [key], purpose, **options), 0))
        for key, purpose in [
            (SampleKey(1, 0, 0), "rpn"),
            (SampleKey(1, 0, 0), "roi"),
            (SampleKey(1, 0, 1), "rpn"),
            (SampleKey(1, 1, 0), "rpn"),
            (SampleKey(2, 0, 0), "rpn"),
        ]
    ]
    assert len(set(draws)) == 5


def test_every_candidate_is_drawn_equally_often() -> None:
    labels = labels_of(20, 40, 5)
    drawn = torch.zeros(len(labels))
    for epoch in range(600):
        samples = sample_balanced([labels], [SampleKey(0, epoch, 0)], "rpn", num_samples=20, positive_fraction=0.25)
        drawn[samples.index[0][samples.is_valid[0]]] += 1
    # 5 of 20 positives, 15 of 40 negatives: binomial means of 150 and 225, 5 standard deviations each side.
    assert (drawn[labels == POSITIVE] - 150).abs().max() < 5 * (600 * 0.25 * 0.75) ** 0.5
    assert (drawn[labels == NEGATIVE] - 225).abs().max() < 5 * (600 * 0.375 * 0.625) ** 0.5
    assert (drawn[labels == UNUSED] == 0).all()
