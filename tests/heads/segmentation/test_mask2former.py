"""Mask2Former: the same as transformers' where both do the same, and what a head of ours must keep besides."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from permafrost.data.segmentation.types import SegmentationTarget
from permafrost.data.types import Batch, SampleKey
from permafrost.heads.base import world_mean_counts
from permafrost.heads.build import build_head
from permafrost.heads.errors import HeadError
from permafrost.heads.segmentation.config import (
    Mask2FormerConfig,
    PixelDecoderConfig,
    SegmentationLossConfig,
    TransformerDecoderConfig,
)
from permafrost.heads.segmentation.criterion import collect_segments
from permafrost.heads.segmentation.mask2former import Mask2Former
from permafrost.heads.segmentation.matcher import match, matching_cost
from permafrost.heads.segmentation.points import draw_points, read_points
from permafrost.heads.segmentation.transformer_decoder import Prediction
from permafrost.model.spec import FeatureSpec

sys.path.insert(0, str(Path(__file__).parent))
import hf_mask2former

CLASSES = ("sky", "wall", "tree", "road", "door")


def small(num_blocks=2, decoder_blocks=4, channels=64, **loss) -> Mask2FormerConfig:
    # 64 channels: transformers' group norms have 32 groups always, and of one channel each they would be blind.
    defaults = {"num_points": 200, "oversample": 3.0, "importance": 0.75}
    return Mask2FormerConfig(
        pixel_decoder=PixelDecoderConfig(num_blocks=num_blocks, channels=channels, num_heads=4, ffn_channels=48),
        transformer_decoder=TransformerDecoderConfig(
            num_blocks=decoder_blocks, num_queries=12, num_heads=4, ffn_channels=40
        ),
        loss=SegmentationLossConfig(**{**defaults, **loss}),
    )


def target(index, num_labels, side=96, size=None) -> SegmentationTarget:
    random = torch.Generator().manual_seed(index)
    labels = torch.randperm(len(CLASSES), generator=random)[:num_labels].sort().values
    height, width = size or (side, side)
    semantic = torch.full((side, side), 255, dtype=torch.uint8)
    for label in labels.tolist():
        semantic[:height, :width][torch.rand(height, width, generator=random) < 0.5] = label
    return SegmentationTarget(index, semantic[semantic != 255].unique().long(), semantic, (height, width), (120, 90))


def make_batch(num_labels=(3, 2), first=0, side=96) -> Batch:
    targets = [target(first + i, n, side) for i, n in enumerate(num_labels)]
    keys = [SampleKey(5, 2, first + i) for i in range(len(targets))]
    return Batch(torch.zeros(len(targets), 3, side, side, dtype=torch.uint8), targets, keys)


def their_groups(model) -> None:
    """Give transformers' norms the groups of ours, where 32 groups of their few channels are not what we compare."""
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = 8


@pytest.fixture
def pair(spec, build) -> Callable[..., tuple[Mask2Former, hf_mask2former.TheirHead]]:
    """Our head and theirs with the same weights, both in a given precision."""

    def make(config=None, dtype=torch.float32, own_spec=None) -> tuple[Mask2Former, hf_mask2former.TheirHead]:
        config = config or small()
        own_spec = own_spec or spec
        ours = build(replace(config, level_norm=False), own_spec, CLASSES).to(dtype)
        model = hf_mask2former.TheirHead(config, own_spec, len(CLASSES))
        if config.pixel_decoder.channels == 64:
            their_groups(model)
        hf_mask2former.load(model, ours)
        return ours, model.to(dtype).eval()

    return make


def check_logits(ours, model, features) -> float:
    """Relative errors of class and mask logits of all predictions, worst first."""
    with torch.no_grad():
        found, expected = ours.predictions(features), model(features)
    assert len(found) == len(expected)
    errors = []
    for own, (classes, masks) in zip(found, expected):
        assert own.masks.shape == masks.shape
        errors += [(own.classes - classes).norm() / classes.norm(), (own.masks - masks).norm() / masks.norm()]
    return max(map(float, errors))


@pytest.mark.parametrize(("num_blocks", "decoder_blocks"), [(1, 3), (6, 9)])
def test_logits_equal_transformers(pair, make_features, num_blocks, decoder_blocks) -> None:
    ours, model = pair(small(num_blocks, decoder_blocks))
    assert check_logits(ours, model, make_features(side=96)) < 1e-4


def test_logits_equal_transformers_in_double_precision(pair, make_features) -> None:
    ours, model = pair(dtype=torch.float64)
    assert check_logits(ours, model, make_features(side=128, dtype=torch.float64)) < 1e-9


def test_full_size_head_equals_transformers(pair) -> None:
    """The default head: 256 channels, 8 heads, 100 queries, GroupNorm of 32."""
    spec = FeatureSpec(channels=(96, 192, 384, 768), strides=(4, 8, 16, 32))
    ours, model = pair(Mask2FormerConfig(), own_spec=spec)
    random = torch.Generator().manual_seed(0)
    features = [torch.randn(1, c, 160 // s, 96 // s, generator=random) for c, s in zip(spec.channels, spec.strides)]
    assert ours.pixel_decoder.adapter_1.norm.num_groups == 32
    assert check_logits(ours, model, features) < 1e-4


def our_losses(head, features, batch) -> tuple[torch.Tensor, list[Prediction]]:
    """(3, L) class, mask and dice losses of every prediction, and the predictions."""
    predictions = head.predictions(features)
    segments = collect_segments(batch, dtype=predictions[0].masks.dtype)
    queries = head.criterion.match(predictions, segments, batch.keys)
    return torch.stack(
        head.criterion.losses(predictions, segments, queries, batch.keys, world_mean_counts)
    ), predictions


@pytest.mark.parametrize("num_labels", [(3, 3), (1, 1)])
def test_loss_equals_transformers_at_the_same_points(spec, build, make_features, num_labels) -> None:
    """Same points: all masks of an image share candidates, so with one image theirs can be fed ours."""
    config = small()
    head = build(config, spec, CLASSES).double()
    for index in range(len(num_labels)):
        batch = make_batch(num_labels[index : index + 1], first=index)
        features = make_features(1, first=index, dtype=torch.float64)
        found, predictions = our_losses(head, features, batch)
        criterion = hf_mask2former.their_loss(config, len(CLASSES), torch.float64)
        (own,) = batch.targets
        masks = (own.semantic[None] == own.labels[:, None, None]).double()
        draws = {
            purpose: draw_points(
                batch.keys, f"segmentation/{purpose}", num_predictions=5, num_points=points, like=masks
            )[:, 0]
            for purpose, points in (("match", 200), ("candidates", 600), ("uniform", 50))
        }
        order = [draws[purpose][number] for number in range(5) for purpose in ("match", "candidates", "uniform")]
        for number, prediction in enumerate(predictions):
            with hf_mask2former.points_from(order[3 * number : 3 * number + 3]) as left:
                losses = criterion(prediction.masks, prediction.classes, [masks], [own.labels])
            assert not left
            expected = hf_mask2former.weighted(config, losses)
            assert torch.allclose(found[1:, number], expected[1:], rtol=1e-9, atol=1e-12)
            # Its denominator is a sum of weights, and counts are float32 by contract.
            assert torch.allclose(found[0, number], expected[0], rtol=2e-7)


def test_matching_cost_is_theirs_and_the_assignment_is_cheapest() -> None:
    random = torch.Generator().manual_seed(3)
    logits, masks = torch.randn(1, 5, 6, generator=random), torch.randn(1, 5, 50, generator=random) * 3
    labels = torch.tensor([[4, 0, 2]])
    targets = (torch.rand(1, 3, 50, generator=random) < 0.4).float()
    config = SegmentationLossConfig()
    costs = matching_cost(logits, masks, labels, targets, config=config)
    theirs = hf_mask2former.theirs
    expected = (
        -2 * logits[0].softmax(-1)[:, labels[0]]
        + 5 * theirs.pair_wise_sigmoid_cross_entropy_loss(masks[0], targets[0])
        + 5 * theirs.pair_wise_dice_loss(masks[0], targets[0])
    )
    assert torch.allclose(costs[0], expected, rtol=1e-5, atol=1e-5)
    (queries,) = match(costs[None], [3])[0]
    cheapest = min(
        itertools.permutations(range(5), 3), key=lambda order: sum(costs[0, q, n] for n, q in enumerate(order))
    )
    assert queries.tolist() == list(cheapest)


def test_padding_and_surplus_segments_stay_unmatched_and_broken_costs_are_taken() -> None:
    costs = torch.rand(2, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    costs[0, 0, 1] = float("nan")
    queries = match(costs, [2, 5])
    assert (queries[:, 0, 2:] == -1).all()
    assert (queries[:, 0, :2] >= 0).all()
    assert 1 not in queries[0, 0].tolist()
    # Five segments, three queries: each is used once.
    assert [sorted(own.tolist()) for own in queries[:, 1]] == [[-1, -1, 0, 1, 2]] * 2


def test_points_outside_count_as_empty_and_centres_are_exact() -> None:
    mask = torch.arange(12.0).view(1, 1, 3, 4)
    centre = torch.tensor([[[[2.5 / 4, 1.5 / 3], [0.0, 0.5]]]])
    assert read_points(mask, centre).flatten().tolist() == pytest.approx([6.0, 2.0])


@pytest.mark.parametrize("num_labels", [(3, 2), (0, 0), (0, 5)])
def test_graph_does_not_depend_on_the_data(spec, build, make_features, run_counting, num_labels) -> None:
    head = build(small(), spec, CLASSES).train()
    losses, calls = run_counting(head, make_features(), make_batch(num_labels))
    assert list(losses) == ["loss_class", "loss_mask", "loss_dice", "loss_auxiliary"]
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert not [name for name, parameter in head.named_parameters() if parameter.grad is None]
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())
    _, usual = run_counting(head, make_features(), make_batch((1, 4)))
    assert calls == usual
    if num_labels == (0, 0):
        assert losses["loss_mask"].item() == losses["loss_dice"].item() == 0


def test_image_without_labels_teaches_no_object_only(spec, build, make_features) -> None:
    head = build(small(), spec, CLASSES).train()
    head(make_features(), make_batch((0, 0)))["loss_class"].backward()
    before = head.predictions(make_features())[-1].classes.softmax(-1)[..., -1].mean()
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    assert head.predictions(make_features())[-1].classes.softmax(-1)[..., -1].mean() > before


def test_losses_do_not_depend_on_how_the_batch_is_split(spec, build, make_features, select) -> None:
    head = build(small(), spec, CLASSES).double().train()
    features, batch = make_features(3, dtype=torch.float64), make_batch((4, 0, 2))
    recorded = {}

    def whole(name, count) -> torch.Tensor:
        recorded[name] = count.double()
        return recorded[name]

    expected = head(features, batch, whole)
    assert list(recorded) == ["class_weights", "segments"]
    assert float(recorded["segments"]) == sum(len(own.labels) for own in batch.targets)
    parts = [
        head([level[order] for level in features], select(batch, order), lambda name, _: recorded[name])
        for order in ([2], [0, 1])
    ]
    for name, value in expected.items():
        assert torch.allclose(sum(part[name] for part in parts), value, rtol=1e-9)


def test_more_segments_than_queries_are_counted_but_not_matched(spec, build, make_features) -> None:
    config = small()
    config.transformer_decoder.num_queries = 2
    losses = build(config, spec, CLASSES).train()(make_features(1), make_batch((5,)))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_results_are_segments_of_every_image(spec, build, make_features) -> None:
    head = build(small(), spec, CLASSES).eval()
    batch = make_batch()
    batch.targets[1] = replace(batch.targets[1], size=(80, 64))
    with torch.no_grad():
        first, second = head(make_features(), batch)
    assert first.class_scores.shape == (12, 5)
    assert first.mask_logits.shape == (12, 24, 24)
    assert (first.canvas, second.size, second.original_size) == ((96, 96), (80, 64), (120, 90))
    assert bool((first.class_scores.sum(-1) < 1).all())


def test_under_autocast_pixels_keep_their_precision(spec, build, make_features) -> None:
    head = build(small(), spec, CLASSES).train()
    seen = []
    head.pixel_decoder.transformer.encoder.layers[0].self_attn.register_forward_hook(
        lambda _, __, out: seen.append(out.dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = head([level.bfloat16() for level in make_features()], make_batch())
    assert seen == [torch.float32]
    assert all(loss.dtype == torch.float32 for loss in losses.values())


def test_learns_to_tell_segments_apart(spec, build) -> None:
    """A hundred steps on two images whose features are their labels: the loss falls and pixels are named right."""
    torch.manual_seed(0)
    head = build_head(small(num_blocks=1, decoder_blocks=2, num_points=400), spec=spec, classes=CLASSES).train()
    side = 64
    semantic = torch.full((2, side, side), 1, dtype=torch.uint8)
    semantic[0, :32, :32], semantic[1, 32:] = 0, 3
    batch = Batch(
        torch.zeros(2, 3, side, side, dtype=torch.uint8),
        [SegmentationTarget(i, own.unique().long(), own, (side, side), (side, side)) for i, own in enumerate(semantic)],
        [SampleKey(0, 0, i) for i in range(2)],
    )
    mixing = [torch.randn(5, c, generator=torch.Generator().manual_seed(c)) for c in spec.channels]
    features = [
        torch.einsum("bhwk,kc->bchw", torch.eye(5)[semantic[:, ::s, ::s].long()], own)
        for s, own in zip(spec.strides, mixing)
    ]
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    losses = []
    for step in range(100):
        batch.keys = [SampleKey(0, step, i) for i in range(2)]
        loss = sum(head(features, batch).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    with torch.no_grad():
        results = head.eval()(features, batch)
    for own, result in zip(semantic, results):
        scores = torch.einsum("qk,qhw->khw", result.class_scores, result.mask_logits.sigmoid())
        assert float((scores.argmax(0) == own[2::4, 2::4]).float().mean()) > 0.95


def test_default_parameters_are_counted() -> None:
    """256 channels, 150 classes on a Swin-B: the released (6, 9) head has 19.98 M parameters beside its backbone."""
    spec = FeatureSpec(channels=(128, 256, 512, 1024), strides=(4, 8, 16, 32))
    classes = [str(number) for number in range(150)]
    with torch.device("meta"):
        config = Mask2FormerConfig(
            PixelDecoderConfig(num_blocks=6), TransformerDecoderConfig(num_blocks=9), level_norm=False
        )
        head = build_head(config, spec=spec, classes=classes)
    theirs = hf_mask2former.TheirHead(config, spec, 150)
    assert sum(p.numel() for p in head.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PixelDecoderConfig(num_blocks=0), "pixel_decoder.num_blocks is 0"),
        (
            lambda: PixelDecoderConfig(channels=50, num_heads=5),
            "pixel_decoder.channels is 50: it must be a multiple of 4",
        ),
        (lambda: TransformerDecoderConfig(num_queries=0), "transformer_decoder.num_queries is 0"),
        (lambda: SegmentationLossConfig(oversample=0.5), "loss.oversample is 0.5"),
        (lambda: SegmentationLossConfig(importance=1.5), "loss.importance is 1.5"),
        (lambda: SegmentationLossConfig(no_object_weight=0.0), "loss.no_object_weight is 0.0"),
        (
            lambda: Mask2FormerConfig(transformer_decoder=TransformerDecoderConfig(num_heads=7)),
            "must divide pixel_decoder",
        ),
    ],
)
def test_impossible_configurations_are_refused(make, message) -> None:
    with pytest.raises(HeadError, match=message):
        make()


def test_what_it_cannot_be_built_for_is_refused(spec) -> None:
    with pytest.raises(HeadError, match="at least two maps, the backbone gives 1"):
        build_head(small(), spec=FeatureSpec((8,), (16,)), classes=CLASSES)
    with pytest.raises(HeadError, match="names of 1 to 255 classes"):
        build_head(small(), spec=spec, classes=[])
