"""Turn a photo with labels into what the network sees in training; in evaluation it sees the views that `views` plans.

All randomness is drawn from the generator that is passed in, always the same number of draws, so a sample is a pure function of
its key. Resizing, cropping and padding are those of `pictures.geometry`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from permafrost.data.pictures.geometry import (
    NO_CLASS,
    PAD_COLOR,
    crop,
    flip,
    pad_to,
    resize,
    resize_map,
    short_side_size,
)
from permafrost.data.segmentation.config import SegmentationJitterConfig

MAX_CROPS = 10
"""Crops that are tried before the last one is taken, whatever it holds."""
_NUM_COLOR_DRAWS = 9


class SegmentationJitter:
    """Random scale, square crop, colours and flip.

    Args:
        image_size: side S of the square, pixels.
        jitter: ranges and probabilities.
    """

    def __init__(self, image_size: int, jitter: SegmentationJitterConfig) -> None:
        self.image_size = image_size
        self.jitter = jitter

    def __call__(
        self, image: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Transform a photo by random choices drawn from `generator`.

        Args:
            image: (3, H, W) uint8.
            labels: (H, W) uint8.
            generator: gives all randomness.

        Returns:
            (3, S, S) uint8, (S, S) uint8, and the (height, width) of what is not padding.
        """
        jitter, square = self.jitter, self.image_size
        scale_draw, flip_draw, *draws = torch.rand(2 + 2 * MAX_CROPS + _NUM_COLOR_DRAWS, generator=generator).tolist()
        color_draws, places = draws[:_NUM_COLOR_DRAWS], draws[_NUM_COLOR_DRAWS:]
        low, high = jitter.scale_range
        if jitter.num_scales > 1:
            scale_draw = int(scale_draw * jitter.num_scales) / (jitter.num_scales - 1)
        side = square * (low + (high - low) * scale_draw)
        height, width = image.shape[-2:]
        scaled = short_side_size(height, width, side, jitter.max_side)
        image, labels = self._crop(resize(image, scaled), resize_map(labels, scaled), places)
        if jitter.color_probability:
            image = self._change_colors(image, color_draws)
        if flip_draw < jitter.flip:
            image, labels = flip(image), flip(labels)
        height, width = image.shape[-2:]
        canvas = (square, square)
        return pad_to(image, canvas, PAD_COLOR), pad_to(labels, canvas, NO_CLASS), (height, width)

    def _crop(self, image: Tensor, labels: Tensor, places: list[float]) -> tuple[Tensor, Tensor]:
        """Cut out the first of the windows in which no class takes more than its share; the last one if none is."""
        height, width = image.shape[-2:]
        size = (min(height, self.image_size), min(width, self.image_size))
        if size == (height, width):
            return image, labels
        for top_draw, left_draw in zip(places[0::2], places[1::2]):
            top, left = int(top_draw * (height - size[0] + 1)), int(left_draw * (width - size[1] + 1))
            window = crop(labels, top, left, size)
            if self.jitter.single_category_limit >= 1 or self._is_mixed(window):
                break
        return crop(image, top, left, size), window

    def _is_mixed(self, labels: Tensor) -> bool:
        counts = torch.bincount(labels.flatten(), minlength=NO_CLASS + 1)[:NO_CLASS]
        return bool((counts > 0).sum() > 1) and float(counts.max() / counts.sum()) < self.jitter.single_category_limit

    def _change_colors(self, image: Tensor, draws: list[float]) -> Tensor:
        """Change brightness; then contrast, saturation and hue, with contrast first or last."""
        jitter = self.jitter
        order_draw, *rest = draws
        is_on = [draw < jitter.color_probability for draw in rest[0::2]]
        # From -1 to 1.
        brightness, contrast, saturation, hue = (2 * draw - 1 for draw in rest[1::2])
        if is_on[0] and jitter.brightness:
            image = _linear(image, 1.0, brightness * jitter.brightness)
        steps = []
        if is_on[1] and jitter.contrast:
            steps.append(lambda x: _linear(x, 1 + contrast * jitter.contrast, 0.0))
        late = []
        if is_on[2] and jitter.saturation:
            late.append(lambda x: functional.adjust_saturation(x, 1 + saturation * jitter.saturation))
        if is_on[3] and jitter.hue:
            late.append(lambda x: functional.adjust_hue(x, hue * jitter.hue))
        for change in steps + late if order_draw < 0.5 else late + steps:
            image = change(image)
        return image


def _linear(image: Tensor, factor: float, shift: float) -> Tensor:
    """Return factor * image + shift, within 0..255."""
    return (image.float() * factor + shift).round().clamp(0, 255).to(torch.uint8)
