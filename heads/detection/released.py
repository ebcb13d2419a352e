"""Read heads of the Swin papers' released detectors, under our own names.

Those checkpoints (Swin-Transformer-Object-Detection, a branch of mmdetection 2) hold `backbone.*`, `neck.*`, `rpn_head.*` and
`roi_head.*`. What ours and theirs agree on, so that tensors keep their order: the background is the last of the classifier's
outputs; a region is flattened channel by channel, then row by row; the regressor gives dx, dy, log dw, log dh of the first class,
then of the next; anchors of a cell come by rising height over width. What differs:

- the norms of the backbone's outputs, `backbone.norm0` to `norm3`, are parts of the head here (`neck.level_norms`);
- a box branch with convolutions (4conv1fc of the Cascade) has batch norms. Ours have none that look beyond an image: each is folded
  into its convolution with its running statistics, which computes the same in evaluation, and stays folded if trained further.

mmdetection averages the stages' class logits at test where we average their probabilities, as the Cascade's authors do; so scores
of a loaded Cascade differ a little from theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from permafrost.heads.base import ReleasedHead
from permafrost.heads.errors import HeadError

BATCH_NORM_EPS = 1e-5
MAX_LISTED = 8
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat",
    "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl",
    "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's 80 classes in the order of their category ids: the released files' where they do not say."""

_BRANCHES = (
    (r"(convs|shared_convs)\.(\d+)\.conv\.", r"convs.\2."),
    (r"shared_fcs\.(\d+)\.", r"fcs.\1."),
    (r"fc_cls\.", "classifier."),
    (r"fc_reg\.", "regressor."),
    (r"conv_logits\.", "predictor."),
    (r"conv_res\.conv\.", "previous."),
    (r"upsample\.", "upsample."),
)
_OTHERS = (
    (r"backbone\.norm(\d)\.", r"neck.level_norms.\1."),
    (r"neck\.lateral_convs\.(\d+)\.conv\.", r"neck.lateral.\1."),
    (r"neck\.fpn_convs\.(\d+)\.conv\.", r"neck.output.\1."),
    (r"rpn_head\.rpn_conv\.", "rpn.convs.0."),
    (r"rpn_head\.rpn_cls\.", "rpn.objectness."),
    (r"rpn_head\.rpn_reg\.", "rpn.regressor."),
    (r"roi_head\.semantic_head\.lateral_convs\.(\d+)\.conv\.", r"semantic.lateral.\1."),
    (r"roi_head\.semantic_head\.convs\.(\d+)\.conv\.", r"semantic.convs.\1."),
    (r"roi_head\.semantic_head\.conv_embedding\.conv\.", "semantic.embedding."),
    (r"roi_head\.semantic_head\.conv_logits\.", "semantic.classifier."),
)
_BRANCH = re.compile(r"roi_head\.(bbox|mask)_head\.(?:(\d+)\.)?(.+)")
_BATCH_NORM = re.compile(r"(.+)\.bn\.(weight|bias|running_mean|running_var|num_batches_tracked)")
_MARKS = ("rpn_head.rpn_cls.weight", "roi_head.")


@dataclass
class RenamedHead:
    """A released detector's head under our names.

    Attributes:
        tensors: in the file's dtype; float32 where batch norms were folded in.
        num_classes: K.
        folded: convolutions, by our names, that a batch norm was folded into.
    """

    tensors: dict[str, Tensor]
    num_classes: int
    folded: list[str]


def is_released(names: Mapping[str, object]) -> bool:
    """Return whether a checkpoint's names are those of such a detector."""
    return _MARKS[0] in names and any(name.startswith(_MARKS[1]) for name in names)


def read(tensors: Mapping[str, Tensor], *, checkpoint: Any, file: str) -> ReleasedHead:
    """Return a released detector's head; its classes are those of the file, or COCO's if there are 80; see heads.released."""
    found = from_released(tensors)
    stated = _stated_classes(checkpoint)
    notes = [f"batch norms folded into {len(found.folded)} convolutions"] if found.folded else []
    if stated is not None and len(stated) == found.num_classes:
        return ReleasedHead(found.tensors, stated, notes)
    if found.num_classes != len(COCO_CLASSES):
        return ReleasedHead.of_unknown_classes(found.tensors, found.num_classes, file, notes)
    notes.append("the file names no classes; they are taken for COCO's 80, in the order of their ids")
    return ReleasedHead(found.tensors, list(COCO_CLASSES), notes)


def _stated_classes(checkpoint: Any) -> list[str] | None:
    """Return `meta.CLASSES` of mmdetection 2."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    classes = meta.get("CLASSES") if isinstance(meta, dict) else None
    if isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes):
        return list(classes)
    return None


def from_released(tensors: Mapping[str, Tensor]) -> RenamedHead:
    """Return a released detector's head under our names. Strict: every tensor that is not the backbone's has a place.

    Args:
        tensors: all of the file.

    Raises:
        HeadError: naming tensors that are unknown, incomplete, or of a classifier with the background first.
    """
    if not is_released(tensors):
        shown = ", ".join(sorted(tensors)[:MAX_LISTED])
        raise HeadError(
            f"these are not the tensors of a released detector, which has {_MARKS[0]} and {_MARKS[1]}*; they begin with {shown}"
        )
    norms: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        if match := _BATCH_NORM.fullmatch(name):
            norms.setdefault(match[1], {})[match[2]] = tensor
        elif own := _renamed(name):
            found[own] = tensor
        elif not name.startswith("backbone."):
            unknown.append(name)
    folded = []
    for place, norm in norms.items():
        own = _renamed(f"{place}.conv.")
        missing = {"weight", "bias", "running_mean", "running_var"} - norm.keys()
        if own is None or f"{own}weight" not in found or missing:
            unknown.append(
                f"{place}.bn.* ({'without ' + ', '.join(sorted(missing)) if missing else 'of no convolution'})"
            )
            continue
        weight, bias = _fold(found[f"{own}weight"], found.get(f"{own}bias"), norm)
        found[f"{own}weight"], found[f"{own}bias"] = weight, bias
        folded.append(own.removesuffix("."))
    if unknown:
        more = f" and {len(unknown) - MAX_LISTED} more" if len(unknown) > MAX_LISTED else ""
        raise HeadError(
            f"a released detector with tensors that have no place in our heads: {', '.join(sorted(unknown)[:MAX_LISTED])}{more}; "
            "Mask R-CNN, Cascade Mask R-CNN and their HTC, with an FPN, can be read"
        )
    return RenamedHead(found, _count_classes(found), folded)


def _renamed(name: str) -> str | None:
    """Return our name of one of theirs, or of its beginning; None if it has none."""
    for pattern, own in _OTHERS:
        if match := re.match(pattern, name):
            return match.expand(own) + name[match.end() :]
    if branch := _BRANCH.fullmatch(name):
        kind, stage, rest = branch.groups()
        place = {"bbox": "box", "mask": "mask"}[kind]
        place = place if stage is None else f"{place}{'es' if kind == 'bbox' else 's'}.{stage}"
        for pattern, own in _BRANCHES:
            if match := re.match(pattern, rest):
                return f"{place}.{match.expand(own)}{rest[match.end() :]}"
    return None


def _fold(weight: Tensor, bias: Tensor | None, norm: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution that computes what it and the batch norm behind it do in evaluation."""
    scale, shift, mean, variance = (norm[key].double() for key in ("weight", "bias", "running_mean", "running_var"))
    factor = scale / (variance + BATCH_NORM_EPS).sqrt()
    start = torch.zeros_like(mean) if bias is None else bias.double()
    return (weight.double() * factor[:, None, None, None]).to(torch.float32), ((start - mean) * factor + shift).float()


def _count_classes(found: Mapping[str, Tensor]) -> int:
    """Return K, from the first stage's classifier and regressor or masks.

    Raises:
        HeadError: there is no classifier, or it has no output for the background.
    """
    prefix = next((one for one in ("box.", "boxes.0.") if f"{one}classifier.weight" in found), None)
    if prefix is None:
        raise HeadError("a released detector without roi_head.bbox_head.fc_cls.weight: its file is incomplete")
    outputs = len(found[f"{prefix}classifier.weight"])
    masks = found.get("mask.predictor.weight", found.get("masks.0.predictor.weight"))
    num_boxes = len(found[f"{prefix}regressor.weight"]) // 4 if f"{prefix}regressor.weight" in found else 1
    counted = {outputs - 1, *([num_boxes] if num_boxes > 1 else []), *([len(masks)] if masks is not None else [])}
    if len(counted) > 1:
        raise HeadError(
            f"a released detector whose classifier has {outputs} outputs, whose regressor {num_boxes} boxes and whose mask head "
            f"{'no' if masks is None else len(masks)} masks: expected K + 1, K (or 1) and K, as mmdetection 2 writes them"
        )
    return outputs - 1
