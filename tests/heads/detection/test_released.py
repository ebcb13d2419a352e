"""Released detectors' heads: files in the exact layout of mmdetection 2, and the numbers that its formulas give in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import roi_align

from permafrost.heads.base import Head
from permafrost.heads.build import build_head
from permafrost.heads.detection.config import (
    BoxHeadConfig,
    CascadeConfig,
    HTCConfig,
    MaskHeadConfig,
    MaskRCNNConfig,
    RPNConfig,
    SemanticBranchConfig,
)
from permafrost.heads.detection.released import COCO_CLASSES, from_released
from permafrost.heads.errors import HeadError
from permafrost.heads.necks.config import FPNConfig

C, K, POOL, MASK, FC = 16, 3, 5, 6, 24
WIDTHS = (8, 12, 16, 20)


def released(
    *, stages=0, convs=0, num_fc=2, agnostic=False, flows=False, semantic=0, seed=0
) -> dict[str, torch.Tensor]:
    """A state dict as the released files have it; `stages` 0 is Mask R-CNN, `flows` is HTC's mask information flow, `semantic` the
    number of classes of its semantic branch."""
    random = torch.Generator().manual_seed(seed)
    state = {}

    def put(name, *shape) -> None:
        state[name] = torch.randn(*shape, generator=random) * 0.1

    def layer(name, *shape, bias=True) -> None:
        put(f"{name}.weight", *shape)
        if bias:
            put(f"{name}.bias", shape[0])

    put("backbone.patch_embed.proj.weight", 8, 3, 4, 4)
    for i, width in enumerate(WIDTHS):
        put(f"backbone.norm{i}.weight", width)
        put(f"backbone.norm{i}.bias", width)
        layer(f"neck.lateral_convs.{i}.conv", C, width, 1, 1)
        layer(f"neck.fpn_convs.{i}.conv", C, C, 3, 3)
    layer("rpn_head.rpn_conv", C, C, 3, 3)
    layer("rpn_head.rpn_cls", 3, C, 1, 1)
    layer("rpn_head.rpn_reg", 12, C, 1, 1)
    for stage in range(stages) if stages else [None]:
        box = "roi_head.bbox_head" + ("" if stage is None else f".{stage}")
        mask = "roi_head.mask_head" + ("" if stage is None else f".{stage}")
        for i in range(convs):
            layer(f"{box}.shared_convs.{i}.conv", C, C, 3, 3, bias=False)
            for part in ("weight", "bias", "running_mean"):
                put(f"{box}.shared_convs.{i}.bn.{part}", C)
            state[f"{box}.shared_convs.{i}.bn.running_var"] = torch.rand(C, generator=random) + 0.2
            state[f"{box}.shared_convs.{i}.bn.num_batches_tracked"] = torch.tensor(7)
        widths = [C * POOL**2] + [FC] * num_fc
        for i in range(num_fc):
            layer(f"{box}.shared_fcs.{i}", widths[i + 1], widths[i])
        layer(f"{box}.fc_cls", K + 1, FC)
        layer(f"{box}.fc_reg", 4 if agnostic else 4 * K, FC)
        layer(f"{mask}.convs.0.conv", C, C, 3, 3)
        state[f"{mask}.upsample.weight"] = torch.randn(C, C, 2, 2, generator=random) * 0.1
        put(f"{mask}.upsample.bias", C)
        layer(f"{mask}.conv_logits", K, C, 1, 1)
        if flows and stage:
            layer(f"{mask}.conv_res.conv", C, C, 1, 1)
    if semantic:
        head = "roi_head.semantic_head"
        for i in range(5):
            layer(f"{head}.lateral_convs.{i}.conv", C, C, 1, 1)
        for i in range(4):
            layer(f"{head}.convs.{i}.conv", C, C, 3, 3)
        layer(f"{head}.conv_embedding.conv", C, C, 1, 1)
        layer(f"{head}.conv_logits", semantic, C, 1, 1)
    return state


def config(small_config, kind=None, **box) -> MaskRCNNConfig:
    own = small_config(
        neck=FPNConfig(channels=C),
        rpn=RPNConfig(anchor_scale=4.0, num_pre_nms_test=60, num_proposals_test=40),
        box=BoxHeadConfig(resolution=POOL, fc_channels=FC, conv_channels=C, num_samples=16, **box),
        mask=MaskHeadConfig(num_convs=1, channels=C, resolution=MASK),
    )
    return own if kind is None else kind(**vars(own))


def loaded(config, spec, state) -> Head:
    head = build_head(config, spec=spec, classes=["a", "b", "c"]).double()
    head.load_state_dict(from_released(state).tensors)
    return head.eval()


def reference_pyramid(state, features) -> list[torch.Tensor]:
    """The branch's neck on the backbone's raw maps: its output norms, laterals, top-down sums, outputs, P6."""
    state = {name: tensor.double() for name, tensor in state.items()}
    inner = []
    for i, x in enumerate(features):
        x = x.double().permute(0, 2, 3, 1)
        x = F.layer_norm(x, x.shape[-1:], state[f"backbone.norm{i}.weight"], state[f"backbone.norm{i}.bias"], 1e-5)
        name = f"neck.lateral_convs.{i}.conv"
        inner.append(F.conv2d(x.permute(0, 3, 1, 2), state[f"{name}.weight"], state[f"{name}.bias"]))
    for i in (2, 1, 0):
        inner[i] = inner[i] + F.interpolate(inner[i + 1], size=inner[i].shape[-2:], mode="nearest")
    names = [f"neck.fpn_convs.{i}.conv" for i in range(4)]
    out = [F.conv2d(x, state[f"{n}.weight"], state[f"{n}.bias"], padding=1) for n, x in zip(names, inner)]
    return [*out, F.max_pool2d(out[-1], 1, stride=2)]


def reference_box(state, box, regions) -> tuple[torch.Tensor, ...]:
    """shared_convs with batch norm in evaluation, shared_fcs on the flattened region, fc_cls and fc_reg."""
    x = regions
    state = {name: tensor.double() for name, tensor in state.items()}
    i = 0
    while f"{box}.shared_convs.{i}.conv.weight" in state:
        name = f"{box}.shared_convs.{i}"
        x = F.conv2d(x, state[f"{name}.conv.weight"], padding=1)
        norm = [state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        x = F.relu(F.batch_norm(x, *norm, training=False, eps=1e-5))
        i += 1
    x = x.flatten(1)
    i = 0
    while f"{box}.shared_fcs.{i}.weight" in state:
        x = F.relu(F.linear(x, state[f"{box}.shared_fcs.{i}.weight"], state[f"{box}.shared_fcs.{i}.bias"]))
        i += 1
    return tuple(F.linear(x, state[f"{box}.{fc}.weight"], state[f"{box}.{fc}.bias"]) for fc in ("fc_cls", "fc_reg"))


@pytest.fixture
def inputs(make_features) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    boxes = torch.tensor([[3.0, 5.0, 40.5, 60.0], [10.0, 8.0, 33.0, 30.0], [0.0, 0.0, 90.0, 90.0]], dtype=torch.float64)
    return make_features(1), boxes, torch.zeros(3, dtype=torch.int64)


def test_neck_and_proposals_are_those_of_the_released_layout(small_config, spec, inputs) -> None:
    state = released()
    head = loaded(config(small_config), spec, state)
    features, _, _ = inputs
    expected = reference_pyramid(state, features)
    pyramid = head.neck(features)
    for own, other in zip(pyramid, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-10)

    output = head.rpn(pyramid)
    double = {name: tensor.double() for name, tensor in state.items()}
    logits, deltas = [], []
    for level in expected:
        x = F.relu(F.conv2d(level, double["rpn_head.rpn_conv.weight"], double["rpn_head.rpn_conv.bias"], padding=1))
        scores = F.conv2d(x, double["rpn_head.rpn_cls.weight"], double["rpn_head.rpn_cls.bias"])
        boxes = F.conv2d(x, double["rpn_head.rpn_reg.weight"], double["rpn_head.rpn_reg.bias"])
        logits.append(scores[0].permute(1, 2, 0).reshape(-1))
        deltas.append(boxes[0].permute(1, 2, 0).reshape(-1, 4))
    torch.testing.assert_close(output.logits[0], torch.cat(logits), rtol=0, atol=1e-10)
    torch.testing.assert_close(output.deltas[0], torch.cat(deltas), rtol=0, atol=1e-10)
    # mmdetection's anchors: base size 4 strides, ratios (height over width) 0.5, 1, 2, centred on the cell's corner.
    first = output.anchors[:3]
    ratios = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    width, height = 16 / ratios.sqrt(), 16 * ratios.sqrt()
    expected_anchors = torch.stack([-width / 2, -height / 2, width / 2, height / 2], dim=1)
    torch.testing.assert_close(first, expected_anchors, rtol=0, atol=1e-5)


@pytest.mark.parametrize("convs", [0, 2], ids=["2fc", "convs with batch norms"])
@pytest.mark.parametrize("agnostic", [False, True])
def test_box_branch_computes_what_the_released_one_does(small_config, spec, inputs, convs, agnostic) -> None:
    num_fc = 1 if convs else 2
    state = released(convs=convs, num_fc=num_fc, agnostic=agnostic)
    head = loaded(config(small_config, num_convs=convs, num_fc=num_fc, class_agnostic=agnostic), spec, state)
    features, boxes, image_index = inputs
    pyramid = reference_pyramid(state, features)
    # Boxes of sides below 112 come from the finest level.
    regions = roi_align(
        pyramid[0], torch.cat([torch.zeros(3, 1, dtype=torch.float64), boxes], 1), POOL, 1 / 4, 2, aligned=True
    )
    expected_logits, expected_deltas = reference_box(state, "roi_head.bbox_head", regions)
    logits, deltas = head.box(head.pooled_levels(head.neck(features)), boxes, image_index)
    # Folded norms are kept in float32.
    atol = 1e-6 if convs else 1e-10
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=atol)
    torch.testing.assert_close(deltas, expected_deltas.view(3, -1, 4), rtol=0, atol=atol)
    # The background's column is the last: raising its bias lowers every class.
    with torch.no_grad():
        head.box.classifier.bias[K] += 50.0
    silenced, _ = head.box(head.pooled_levels(head.neck(features)), boxes, image_index)
    assert silenced.softmax(1)[:, :K].max() < 1e-6


def test_mask_branch_computes_what_the_released_one_does(small_config, spec, inputs) -> None:
    state = released()
    head = loaded(config(small_config), spec, state)
    features, boxes, image_index = inputs
    labels = torch.tensor([2, 0, 1])
    pyramid = reference_pyramid(state, features)
    double = {name: tensor.double() for name, tensor in state.items()}
    regions = torch.cat([torch.zeros(3, 1, dtype=torch.float64), boxes], 1)
    x = roi_align(pyramid[0], regions, MASK, 1 / 4, 2, aligned=True)
    name = "roi_head.mask_head"
    x = F.relu(F.conv2d(x, double[f"{name}.convs.0.conv.weight"], double[f"{name}.convs.0.conv.bias"], padding=1))
    x = F.relu(F.conv_transpose2d(x, double[f"{name}.upsample.weight"], double[f"{name}.upsample.bias"], stride=2))
    x = F.conv2d(x, double[f"{name}.conv_logits.weight"], double[f"{name}.conv_logits.bias"])
    own = head.mask(head.pooled_levels(head.neck(features)), boxes, image_index, labels)
    torch.testing.assert_close(own, x[torch.arange(3), labels], rtol=0, atol=1e-10)


def test_cascade_stages_go_to_their_places(small_config, spec, inputs) -> None:
    state = released(stages=3, convs=2, num_fc=1)
    head = loaded(config(small_config, CascadeConfig, num_convs=2, num_fc=1), spec, state)
    features, boxes, image_index = inputs
    pyramid = reference_pyramid(state, features)
    regions = roi_align(
        pyramid[0], torch.cat([torch.zeros(3, 1, dtype=torch.float64), boxes], 1), POOL, 1 / 4, 2, aligned=True
    )
    for stage, branch in enumerate(head.boxes):
        logits, _ = branch(head.pooled_levels(head.neck(features)), boxes, image_index)
        expected, _ = reference_box(state, f"roi_head.bbox_head.{stage}", regions)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert from_released(state).folded == [f"boxes.{stage}.convs.{i}" for stage in range(3) for i in range(2)]


def test_masks_of_a_hybrid_task_cascade_flow_as_the_released_ones_do(small_config, spec, inputs) -> None:
    """Its mask head: the last convolution's output of the stage before, through a 1x1 convolution and a ReLU, is added."""
    state = released(stages=3, agnostic=True, flows=True)
    head = loaded(config(small_config, HTCConfig, class_agnostic=True), spec, state)
    features, boxes, _ = inputs
    double = {name: tensor.double() for name, tensor in state.items()}
    regions = torch.cat([torch.zeros(3, 1, dtype=torch.float64), boxes], 1)
    pooled = roi_align(reference_pyramid(state, features)[0], regions, MASK, 1 / 4, 2, aligned=True)
    labels, before, own = torch.tensor([2, 0, 1]), None, None
    for stage, branch in enumerate(head.masks):
        name = f"roi_head.mask_head.{stage}"
        x = pooled
        if stage:
            handed = F.conv2d(before, double[f"{name}.conv_res.conv.weight"], double[f"{name}.conv_res.conv.bias"])
            x = x + F.relu(handed)
        before = F.relu(
            F.conv2d(x, double[f"{name}.convs.0.conv.weight"], double[f"{name}.convs.0.conv.bias"], padding=1)
        )
        x = F.conv_transpose2d(before, double[f"{name}.upsample.weight"], double[f"{name}.upsample.bias"], stride=2)
        x = F.conv2d(F.relu(x), double[f"{name}.conv_logits.weight"], double[f"{name}.conv_logits.bias"])
        own = branch.features(pooled, own)
        torch.testing.assert_close(branch.logits(own, labels), x[torch.arange(3), labels], rtol=0, atol=1e-10)


def _rename(state, old, new) -> None:
    state[new] = state.pop(old)


def public_semantic_branch(state, pyramid, level) -> tuple[torch.Tensor, torch.Tensor]:
    """The public code's FusedSemanticHead, from its description: every level is resized to one, then 1x1 convolution and ReLU;
    the sum goes through 3x3 convolutions; logits and an embedding come of it."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def conv(name, x, padding=0) -> torch.Tensor:
        full = f"roi_head.semantic_head.{name}"
        return F.conv2d(x, state[f"{full}.weight"], state[f"{full}.bias"], padding=padding)

    height, width = pyramid[level].shape[-2:]
    x = conv(f"lateral_convs.{level}.conv", pyramid[level]).clamp(min=0)
    for i, own in enumerate(pyramid):
        if i == level:
            continue
        # Bilinear with aligned corners, written out: the first and last cells of both grids coincide.
        rows = torch.linspace(0, own.shape[-2] - 1, height, dtype=torch.float64)
        columns = torch.linspace(0, own.shape[-1] - 1, width, dtype=torch.float64)
        weights = [
            (1 - (at[:, None] - torch.arange(size)).abs()).clamp(min=0)
            for at, size in zip((rows, columns), own.shape[-2:])
        ]
        resized = torch.einsum("yh,bchw,xw->bcyx", weights[0], own, weights[1])
        x = x + conv(f"lateral_convs.{i}.conv", resized).clamp(min=0)
    for i in range(4):
        x = conv(f"convs.{i}.conv", x, padding=1).clamp(min=0)
    return conv("conv_logits", x), conv("conv_embedding.conv", x).clamp(min=0)


def test_the_semantic_branch_of_a_hybrid_task_cascade_is_the_public_one(small_config, spec, inputs) -> None:
    state = released(stages=3, agnostic=True, flows=True, semantic=7)
    own = config(small_config, HTCConfig, class_agnostic=True)
    head = loaded(dataclasses.replace(own, semantic=SemanticBranchConfig(num_classes=7)), spec, state)
    features, _, _ = inputs
    pyramid = [level.detach().requires_grad_() for level in head.neck([x.double() for x in features])]
    labels = torch.randint(0, 7, (len(pyramid[0]), *pyramid[1].shape[-2:]), generator=torch.Generator().manual_seed(0))
    found, expected = head.semantic(pyramid), public_semantic_branch(state, pyramid, level=1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    gradients = [
        torch.autograd.grad(F.cross_entropy(logits, labels) + embedding.square().mean(), pyramid)
        for logits, embedding in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)

    # The order of runs of before: it is another function.
    before = dataclasses.replace(own, semantic=SemanticBranchConfig(num_classes=7, resize="after"))
    other = loaded(before, spec, state).semantic(pyramid)[0]
    assert (other - found[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.update({"roi_head.semantic_head.norms.0.weight": torch.zeros(1)}), "no place.*semantic"),
        (lambda s: s.update({"mask_feature.weight": torch.zeros(1)}), "no place.*mask_feature"),
        (lambda s: s.pop("roi_head.bbox_head.shared_convs.0.bn.running_var"), "without running_var"),
        (lambda s: s.pop("rpn_head.rpn_cls.weight"), "not the tensors of a released detector"),
        (lambda s: s.pop("roi_head.bbox_head.fc_cls.weight"), "incomplete"),
        (lambda s: s.update({"roi_head.bbox_head.fc_cls.weight": torch.zeros(K, FC)}), "3 outputs.*3 boxes.*3 masks"),
        (lambda s: _rename(s, "neck.fpn_convs.0.conv.weight", "neck.bifpn.0.conv.weight"), "no place.*bifpn"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused_by_name(change, match) -> None:
    state = released(convs=1, num_fc=1)
    change(state)
    with pytest.raises(HeadError, match=match):
        from_released(state)


def test_coco_classes_are_eighty_different_ones() -> None:
    assert len(set(COCO_CLASSES)) == 80
    assert (COCO_CLASSES[0], COCO_CLASSES[11], COCO_CLASSES[-1]) == ("person", "stop sign", "toothbrush")
