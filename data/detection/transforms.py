"""Turn an image on disk, with its objects, into what the network sees.

Training is large-scale jitter with a fixed-size crop (Ghiasi et al., Simple Copy-Paste, CVPR 2021): the image is
resized by a random factor of what fits the square, then a square is cropped where it is larger and padded at the
bottom and right where it is smaller. Or it is classical multi-scale training: a random shorter side, the aspect ratio kept,
nothing cut off. Evaluation fits the whole image into the square, or resizes by the shorter side. All randomness is drawn from
the generator that is passed in, always the same number of draws, so a sample is a pure function of its key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from permafrost.data.detection.config import EvaluationConfig, JitterConfig, MultiScaleConfig
from permafrost.data.pictures import geometry
from permafrost.data.pictures.geometry import NO_CLASS, PAD_COLOR, fitted_size, pad_to, padded_size, short_side_size


@dataclass
class Scene:
    """An image with what is annotated in it; N objects, C crowd regions.

    Attributes:
        image: (3, H, W) uint8.
        masks: (N, H, W) uint8, 0 or 1.
        crowd_boxes: (C, 4) float32, xyxy.
        semantic: (H, W) uint8 class of every pixel, or None.
    """

    image: Tensor
    masks: Tensor
    crowd_boxes: Tensor
    semantic: Tensor | None = None


@dataclass
class NetworkInput:
    """A scene inside the canvas of height S and width T, in most cases a square.

    Attributes:
        image: (3, S, T) uint8.
        masks: (N', S, T) bool.
        boxes: (N', 4) float32, xyxy: the tight boxes of the masks.
        kept: (N',) int64, which of the scene's objects these are.
        ignore_boxes: (C', 4) float32, xyxy.
        size: (height, width) of the image inside the canvas.
        semantic: (S, T) uint8, NO_CLASS in the padding; or None.
    """

    image: Tensor
    masks: Tensor
    boxes: Tensor
    kept: Tensor
    ignore_boxes: Tensor
    size: tuple[int, int]
    semantic: Tensor | None = None


def boxes_of_masks(masks: Tensor) -> Tensor:
    """Return tight boxes (N, 4) float32 xyxy of masks (N, H, W).

    The right and lower edges lie behind the last pixel: one pixel has a box of side 1. Empty masks give zeros.
    """
    _, height, width = masks.shape
    columns, rows = masks.amax(dim=1).to(torch.uint8), masks.amax(dim=2).to(torch.uint8)
    filled = columns.amax(dim=1)
    left, top = columns.argmax(dim=1), rows.argmax(dim=1)
    right, bottom = width - columns.flip(1).argmax(dim=1), height - rows.flip(1).argmax(dim=1)
    return torch.stack([left, top, right * filled, bottom * filled], dim=1).float()


class JitterTransform:
    """Large-scale jitter for training.

    Args:
        image_size: side S of the square, pixels.
        jitter: ranges and probabilities.
    """

    def __init__(self, image_size: int, jitter: JitterConfig) -> None:
        self.image_size = image_size
        self.jitter = jitter

    def __call__(self, scene: Scene, generator: torch.Generator) -> NetworkInput:
        """Transform a scene by random choices drawn from `generator`."""
        jitter, square = self.jitter, self.image_size
        scale_draw, top_draw, left_draw, flip_draw, *color_draws = torch.rand(7, generator=generator).tolist()
        low, high = jitter.scale_range
        height, width = scene.image.shape[-2:]
        scaled = fitted_size(height, width, square * (low + (high - low) * scale_draw))
        size = (min(scaled[0], square), min(scaled[1], square))
        # The draws are below 1, so every offset from 0 to the overhang is equally likely.
        top, left = int(top_draw * (scaled[0] - size[0] + 1)), int(left_draw * (scaled[1] - size[1] + 1))
        scene = crop(resize(scene, scaled), top, left, size)
        if flip_draw < jitter.flip:
            scene = flip(scene)
        if jitter.color > 0:
            # A new scene: without a resize or crop this one is still the caller's.
            scene = replace(scene, image=_jitter_color(scene.image, jitter.color, color_draws))
        return _pad(scene, (square, square), jitter.min_box_side)


class MultiScaleTransform:
    """Classical multi-scale training: a random shorter side, padding to whole multiples of DIVISOR.

    Args:
        scales: sides and probabilities.
    """

    def __init__(self, scales: MultiScaleConfig) -> None:
        self.scales = scales

    def __call__(self, scene: Scene, generator: torch.Generator) -> NetworkInput:
        """Transform a scene by random choices drawn from `generator`."""
        scales = self.scales
        side_draw, flip_draw, *color_draws = torch.rand(5, generator=generator).tolist()
        side = scales.short_sides[int(side_draw * len(scales.short_sides))]
        height, width = scene.image.shape[-2:]
        scene = resize(scene, short_side_size(height, width, side, scales.max_side))
        if flip_draw < scales.flip:
            scene = flip(scene)
        if scales.color > 0:
            scene = replace(scene, image=_jitter_color(scene.image, scales.color, color_draws))
        return _pad(scene, padded_size(scene.image.shape[-2:]), scales.min_box_side)


class FitTransform:
    """The whole image, resized: evaluation.

    Args:
        image_size: side S of the square, pixels.
        evaluation: whether it is fitted into the square, or by which shorter side.
        size: another side of the square, or shorter side; None is theirs.
        is_flipped: whether it is mirrored, left to right.
    """

    def __init__(
        self,
        image_size: int,
        evaluation: EvaluationConfig | None = None,
        *,
        size: int | None = None,
        is_flipped: bool = False,
    ) -> None:
        self.evaluation = evaluation or EvaluationConfig()
        self.side = size or (image_size if self.evaluation.resize == "square" else self.evaluation.short_side)
        self.is_flipped = is_flipped

    def __call__(self, scene: Scene, generator: torch.Generator | None = None) -> NetworkInput:
        """Transform a scene; nothing is random."""
        height, width = scene.image.shape[-2:]
        if self.evaluation.resize == "square":
            size = fitted_size(height, width, self.side)
            canvas = (self.side, self.side)
        else:
            longest = self.evaluation.max_side * self.side / self.evaluation.short_side
            size = short_side_size(height, width, self.side, longest)
            canvas = padded_size(size)
        scene = resize(scene, size)
        if self.is_flipped:
            scene = flip(scene)
        return _pad(scene, canvas, min_box_side=0.0)


def resize(scene: Scene, size: tuple[int, int]) -> Scene:
    """Return the scene at another (height, width); masks and maps take the nearest pixel."""
    if tuple(scene.image.shape[-2:]) == size:
        return scene
    boxes = functional.resize(_as_boxes(scene), list(size)).as_subclass(Tensor)
    semantic = None if scene.semantic is None else geometry.resize_map(scene.semantic, size)
    return Scene(geometry.resize(scene.image, size), geometry.resize_map(scene.masks, size), boxes, semantic)


def crop(scene: Scene, top: int, left: int, size: tuple[int, int]) -> Scene:
    """Return the window of (height, width) `size` whose corner is at (top, left)."""
    if tuple(scene.image.shape[-2:]) == size:
        return scene
    boxes = functional.crop(_as_boxes(scene), top, left, *size).as_subclass(Tensor)
    image, masks = (geometry.crop(x, top, left, size) for x in (scene.image, scene.masks))
    semantic = None if scene.semantic is None else geometry.crop(scene.semantic, top, left, size)
    return Scene(image, masks, boxes, semantic)


def flip(scene: Scene) -> Scene:
    """Return the scene mirrored, left to right."""
    boxes = functional.horizontal_flip(_as_boxes(scene)).as_subclass(Tensor)
    semantic = None if scene.semantic is None else geometry.flip(scene.semantic)
    return Scene(geometry.flip(scene.image), geometry.flip(scene.masks), boxes, semantic)


def _as_boxes(scene: Scene) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(scene.crowd_boxes, format="XYXY", canvas_size=tuple(scene.image.shape[-2:]))


def _jitter_color(image: Tensor, strength: float, draws: list[float]) -> Tensor:
    """Change brightness, contrast and saturation, each by a factor in 1 - strength to 1 + strength; draws are in [0, 1)."""
    adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for change, draw in zip(adjust, draws):
        image = change(image, 1 + strength * (2 * draw - 1))
    return image


def _pad(scene: Scene, canvas: tuple[int, int], min_box_side: float) -> NetworkInput:
    """Put a scene into the upper left of the canvas, drop what is gone, derive the boxes."""
    height, width = scene.image.shape[-2:]
    image = pad_to(scene.image, canvas, PAD_COLOR)
    boxes = boxes_of_masks(scene.masks)
    kept = kept_boxes(boxes, min_box_side)
    masks = pad_to(scene.masks[kept].bool(), canvas, False)
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    ignore = torch.minimum(scene.crowd_boxes.clamp(min=0), limits)
    ignore = ignore[(ignore[:, 2:] > ignore[:, :2]).all(dim=1)]
    semantic = None if scene.semantic is None else pad_to(scene.semantic, canvas, NO_CLASS)
    return NetworkInput(image, masks, boxes[kept], kept, ignore, (height, width), semantic)


def kept_boxes(boxes: Tensor, min_box_side: float) -> Tensor:
    """Return (N',) int64, which of (N, 4) boxes have an area, and no side below `min_box_side` pixels."""
    sides = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1)
    return torch.nonzero((sides > 0) & (sides >= min_box_side))[:, 0]
