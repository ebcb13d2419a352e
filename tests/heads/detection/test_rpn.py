"""Anchors re-derived, and the proposal network against torchvision's with the same weights, anchors and samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from permafrost.heads.detection.config import RPNConfig
from permafrost.heads.detection.rpn import RPN, make_anchors
from permafrost.heads.detection.sampling import sample_balanced

STRIDES = (4, 8, 16)
CONFIG = RPNConfig(
    anchor_scale=4.0,
    num_samples=24,
    num_pre_nms_train=50,
    num_pre_nms_test=30,
    num_proposals_train=35,
    num_proposals_test=20,
    smooth_l1_beta=1 / 9,
)


def counts_as_they_are(name, count) -> torch.Tensor:
    return count.float()


class GivenAnchors(torch.nn.Module):
    def __init__(self, anchors):
        super().__init__()
        self.anchors = anchors

    def forward(self, images, features) -> list[torch.Tensor]:
        return [self.anchors] * len(images.image_sizes)


class SameSampler:
    """Our draw behind the interface of torchvision's sampler."""

    def __init__(self, keys, purpose, num_samples, positive_fraction):
        self.keys, self.purpose = keys, purpose
        self.options = {"num_samples": num_samples, "positive_fraction": positive_fraction}

    def __call__(self, labels):
        samples = sample_balanced([x.clamp(max=1).long() for x in labels], self.keys, self.purpose, **self.options)
        positive, negative = [], []
        for i, x in enumerate(labels):
            for found, mask in (
                (positive, samples.is_positive[i]),
                (negative, samples.is_valid[i] & ~samples.is_positive[i]),
            ):
                found.append(torch.zeros(len(x), dtype=torch.uint8).index_fill_(0, samples.index[i][mask], 1))
        return positive, negative


def make_rpn(config=CONFIG, channels=8) -> RPN:
    torch.manual_seed(0)
    rpn = RPN(channels=channels, strides=STRIDES, config=config, ignore_overlap=0.5)
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return rpn


def torchvision_twin(rpn, anchors, keys) -> RegionProposalNetwork:
    head = RPNHead(8, 3)
    head.load_state_dict(
        {
            f"{theirs}.{part}": getattr(ours, part).detach()
            for theirs, ours in (
                ("conv.0.0", rpn.convs[0]),
                ("cls_logits", rpn.objectness),
                ("bbox_pred", rpn.regressor),
            )
            for part in ("weight", "bias")
        }
    )
    config = rpn.config
    twin = RegionProposalNetwork(
        GivenAnchors(anchors),
        head,
        config.positive_iou,
        config.negative_iou,
        config.num_samples,
        config.positive_fraction,
        {"training": config.num_pre_nms_train, "testing": config.num_pre_nms_test},
        {"training": config.num_proposals_train, "testing": config.num_proposals_test},
        config.nms_iou,
    )
    twin.fg_bg_sampler = SameSampler(keys, "rpn", config.num_samples, config.positive_fraction)
    return twin


def make_pyramid(num_images=2, side=96, channels=8) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    return [torch.randn(num_images, channels, side // s, side // s, generator=random) for s in STRIDES]


def as_torchvision(batch) -> tuple[ImageList, list[dict[str, torch.Tensor]]]:
    images = ImageList(batch.images, [target.size for target in batch.targets])
    return images, [{"boxes": target.boxes, "labels": target.labels} for target in batch.targets]


def test_anchors_follow_their_definition() -> None:
    anchors = make_anchors([(2, 3), (1, 2)], [4, 8], scale=8.0, aspect_ratios=(0.5, 1.0, 2.0))
    expected = []
    for (height, width), stride in (((2, 3), 4), ((1, 2), 8)):
        for row in range(height):
            for column in range(width):
                for ratio in (0.5, 1.0, 2.0):
                    w, h = 8 * stride / ratio**0.5, 8 * stride * ratio**0.5
                    x, y = column * stride, row * stride
                    expected.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    assert anchors.dtype == torch.float32
    torch.testing.assert_close(anchors.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objects", [(4, 2), (0, 3), (0, 0)])
def test_training_equals_torchvision(make_batch, objects) -> None:
    batch = make_batch(objects)
    rpn, pyramid = make_rpn().train(), make_pyramid()
    output = rpn(pyramid)
    losses = rpn.loss(output, batch, counts_as_they_are)
    proposals = rpn.propose(output, batch)

    twin = torchvision_twin(rpn, output.anchors, batch.keys).train()
    images, targets = as_torchvision(batch)
    expected_proposals, expected = twin(images, dict(enumerate(pyramid)), targets)
    torch.testing.assert_close(losses["loss_rpn_objectness"], expected["loss_objectness"], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["loss_rpn_box"], expected["loss_rpn_box_reg"], rtol=1e-5, atol=0)
    assert (losses["loss_rpn_box"] > 0) == (sum(objects) > 0)
    for found, wanted in zip(proposals, expected_proposals):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)

    sum(losses.values()).backward()
    sum(expected.values()).backward()
    torch.testing.assert_close(rpn.convs[0].weight.grad, twin.head.conv[0][0].weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rpn.regressor.weight.grad, twin.head.bbox_pred.weight.grad, rtol=1e-4, atol=1e-6)


def test_proposals_in_evaluation_equal_torchvision(make_batch) -> None:
    batch = make_batch((4, 2), size=(80, 64))
    rpn, pyramid = make_rpn().eval(), make_pyramid()
    output = rpn(pyramid)
    proposals = rpn.propose(output, batch)
    expected, _ = torchvision_twin(rpn, output.anchors, batch.keys).eval()(
        as_torchvision(batch)[0], dict(enumerate(pyramid))
    )
    for found, wanted in zip(proposals, expected):
        assert len(found) == 20
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
        assert (found[:, 2] <= 64).all()
        assert (found[:, 3] <= 80).all()
        assert (found >= 0).all()


def test_anchors_stay_float32_under_bf16_autocast(make_batch) -> None:
    """At 1024 pixels a bf16 coordinate is off by up to 4."""
    batch = make_batch((3,), side=1024)
    rpn = make_rpn()
    pyramid = make_pyramid(1, side=1024)
    with torch.autocast("cpu", torch.bfloat16):
        output = rpn([x.bfloat16() for x in pyramid])
        losses = rpn.loss(output, batch, counts_as_they_are)
        proposals = rpn.propose(output, batch)
    plain = rpn(pyramid)
    assert torch.equal(output.anchors, plain.anchors)
    centres = (plain.anchors[:, :2] + plain.anchors[:, 2:]) / 2
    assert torch.equal(centres.round().long() % 4, torch.zeros_like(centres, dtype=torch.int64))
    assert {output.logits.dtype, output.deltas.dtype, proposals[0].dtype} == {torch.float32}
    for name, expected in rpn.loss(plain, batch, counts_as_they_are).items():
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name], expected, rtol=0.03, atol=0)


def test_loss_from_its_definition(make_batch) -> None:
    """Plain L1, all anchors sampled, in float64 with loops."""
    config = replace(CONFIG, num_samples=10**6, positive_fraction=1.0, smooth_l1_beta=0.0)
    batch, rpn = make_batch((3,), num_ignored=2), make_rpn(config).double()
    output = rpn([x.double() for x in make_pyramid(1)])
    losses = rpn.loss(output, batch, counts_as_they_are)

    target = batch.targets[0]
    gt_boxes, crowds = target.boxes.double(), target.ignore_boxes.double()

    def intersection(a, b) -> float:
        return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))

    def area(a) -> float:
        return (a[2] - a[0]) * (a[3] - a[1])

    anchors = output.anchors.tolist()
    iou = [[intersection(a, g) / (area(a) + area(g) - intersection(a, g)) for g in gt_boxes.tolist()] for a in anchors]
    best_of_gt = [max(row[j] for row in iou) for j in range(len(gt_boxes))]
    objectness = regression = count = num_ignored = 0
    for i, (anchor, row) in enumerate(zip(anchors, iou)):
        positive = max(row) >= 0.7 or any(abs(x - best) < 1e-12 for x, best in zip(row, best_of_gt))
        if not positive and max(row) >= 0.3:
            continue
        if not positive and any(intersection(anchor, c) > 0.5 * area(anchor) for c in crowds.tolist()):
            num_ignored += 1
            continue
        count += 1
        logit = output.logits[0, i]
        objectness += F.softplus(-logit if positive else logit)
        if positive:
            g = gt_boxes[row.index(max(row))].tolist()
            w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
            wanted = [
                ((g[0] + g[2]) - (anchor[0] + anchor[2])) / 2 / w,
                ((g[1] + g[3]) - (anchor[1] + anchor[3])) / 2 / h,
                torch.tensor((g[2] - g[0]) / w, dtype=torch.float64).log().item(),
                torch.tensor((g[3] - g[1]) / h, dtype=torch.float64).log().item(),
            ]
            regression += (output.deltas[0, i] - torch.tensor(wanted, dtype=torch.float64)).abs().sum()
    assert num_ignored > 0
    torch.testing.assert_close(losses["loss_rpn_objectness"], objectness / count, rtol=1e-10, atol=0)
    torch.testing.assert_close(losses["loss_rpn_box"], regression / count, rtol=1e-10, atol=0)


def test_diverged_predictions_give_no_broken_proposals(make_batch) -> None:
    rpn, pyramid = make_rpn(), make_pyramid()
    for value in (torch.nan, torch.inf):
        with torch.no_grad():
            rpn.regressor.bias.fill_(value)
        proposals = rpn.propose(rpn(pyramid), make_batch())
        assert all(x.isfinite().all() for x in proposals)
