"""The whole head: parity with torchvision, counts, a graph that does not depend on the data, precision, results."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from permafrost.heads.build import build_head
from permafrost.heads.detection.config import BoxHeadConfig, MaskHeadConfig, MaskRCNNConfig, PoolingConfig, RPNConfig
from permafrost.heads.detection.rpn import make_anchors
from permafrost.heads.detection.sampling import sample_balanced
from permafrost.heads.necks.config import FPNConfig

LOSSES = ["loss_rpn_objectness", "loss_rpn_box", "loss_classifier", "loss_box", "loss_mask"]
COUNTS = ["rpn_samples", "roi_samples", "mask_samples"]


class SameSampler:
    """Our draw behind the interface of torchvision's sampler."""

    def __init__(self, keys, purpose, config):
        self.keys, self.purpose = keys, purpose
        self.options = {"num_samples": config.num_samples, "positive_fraction": config.positive_fraction}

    def __call__(self, labels):
        samples = sample_balanced([x.clamp(max=1).long() for x in labels], self.keys, self.purpose, **self.options)
        masks = (samples.is_positive, samples.is_valid & ~samples.is_positive)
        return tuple(
            [
                torch.zeros(len(x), dtype=torch.uint8).index_fill_(0, index[chosen], 1)
                for x, index, chosen in zip(labels, samples.index, mask)
            ]
            for mask in masks
        )


class TorchvisionTwin(torch.nn.Module):
    """torchvision's pyramid, proposal network and RoI heads with our head's weights."""

    def __init__(self, head, spec, config, keys):
        super().__init__()
        channels, num_classes = config.neck.channels, len(head.classes)
        self.head, self.strides = head, head.neck.strides
        self.fpn = FeaturePyramidNetwork(list(spec.channels), channels, extra_blocks=LastLevelMaxPool())
        rpn = config.rpn
        self.rpn = RegionProposalNetwork(
            self.anchors,
            RPNHead(channels, len(rpn.aspect_ratios), rpn.num_convs),
            rpn.positive_iou,
            rpn.negative_iou,
            rpn.num_samples,
            rpn.positive_fraction,
            {"training": rpn.num_pre_nms_train, "testing": rpn.num_pre_nms_test},
            {"training": rpn.num_proposals_train, "testing": rpn.num_proposals_test},
            rpn.nms_iou,
        )
        box, mask, ratio = config.box, config.mask, config.pooling.sampling_ratio
        self.roi = RoIHeads(
            MultiScaleRoIAlign(list("0123"), box.resolution, ratio),
            TwoMLPHead(channels * box.resolution**2, box.fc_channels),
            FastRCNNPredictor(box.fc_channels, num_classes + 1),
            box.positive_iou,
            box.positive_iou,
            box.num_samples,
            box.positive_fraction,
            tuple(1 / std for std in box.regression_stds),
            box.score_threshold,
            box.nms_iou,
            box.num_detections,
            MultiScaleRoIAlign(list("0123"), mask.resolution, ratio),
            MaskRCNNHeads(channels, (mask.channels,) * mask.num_convs, 1),
            MaskRCNNPredictor(mask.channels, mask.channels, num_classes + 1),
        )
        self.rpn.fg_bg_sampler = SameSampler(keys, "rpn", rpn)
        self.roi.fg_bg_sampler = SameSampler(keys, "roi", box)
        self.copy_weights(head)

    def anchors(self, images, features) -> list[torch.Tensor]:
        rpn = self.head.rpn.config
        grids = [x.shape[-2:] for x in features]
        anchors = make_anchors(grids, self.strides, scale=rpn.anchor_scale, aspect_ratios=rpn.aspect_ratios)
        return [anchors.to(features[0].dtype)] * len(images.image_sizes)

    def pairs(self) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
        """(our layer, torchvision's layer) for all layers whose outputs mean the same."""
        head = self.head
        yield from zip(head.neck.lateral, (block[0] for block in self.fpn.inner_blocks))
        yield from zip(head.neck.output, (block[0] for block in self.fpn.layer_blocks))
        yield from zip(head.rpn.convs, (block[0] for block in self.rpn.head.conv))
        yield head.rpn.objectness, self.rpn.head.cls_logits
        yield head.rpn.regressor, self.rpn.head.bbox_pred
        yield head.box.fcs[0], self.roi.box_head.fc6
        yield head.box.fcs[1], self.roi.box_head.fc7
        yield from zip(head.mask.convs, (block[0] for block in self.roi.mask_head))
        yield head.mask.upsample, self.roi.mask_predictor.conv5_mask

    @torch.no_grad()
    def copy_weights(self, head) -> None:
        for ours, theirs in self.pairs():
            theirs.load_state_dict(ours.state_dict())
        predictor, masks = self.roi.box_predictor, self.roi.mask_predictor.mask_fcn_logits
        for part in ("weight", "bias"):
            # torchvision's background comes first, ours last.
            getattr(predictor.cls_score, part).copy_(getattr(head.box.classifier, part).roll(1, dims=0))
            getattr(predictor.bbox_pred, part)[4:] = getattr(head.box.regressor, part)
            getattr(masks, part)[1:] = getattr(head.mask.predictor, part)

    def forward(self, features, batch) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        images = ImageList(batch.images, [target.size for target in batch.targets])
        targets = [{"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks.byte()} for t in batch.targets]
        pyramid = self.fpn(OrderedDict((str(i), x) for i, x in enumerate(features)))
        proposals, losses = self.rpn(images, pyramid, targets)
        results, roi_losses = self.roi(pyramid, proposals, images.image_sizes, targets if self.training else None)
        return {**losses, **roi_losses} if self.training else results


@pytest.fixture
def parity_config(small_config) -> MaskRCNNConfig:
    config = small_config(neck=FPNConfig(channels=16, level_norm=False))
    return replace(
        config,
        rpn=replace(config.rpn, smooth_l1_beta=1 / 9),
        box=replace(config.box, smooth_l1_beta=1 / 9),
        pooling=PoolingConfig(sampling_ratio=2, aligned=False),
    )


@pytest.mark.parametrize("objects", [(4, 2, 5), (0, 3), (0, 0)])
def test_losses_and_gradients_equal_torchvision(
    parity_config, spec, classes, make_batch, make_features, objects, build
) -> None:
    head = build(parity_config, spec, classes)
    batch, features = make_batch(objects), make_features(len(objects))
    twin = TorchvisionTwin(head, spec, parity_config, batch.keys).train()
    losses, expected = head(features, batch), twin(features, batch)
    names = ["loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"]
    for ours, theirs in zip(LOSSES, names):
        torch.testing.assert_close(
            losses[ours], expected[theirs], rtol=1e-5, atol=1e-7, msg=lambda m, ours=ours: f"{ours}: {m}"
        )
    assert (losses["loss_mask"] > 0) == (losses["loss_box"] > 0) == (sum(objects) > 0)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for ours, theirs in twin.pairs():
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        head.box.regressor.weight.grad, twin.roi.box_predictor.bbox_pred.weight.grad[4:], rtol=1e-3, atol=1e-5
    )


def test_detections_equal_torchvision(parity_config, spec, classes, make_batch, make_features, build) -> None:
    config = replace(parity_config, box=replace(parity_config.box, score_threshold=0.2, num_detections=15))
    head = build(config, spec, classes).eval()
    batch, features = make_batch((4, 2), size=(88, 72)), make_features()
    with torch.no_grad():
        results = head(features, batch)
        expected = TorchvisionTwin(head, spec, config, batch.keys).eval()(features, batch)
    for found, wanted in zip(results, expected):
        assert len(found.boxes) > 4
        torch.testing.assert_close(found.boxes, wanted["boxes"], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found.scores, wanted["scores"], rtol=1e-5, atol=1e-6)
        assert torch.equal(found.labels, wanted["labels"] - 1)
        torch.testing.assert_close(found.masks, wanted["masks"][:, 0], rtol=1e-4, atol=1e-5)


def test_counts_are_asked_for_in_a_fixed_order(small_config, spec, classes, make_batch, make_features, build) -> None:
    for objects in ((4, 2), (0, 0)):
        asked = []

        def counts(name, count, asked=asked) -> torch.Tensor:
            asked.append((name, count.ndim, int(count)))
            return count.float().clamp(min=1.0)

        losses = build(small_config(), spec, classes)(make_features(), make_batch(objects), counts)
        assert [name for name, _, _ in asked] == COUNTS
        assert {ndim for _, ndim, _ in asked} == {0}
        assert asked[0][2] == asked[1][2] * 2 == 64
        assert (asked[2][2] > 0) == (sum(objects) > 0)
        assert list(losses) == LOSSES
        assert all(loss.dtype == torch.float32 and loss.ndim == 0 for loss in losses.values())


def gradients(head) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in head.named_parameters()}


@pytest.mark.parametrize("objects", [(4, 2, 3, 6), (5, 3, 0, 0), (0, 0, 0, 0)])
def test_two_halves_equal_the_whole(
    small_config, spec, classes, make_batch, make_features, select, objects, build
) -> None:
    """Two ranks of two images compute, averaged, what one rank of four computes: losses and every gradient."""
    head = build(small_config(), spec, classes).double()
    batch = make_batch(objects, num_ignored=1)
    features = make_features(4, dtype=torch.float64)
    halves = [([x[part] for x in features], select(batch, part)) for part in ([0, 1], [2, 3])]

    own = []
    for half in halves:
        seen = {}
        head(*half, lambda name, n, seen=seen: seen.setdefault(name, n.double()).clamp(min=1.0))
        own.append(seen)
    mean = {name: (own[0][name] + own[1][name]).clamp(min=1.0) / 2 for name in COUNTS}
    assert (own[0]["mask_samples"] != own[1]["mask_samples"]) or not any(objects)

    parts = []
    for half in halves:
        losses = head(*half, lambda name, _: mean[name])
        (sum(losses.values()) / 2).backward()
        parts.append(losses)
    averaged = gradients(head)
    head.zero_grad()
    whole = head(features, batch, lambda _, n: n.double().clamp(min=1.0))
    sum(whole.values()).backward()

    for name in LOSSES:
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, whole[name], rtol=1e-10, atol=1e-12)
    for name, expected in gradients(head).items():
        torch.testing.assert_close(averaged[name], expected, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("autocast", [False, True])
def test_the_graph_is_the_same_for_every_batch(
    small_config, spec, classes, make_batch, make_features, autocast, build, run_counting
) -> None:
    config = small_config(box=BoxHeadConfig(num_convs=1, conv_channels=8, fc_channels=24, num_samples=16, resolution=5))
    head = build(config, spec, classes)
    crowd_only = make_batch((0, 0), num_ignored=3)
    for target in crowd_only.targets:
        target.ignore_boxes = torch.tensor([[-500.0, -500.0, 1000.0, 1000.0]])
    seen = []
    for batch in (make_batch((4, 2)), make_batch((0, 3)), make_batch((0, 0)), crowd_only):
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses, calls = run_counting(head, make_features(), batch)
        seen.append(calls)
        total = sum(losses.values())
        assert total.isfinite()
        total.backward()
        missing = [name for name, parameter in head.named_parameters() if parameter.grad is None]
        assert not missing
        assert all(parameter.grad.isfinite().all() for parameter in head.parameters())
    assert all(calls == seen[0] for calls in seen)
    assert seen[0]["mask"] == seen[0]["box"] == seen[0]["mask.convs.0"] == seen[0]["neck"] == 1
    assert seen[0]["rpn.convs.0"] == 5
    # A batch whose every pixel is crowd teaches nothing at all.
    assert total.item() == 0.0
    assert all(not parameter.grad.any() for parameter in head.parameters())


def test_no_proposal_survives(small_config, spec, classes, make_batch, make_features, build, run_counting) -> None:
    """A network that predicts nothing usable, and no ground truth to add: zero regions everywhere."""
    head = build(small_config(), spec, classes)
    with torch.no_grad():
        head.rpn.regressor.weight.zero_()
        head.rpn.regressor.bias.fill_(-1e6)
    reference = run_counting(build(small_config(), spec, classes), make_features(), make_batch())[1]
    losses, calls = run_counting(head, make_features(), make_batch((0, 0)))
    assert calls == reference
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    head.eval()
    with torch.no_grad():
        results, calls = run_counting(head, make_features(), make_batch((0, 0)))
    assert calls == reference
    assert [len(result.boxes) for result in results] == [0, 0]


def test_results_are_typed_clipped_and_sorted(
    small_config, spec, classes, make_batch, make_features, build, run_counting
) -> None:
    head = build(small_config(box=BoxHeadConfig(fc_channels=24, score_threshold=0.01)), spec, classes).eval()
    batch = make_batch((4, 2), size=(70, 81))
    with torch.no_grad():
        results, calls = run_counting(head, make_features(), batch)
    for target, result in zip(batch.targets, results):
        count = len(result.scores)
        assert 0 < count <= 100
        assert (result.image_id, result.size, result.original_size) == (target.image_id, (70, 81), (140, 162))
        assert result.boxes.shape == (count, 4)
        assert result.masks.shape == (count, 12, 12)
        assert result.boxes.dtype == result.scores.dtype == result.masks.dtype == torch.float32
        assert result.labels.dtype == torch.int64
        assert (result.boxes >= 0).all()
        assert (result.boxes[:, 2] <= 81).all()
        assert (result.boxes[:, 3] <= 70).all()
        assert (result.scores[1:] <= result.scores[:-1]).all()
        assert set(result.labels.tolist()) <= {0, 1, 2}
        assert ((result.masks >= 0) & (result.masks <= 1)).all()
        assert result.masks.std() > 0
    head.box.config = replace(head.box.config, score_threshold=0.9999)
    with torch.no_grad():
        nothing, calls_of_nothing = run_counting(head, make_features(), batch)
    assert calls_of_nothing == calls
    for result in nothing:
        assert result.boxes.shape == (0, 4)
        assert result.labels.shape == result.scores.shape == (0,)
        assert result.masks.shape == (0, 12, 12)


def test_an_image_is_judged_alike_in_any_batch(
    small_config, spec, classes, make_batch, make_features, select, build
) -> None:
    head = build(small_config(), spec, classes).double().eval()
    batch, features = make_batch((3, 1, 2)), make_features(3, dtype=torch.float64)
    with torch.no_grad():
        together = head(features, batch)
        for i in range(3):
            alone = head([x[[i]] for x in features], select(batch, [i]))[0]
            torch.testing.assert_close(alone.boxes, together[i].boxes)
            torch.testing.assert_close(alone.masks, together[i].masks)


def test_losses_depend_on_keys_alone(small_config, spec, classes, make_batch, make_features, select, build) -> None:
    head = build(small_config(), spec, classes).double()
    batch, features = make_batch((4, 2, 3)), make_features(3, dtype=torch.float64)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = head(features, batch)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = head(features, batch)
    order = [2, 0, 1]
    reordered = head([x[order] for x in features], select(batch, order))
    batch.keys = [replace(key, epoch=key.epoch + 1) for key in batch.keys]
    other = head(features, batch)
    for name in LOSSES:
        assert torch.equal(first[name], again[name])
        torch.testing.assert_close(first[name], reordered[name], rtol=1e-10, atol=1e-12)
    assert not torch.equal(first["loss_classifier"], other["loss_classifier"])


def test_construction_is_deterministic_under_the_seed(small_config, spec, classes) -> None:
    def state(seed) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build_head(small_config(), spec=spec, classes=classes).state_dict()

    first, same, other = state(3), state(3), state(4)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_initial_predictions_are_undecided(spec, classes, make_batch, make_features, small_config) -> None:
    """Small predictors: objectness near ln 2, classes near ln(K + 1), masks near ln 2."""
    torch.manual_seed(0)
    losses = build_head(small_config(), spec=spec, classes=classes)(make_features(), make_batch())
    for name, expected in (("loss_rpn_objectness", 2), ("loss_classifier", 4), ("loss_mask", 2)):
        torch.testing.assert_close(losses[name], torch.tensor(float(expected)).log(), rtol=0.1, atol=0)


def test_bf16_autocast_keeps_losses_float32_and_close(
    small_config, spec, classes, make_batch, make_features, build
) -> None:
    """Same proposals in both: those of the ground truth, since bf16 ranks equal scores differently."""
    head = build(small_config(), spec, classes, spread=0.02)
    head.rpn.propose = lambda output, batch: [target.boxes + 2.0 for target in batch.targets]
    batch, features = make_batch((5, 4)), make_features()
    plain = head(features, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(tuple(x.bfloat16() for x in features), batch)
    for name in LOSSES:
        assert mixed[name].dtype == torch.float32
        torch.testing.assert_close(mixed[name], plain[name], rtol=0.03, atol=1e-3)
    sum(mixed.values()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in head.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        results = head.eval()(tuple(x.bfloat16() for x in features), batch)
    assert {x.dtype for r in results for x in (r.boxes, r.scores, r.masks)} == {torch.float32}


def test_features_without_gradient_stay_untouched(
    small_config, spec, classes, make_batch, make_features, build
) -> None:
    features = make_features(dtype=torch.bfloat16)
    before = [x.clone() for x in features]
    sum(build(small_config(), spec, classes)(features, make_batch()).values()).backward()
    assert all(x.grad is None and torch.equal(x, y) for x, y in zip(features, before))


def test_proposals_are_not_learned_through(small_config, spec, classes, make_batch, make_features, build) -> None:
    """The second stage's losses move the pyramid and its own layers, never the proposal network."""
    head = build(small_config(), spec, classes)
    losses = head(make_features(), make_batch())
    (losses["loss_classifier"] + losses["loss_box"] + losses["loss_mask"]).backward()
    assert all(parameter.grad is None for parameter in head.rpn.parameters())
    assert all(parameter.grad.any() for parameter in head.neck.lateral.parameters())


def test_it_learns_two_images_by_heart(spec, classes, make_batch, make_features, small_config) -> None:
    """Random features, two images: after some steps every object is found, with its class, box and mask."""
    config = small_config(
        neck=FPNConfig(channels=32),
        rpn=RPNConfig(
            anchor_scale=4.0,
            num_samples=64,
            num_pre_nms_train=100,
            num_pre_nms_test=100,
            num_proposals_train=60,
            num_proposals_test=60,
        ),
        box=BoxHeadConfig(fc_channels=128, num_samples=32),
        mask=MaskHeadConfig(num_convs=1, channels=32),
    )
    torch.manual_seed(0)
    head = build_head(config, spec=spec, classes=classes)
    # Five objects that do not overlap.
    batch, features = make_batch((3, 2), first=16), make_features(first=16)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    history = []
    for step in range(300):
        batch.keys = [replace(key, epoch=step) for key in batch.keys]
        loss = sum(head(features, batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append(loss.item())
    assert sum(history[-10:]) / 10 < 0.15 * history[0]

    with torch.no_grad():
        results = head.eval()(features, batch)
    for target, result in zip(batch.targets, results):
        # Every object is found by a confident box of its class, and no confident box is anything else.
        confident = result.scores > 0.5
        overlap = box_overlap(target.boxes, result.boxes[confident])
        same = target.labels[:, None] == result.labels[confident]
        assert overlap.where(same, 0.0).amax(dim=1).min() > 0.8
        assert overlap.where(same, 0.0).amax(dim=0).min() > 0.5
        # The objects are rectangles that fill their boxes.
        assert result.masks[confident].mean() > 0.9


def box_overlap(a, b) -> torch.Tensor:
    """(N, M) intersection over union, written out."""
    inner = torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])
    inner = inner.clamp(min=0).prod(dim=-1)
    return inner / ((a[:, 2:] - a[:, :2]).prod(dim=1)[:, None] + (b[:, 2:] - b[:, :2]).prod(dim=1) - inner)
