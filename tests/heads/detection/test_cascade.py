"""Cascade and HTC: stage targets computed by hand, what each loss teaches, a graph that does not depend on the data, results."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torchvision.ops import generalized_box_iou

from permafrost.heads.build import build_head
from permafrost.heads.detection.boxes import giou_loss
from permafrost.heads.detection.config import (
    BoxHeadConfig,
    CascadeConfig,
    HTCConfig,
    MaskHeadConfig,
    SemanticBranchConfig,
)
from permafrost.heads.detection.roi import RegionSamples, join
from permafrost.heads.detection.semantic import IGNORED, cells
from permafrost.heads.errors import HeadError
from permafrost.heads.necks.config import BiFPNConfig

REGION_LOSSES = ("loss_classifier", "loss_box", "loss_mask")


def cascade_of(small_config, kind=CascadeConfig, **fields) -> CascadeConfig:
    """The small Mask R-CNN's parts as a cascade."""
    parts = vars(small_config())
    box = {"class_agnostic": True} if kind is HTCConfig else {}
    return kind(**{**parts, "box": replace(parts["box"], **box), **fields})


KINDS = {
    "cascade": (CascadeConfig, {}),
    "cascade-giou-4conv1fc": (
        CascadeConfig,
        {
            "box": BoxHeadConfig(
                num_convs=4,
                conv_channels=8,
                num_fc=1,
                fc_channels=16,
                resolution=5,
                num_samples=16,
                norm="layer",
                regression_loss="giou",
                regression_weight=10.0,
            ),
            "mask": MaskHeadConfig(num_convs=2, channels=12, resolution=6, norm="group"),
            "neck": BiFPNConfig(channels=16, num_layers=1),
        },
    ),
    "cascade-p3-p7": (
        CascadeConfig,
        {"neck": BiFPNConfig(channels=16, num_layers=1, finest_stride=8, num_extra_levels=2)},
    ),
    "htc": (HTCConfig, {}),
    "htc-semantic": (HTCConfig, {"semantic": SemanticBranchConfig(num_classes=5, num_convs=1)}),
}


@pytest.fixture(params=list(KINDS))
def config(request, small_config) -> CascadeConfig:
    kind, fields = KINDS[request.param]
    return cascade_of(small_config, kind, **fields)


def names_of(config) -> list[str]:
    names = [f"{name}_{stage}" for stage in (1, 2, 3) for name in REGION_LOSSES]
    semantic = ["loss_semantic"] if getattr(config, "semantic", None) and config.semantic.num_classes else []
    return ["loss_rpn_objectness", "loss_rpn_box", *semantic, *names]


def test_stage_targets_by_hand(small_config, spec, classes, make_batch, make_features) -> None:
    """One object, three proposals, regressors that always answer alike: every stage's samples and losses on paper.

    A overlaps by 0.6, is moved 4 pixels nearer (34 / 46 = 0.739), then 4 pixels back (0.6 again): positive, positive,
    negative. B overlaps by 0.6 in stage 1 and by 864 / 1696 = 0.509 in stage 2: no longer positive. C never.
    """
    torch.manual_seed(0)
    box = BoxHeadConfig(class_agnostic=True, num_samples=16, positive_fraction=1.0, resolution=5, fc_channels=8)
    head = build_head(cascade_of(small_config, box=box), spec=spec, classes=classes)
    truth = torch.tensor([10.0, 10.0, 50.0, 50.0])
    a, b, c = [20.0, 10.0, 60.0, 50.0], [10.0, 10.0, 50.0, 34.0], [70.0, 70.0, 90.0, 90.0]
    batch = make_batch((1,))
    batch.targets[0].boxes, batch.targets[0].labels = truth[None], torch.tensor([1])
    head.rpn.propose = lambda output, batch: [torch.tensor([a, b, c])]
    with torch.no_grad():
        for branch, shift in zip(head.boxes, (-1.0, 2.0, 0.5)):
            branch.regressor.weight.zero_()
            branch.regressor.bias.copy_(torch.tensor([shift, 0.0, 0.0, 0.0]))

    seen, sample = [], head.sample

    def watch(*args) -> RegionSamples:
        seen.append(sample(*args))
        return seen[-1]

    head.sample = watch
    losses = head(make_features(1), batch)

    second_a, second_b, second_c = [16.0, 10.0, 56.0, 50.0], [6.0, 10.0, 46.0, 34.0], [68.0, 70.0, 88.0, 90.0]
    third_a, third_b, third_c = [20.0, 10.0, 60.0, 50.0], [10.0, 10.0, 50.0, 34.0], [70.0, 70.0, 90.0, 90.0]
    own = truth.tolist()
    expected = [
        {tuple(a): 1, tuple(b): 1, tuple(c): 3, tuple(own): 1},
        {tuple(second_a): 1, tuple(second_b): 3, tuple(second_c): 3, tuple(own): 1},
        {tuple(third_a): 3, tuple(third_b): 3, tuple(third_c): 3, tuple(own): 1},
    ]
    assert len(seen) == 3
    for samples, wanted in zip(seen, expected):
        assert samples.is_valid.all()
        found = {
            tuple(round(x, 3) for x in row): label
            for row, label in zip(samples.boxes[0].tolist(), samples.labels[0].tolist())
        }
        assert found == wanted
        assert (samples.is_positive == (samples.labels == 1)).all()
        assert (samples.gt_boxes[samples.is_positive] == truth).all()
        assert samples.boxes[samples.is_truth].tolist() == [own]

    # Targets: offset over size over the stage's std. A: -10 / 40 / 0.1; B: 8 / 24 / 0.1 and ln(40 / 24) / 0.2.
    first = abs(-2.5 + 1) + (1 + 8 / 24 / 0.1 + math.log(40 / 24) / 0.2) + 1
    second = abs(-6 / 40 / 0.05 - 2) + 2
    for name, value in (
        ("loss_box_1", first / 4),
        ("loss_box_2", 0.5 * second / 4),
        ("loss_box_3", 0.25 * 0.5 / 4),
    ):
        torch.testing.assert_close(losses[name], torch.tensor(value), rtol=1e-5, atol=1e-6)


def test_one_stage_is_mask_rcnn(small_config, spec, classes, make_batch, make_features, build) -> None:
    """All candidates are taken, so that the two draws, of other names, are one."""
    parts = small_config()
    parts = replace(parts, box=replace(parts.box, num_samples=200, positive_fraction=1.0))
    plain = build(parts, spec, classes).double()
    stages = {"stage_ious": (0.5,), "stage_weights": (1.0,), "stage_stds": ((0.1, 0.1, 0.2, 0.2),)}
    cascade = build_head(CascadeConfig(**vars(parts), **stages), spec=spec, classes=classes).double()
    state = {
        name.replace("box.", "boxes.0.").replace("mask.", "masks.0."): value
        for name, value in plain.state_dict().items()
    }
    cascade.load_state_dict(state)
    batch, features = make_batch((3, 2)), make_features(dtype=torch.float64)
    expected, found = plain(features, batch), cascade(features, batch)
    for name, loss in expected.items():
        other = found[name if name in found else f"{name}_1"]
        torch.testing.assert_close(other, loss, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        pairs = zip(plain.eval()(features, batch), cascade.eval()(features, batch))
        for ours, theirs in pairs:
            assert len(ours.boxes) > 0
            assert torch.equal(ours.labels, theirs.labels)
            torch.testing.assert_close(ours.boxes, theirs.boxes)
            torch.testing.assert_close(ours.masks, theirs.masks)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_graph_is_the_same_for_every_batch(
    config, spec, classes, make_batch, make_features, build, run_counting, autocast
) -> None:
    head = build(config, spec, classes)
    crowd_only = make_batch((0, 0), num_ignored=3)
    for target in crowd_only.targets:
        target.ignore_boxes = torch.tensor([[-500.0, -500.0, 1000.0, 1000.0]])
        target.semantic.fill_(IGNORED)
    seen = []
    for batch in (make_batch((4, 2)), make_batch((0, 3)), make_batch((0, 0)), crowd_only):
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses, calls = run_counting(head, make_features(), batch)
        seen.append(calls)
        total = sum(losses.values())
        assert list(losses) == names_of(config)
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        assert total.isfinite()
        total.backward()
        missing = [name for name, parameter in head.named_parameters() if parameter.grad is None]
        assert not missing
        assert all(parameter.grad.isfinite().all() for parameter in head.parameters())
    assert all(calls == seen[0] for calls in seen)
    assert total.item() == 0.0
    assert all(not parameter.grad.any() for parameter in head.parameters())


def test_no_proposal_survives(config, spec, classes, make_batch, make_features, build, run_counting) -> None:
    head = build(config, spec, classes)
    reference = run_counting(head, make_features(), make_batch())[1]
    with torch.no_grad():
        head.rpn.regressor.weight.zero_()
        head.rpn.regressor.bias.fill_(-1e6)
    losses, calls = run_counting(head, make_features(), make_batch((0, 0)))
    assert calls == reference
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    with torch.no_grad():
        results = head.eval()(make_features(), make_batch((0, 0)))
    assert [len(result.boxes) for result in results] == [0, 0]


@pytest.mark.parametrize("objects", [(4, 2, 3, 6), (5, 3, 0, 0)])
def test_two_halves_equal_the_whole(config, spec, classes, make_batch, make_features, select, build, objects) -> None:
    """Two ranks of two images compute, averaged, what one rank of four computes: losses and every gradient."""
    head = build(config, spec, classes).double()
    batch, features = make_batch(objects, num_ignored=1), make_features(4, dtype=torch.float64)
    halves = [([x[part] for x in features], select(batch, part)) for part in ([0, 1], [2, 3])]
    own = []
    for half in halves:
        seen = {}
        head(*half, lambda name, n, seen=seen: seen.setdefault(name, n.double()).clamp(min=1.0))
        own.append(seen)
    assert list(own[0]) == list(own[1])
    mean = {name: (own[0][name] + own[1][name]).clamp(min=1.0) / 2 for name in own[0]}
    parts = []
    for half in halves:
        losses = head(*half, lambda name, _: mean[name])
        (sum(losses.values()) / 2).backward()
        parts.append(losses)
    averaged = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    head.zero_grad()
    whole = head(features, batch, lambda _, n: n.double().clamp(min=1.0))
    sum(whole.values()).backward()
    for name in whole:
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, whole[name], rtol=1e-10, atol=1e-12)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(
            averaged[name], parameter.grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def taught(head, loss) -> set[str]:
    """Top-level parts, stages apart, that a loss's gradient reaches."""
    head.zero_grad()
    loss.backward(retain_graph=True)
    found = set()
    for name, parameter in head.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            first, second, *_ = name.split(".")
            found.add(f"{first}.{second}" if first in ("boxes", "masks") else first)
    return found


def test_what_each_loss_teaches(small_config, spec, classes, make_batch, make_features, build) -> None:
    batch, features = make_batch((4, 3)), make_features()
    plain = build(cascade_of(small_config), spec, classes)
    losses = plain(features, batch)
    for stage in (1, 2, 3):
        # Refined boxes carry no gradient: a stage teaches itself and the neck.
        assert taught(plain, losses[f"loss_box_{stage}"]) == {"neck", f"boxes.{stage - 1}"}
        assert taught(plain, losses[f"loss_mask_{stage}"]) == {"neck", f"masks.{stage - 1}"}

    htc = build(cascade_of(small_config, **KINDS["htc-semantic"][1], kind=HTCConfig), spec, classes)
    losses = htc(features, batch)
    assert taught(htc, losses["loss_semantic"]) == {"neck", "semantic"}
    assert htc.semantic.classifier.weight.grad.any()
    assert taught(htc, losses["loss_box_2"]) == {"neck", "semantic", "boxes.1"}
    assert htc.semantic.embedding.weight.grad.any()
    assert htc.semantic.classifier.weight.grad is None
    assert taught(htc, losses["loss_mask_1"]) == {"neck", "semantic", "masks.0"}
    assert taught(htc, losses["loss_mask_3"]) == {"neck", "semantic", "masks.0", "masks.1", "masks.2"}
    # Features are handed on, not masks.
    assert all(htc.masks[i].previous.weight.grad.any() for i in (1, 2))
    assert htc.masks[0].convs[0].weight.grad.any()
    assert htc.masks[0].predictor.weight.grad is None
    assert htc.masks[0].previous is None

    alone = build(cascade_of(small_config, HTCConfig, information_flow=False), spec, classes)
    assert taught(alone, alone(features, batch)["loss_mask_3"]) == {"neck", "masks.2"}


def test_masks_learn_on_refined_boxes_when_interleaved(
    small_config, spec, classes, make_batch, make_features, build
) -> None:
    batch, features = make_batch((3,)), make_features(1)
    for interleaved in (True, False):
        head = build(cascade_of(small_config, HTCConfig, interleaved=interleaved), spec, classes)
        seen, sample = [], head.sample

        def watch(proposals, batch, box, purpose, seen=seen, sample=sample) -> RegionSamples:
            seen.append((purpose, proposals[0], sample(proposals, batch, box, purpose)))
            return seen[-1][2]

        head.sample = watch
        head(features, batch)
        names = [name for name, *_ in seen]
        if not interleaved:
            assert names == ["roi_1", "roi_2", "roi_3"]
            continue
        assert names == ["roi_1", "mask_1", "roi_2", "mask_2", "roi_3", "mask_3"]
        # The masks of a stage and the boxes of the next see the same refined boxes, which are not those of the stage.
        for i in (1, 3):
            assert torch.equal(seen[i][1], seen[i + 1][1])
            assert not torch.equal(seen[i][1], seen[i - 1][1])


def test_results_are_means_over_the_stages(config, spec, classes, make_batch, make_features, build) -> None:
    """Scores, boxes and masks put together from the parts, one stage at a time."""
    head = build(config, spec, classes).double().eval()
    batch, features = make_batch((3,)), make_features(1, dtype=torch.float64)
    with torch.no_grad():
        (result,) = head(features, batch)
        assert len(result.boxes) > 3
        pyramid = head.neck(features)
        assert len(pyramid) == 5
        (boxes,) = head.rpn.propose(head.rpn(pyramid), batch)
        levels, zeros = pyramid[: head.neck.num_backbone_levels], torch.zeros(len(boxes), dtype=torch.int64)
        embedding = None if head.semantic is None else head.semantic(pyramid)[1]

        def extra(boxes, size) -> torch.Tensor | None:
            if embedding is None:
                return None
            pooled = head.semantic.pool([embedding], boxes, zeros[: len(boxes)])
            return torch.nn.functional.adaptive_avg_pool2d(pooled, size)

        probabilities = []
        for i, branch in enumerate(head.boxes):
            logits, deltas = branch(levels, boxes, zeros, extra(boxes, branch.config.resolution))
            probabilities.append(logits.softmax(dim=1)[:, :-1])
            if i < 2:
                of = logits[:, :-1].argmax(dim=1) if deltas.shape[1] > 1 else zeros
                moved = branch.coder.decode_single(deltas[torch.arange(len(of)), of], boxes)
                boxes = moved.clamp(min=0, max=96)
        scores = sum(probabilities) / 3
        (expected,) = head.boxes[2].detect(scores, deltas, [boxes], batch)
        found = result.boxes.double()
        torch.testing.assert_close(found, expected.boxes, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(result.scores.double(), expected.scores, rtol=1e-5, atol=1e-6)
        regions = head.masks[0].pool(levels, expected.boxes, zeros[:0].new_zeros(len(found)))
        if embedding is not None:
            regions = regions + head.semantic.pool([embedding], expected.boxes, zeros.new_zeros(len(found)))
        masks, previous = [], None
        for mask in head.masks:
            previous = mask.features(regions, previous)
            masks.append(mask.logits(previous, expected.labels).sigmoid())
        torch.testing.assert_close(result.masks.double(), sum(masks) / 3, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(masks[0], masks[2], atol=1e-3)


def test_class_agnostic_regression_is_one_box(small_config, spec, classes, make_batch, make_features, build) -> None:
    config = small_config()
    head = build(replace(config, box=replace(config.box, class_agnostic=True)), spec, classes)
    assert head.box.regressor.out_features == 4
    losses = head(make_features(), make_batch())
    losses["loss_box"].backward()
    assert head.box.regressor.weight.grad.any()
    with torch.no_grad():
        results = head.eval()(make_features(), make_batch())
    # One region of two classes: the very same box.
    boxes = [tuple(row) for result in results for row in result.boxes.tolist()]
    assert len(set(boxes)) < len(boxes)


def test_giou_loss_is_one_minus_giou() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(20, 2, 2, generator=generator, dtype=torch.float64) * 50
    boxes = torch.cat([corner, corner + 1 + torch.rand(20, 2, 2, generator=generator) * 40], dim=2)
    is_positive = torch.arange(20) % 3 > 0
    expected = (1 - generalized_box_iou(boxes[:, 0], boxes[:, 1]).diagonal())[is_positive].sum()
    found = giou_loss(boxes[:, 0], boxes[:, 1], is_positive)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_giou_is_learned_on_decoded_boxes(small_config, spec, classes, make_batch, make_features, build) -> None:
    config = small_config()
    box = replace(config.box, regression_loss="giou", regression_weight=10.0)
    head = build(replace(config, box=box), spec, classes).double()
    batch, features = make_batch((3, 2)), make_features(dtype=torch.float64)
    losses = head(features, batch)
    pyramid = head.neck(features)
    samples = head.sample(head.rpn.propose(head.rpn(pyramid), batch), batch, head.box)
    _, deltas = head.box(pyramid[:4], *join(list(samples.boxes)))
    total = 0.0
    for row, (positive, label) in enumerate(zip(samples.is_positive.flatten(), samples.labels.flatten())):
        if positive:
            anchor = samples.boxes.flatten(0, 1)[row]
            size, center = anchor[2:] - anchor[:2], (anchor[2:] + anchor[:2]) / 2
            shift, scale = deltas[row, label].split(2)
            center, size = center + size * shift * 0.1, size * (scale * 0.2).exp()
            decoded = torch.cat([center - size / 2, center + size / 2])
            total = total + 1 - generalized_box_iou(decoded[None], samples.gt_boxes.flatten(0, 1)[row][None])[0, 0]
    torch.testing.assert_close(losses["loss_box"], 10 * total / samples.is_valid.sum(), rtol=1e-6, atol=1e-8)


def test_semantic_cells_are_the_pixels_in_the_middle() -> None:
    maps = torch.arange(100, dtype=torch.uint8).view(1, 10, 10)
    assert cells(maps, 4, (3, 3)).tolist() == [[[22, 26, IGNORED], [62, 66, IGNORED], [IGNORED] * 3]]
    assert cells(maps, 8, (1, 1)).tolist() == [[[44]]]


def test_semantic_loss_counts_what_is_not_ignored(
    small_config, spec, classes, make_batch, make_features, build
) -> None:
    config = cascade_of(small_config, HTCConfig, **KINDS["htc-semantic"][1])
    head = build(config, spec, classes)
    batch = make_batch((2, 2))
    for target in batch.targets:
        target.semantic[:, 48:] = IGNORED
    counted = {}

    def counts(name, n) -> torch.Tensor:
        return counted.setdefault(name, n.float()).clamp(min=1)

    losses = head(make_features(), batch, counts)
    assert counted["semantic_cells"] == 2 * 12 * 6
    logits, _ = head.semantic(head.neck(make_features()))
    expected = 0.0
    for own, target in zip(logits.log_softmax(dim=1), batch.targets):
        for i in range(12):
            for j in range(6):
                expected -= own[target.semantic[8 * i + 4, 8 * j + 4].long(), i, j]
    torch.testing.assert_close(losses["loss_semantic"], 0.2 * expected / 144, rtol=1e-4, atol=1e-5)
    batch.targets[1].semantic = None
    with pytest.raises(HeadError, match=r"come without semantic maps: set data\.semantic"):
        head(make_features(), batch)


def test_semantic_level_beyond_the_pyramid_is_refused(small_config, spec, classes) -> None:
    config = cascade_of(small_config, HTCConfig, semantic=SemanticBranchConfig(num_classes=5, level=9))
    with pytest.raises(HeadError, match=r"semantic.level is 9: the pyramid has the levels 0..4"):
        build_head(config, spec=spec, classes=classes)
