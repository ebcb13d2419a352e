"""Geometry of the training and evaluation transforms against a pixel-by-pixel derivation of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from permafrost.data.detection.config import JitterConfig
from permafrost.data.detection.transforms import FitTransform, JitterTransform, Scene, boxes_of_masks
from permafrost.data.errors import DataError
from permafrost.data.pictures.geometry import PAD_COLOR
from permafrost.data.types import SampleKey


def make_scene(height: int, width: int, seed: int = 0, num_objects: int = 5) -> Scene:
    """Disjoint-or-not random rectangles and a gradient image whose value tells the place."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((num_objects, height, width), dtype=np.uint8)
    for mask in masks:
        y, x = rng.integers(0, height - 4), rng.integers(0, width - 4)
        mask[y : y + rng.integers(2, height // 2), x : x + rng.integers(2, width // 2)] = 1
    ramp_y, ramp_x = np.mgrid[:height, :width]
    image = np.stack([ramp_y * 255 // height, ramp_x * 255 // width, np.full((height, width), 90)])
    crowd = torch.tensor([[2.0, 3.0, width / 2, height / 2], [width - 6.0, height - 5.0, width, height]])
    return Scene(torch.from_numpy(image.astype(np.uint8)), torch.from_numpy(masks), crowd)


def derived(scene: Scene, square: int, jitter: JitterConfig, key: SampleKey) -> dict:
    """Derive what large-scale jitter means, in plain numpy and for each output pixel its source pixel."""
    draws = torch.rand(7, generator=key.generator("augment")).double().numpy()
    low, high = jitter.scale_range
    height, width = scene.image.shape[-2:]
    ratio = square * (low + (high - low) * draws[0]) / max(height, width)
    full = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    size = tuple(min(side, square) for side in full)
    top, left = (int(draws[1 + axis] * (full[axis] - size[axis] + 1)) for axis in (0, 1))
    rows = [math.floor((top + i + 0.5) * height / full[0]) for i in range(size[0])]
    columns = [math.floor((left + j + 0.5) * width / full[1]) for j in range(size[1])]
    flipped = draws[3] < jitter.flip
    if flipped:
        columns = columns[::-1]
    masks = scene.masks.numpy()[:, rows][:, :, columns].astype(bool)
    crowds = []
    for x0, y0, x1, y1 in scene.crowd_boxes.double().numpy():
        x0, x1 = (x * full[1] / width - left for x in (x0, x1))
        y0, y1 = (y * full[0] / height - top for y in (y0, y1))
        if flipped:
            x0, x1 = size[1] - x1, size[1] - x0
        box = [max(0, x0), max(0, y0), min(size[1], x1), min(size[0], y1)]
        if box[2] > box[0] and box[3] > box[1]:
            crowds.append(box)
    return {"size": size, "full": full, "masks": masks, "crowds": crowds, "flipped": flipped, "offset": (top, left)}


@pytest.mark.parametrize(("height", "width"), [(48, 64), (90, 41), (64, 64), (33, 100)])
@pytest.mark.parametrize("scale_range", [(0.1, 2.0), (1.3, 3.0), (1.0, 1.0)])
def test_jitter_against_the_derivation(height, width, scale_range) -> None:
    jitter = JitterConfig(scale_range=scale_range, min_box_side=2.0)
    seen_flips, dropped = set(), 0
    for index in range(12):
        scene, key = make_scene(height, width, seed=index), SampleKey(3, 1, index)
        result = JitterTransform(64, jitter)(scene, key.generator("augment"))
        expected = derived(scene, 64, jitter, key)
        seen_flips.add(expected["flipped"])
        assert result.size == expected["size"]
        assert result.image.shape == (3, 64, 64)
        kept = []
        for number, mask in enumerate(expected["masks"]):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if len(rows) and min(rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]) >= 2:
                box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                assert result.boxes[len(kept)].tolist() == box
                found = result.masks[len(kept)].numpy()
                assert np.array_equal(found[: mask.shape[0], : mask.shape[1]], mask)
                assert found.sum() == mask.sum()
                kept.append(number)
        assert result.kept.tolist() == kept
        dropped += len(expected["masks"]) - len(kept)
        assert len(result.boxes) == len(result.masks) == len(kept)
        assert result.ignore_boxes.shape == (len(expected["crowds"]), 4)
        if expected["crowds"]:
            torch.testing.assert_close(result.ignore_boxes, torch.tensor(expected["crowds"]).float(), rtol=0, atol=2e-4)
    assert seen_flips == {True, False}
    assert dropped > 0 or scale_range == (1.0, 1.0)


@pytest.mark.parametrize("scale_range", [(0.3, 0.9), (1.2, 2.5)])
def test_pixels_move_with_the_masks(scale_range) -> None:
    """Red and green of the test image are its row and column: each output pixel tells where it came from."""
    jitter = JitterConfig(scale_range=scale_range)
    for index in range(8):
        scene, key = make_scene(80, 60, seed=index), SampleKey(0, 0, index)
        result = JitterTransform(64, jitter)(scene, key.generator("augment"))
        told = derived(scene, 64, jitter, key)
        (height, width), (top, left) = told["size"], told["offset"]
        rows = (np.arange(height) + top + 0.5) * 80 / told["full"][0] - 0.5
        columns = (np.arange(width) + left + 0.5) * 60 / told["full"][1] - 0.5
        if told["flipped"]:
            columns = columns[::-1]
        inner = result.image[:, 3 : height - 3, 3 : width - 3].float().numpy()
        assert np.abs(inner[0] - (rows * 255 / 80)[3:-3, None]).max() < 4
        assert np.abs(inner[1] - (columns * 255 / 60)[None, 3:-3]).max() < 5
        padding = result.image.clone()
        padding[:, :height, :width] = torch.tensor(PAD_COLOR, dtype=torch.uint8)[:, None, None]
        assert torch.equal(padding, torch.tensor(PAD_COLOR, dtype=torch.uint8)[:, None, None].expand(3, 64, 64))


def test_offsets_and_scales_cover_their_range() -> None:
    jitter, scene = JitterConfig(scale_range=(0.5, 2.0)), make_scene(64, 64)
    sizes, tops = [], set()
    for index in range(200):
        told = derived(scene, 64, jitter, SampleKey(0, 0, index))
        sizes.append(told["full"][0] / 64)
        tops.add(told["offset"][0])
    assert min(sizes) < 0.55
    assert max(sizes) > 1.95
    assert np.mean(sizes) == pytest.approx(1.25, abs=0.1)
    assert min(tops) == 0
    assert max(tops) > 45


@pytest.mark.parametrize("scale_range", [(0.1, 2.0), (1.0, 1.0)])
def test_a_sample_is_a_pure_function_of_its_key(scale_range) -> None:
    """At a scale of 1 a 64-pixel scene passes resize and crop untouched: colour must not be written into the caller's."""
    transform = JitterTransform(64, JitterConfig(scale_range=scale_range, color=0.4))
    scene = make_scene(64, 64)
    pixels, masks = scene.image.clone(), scene.masks.clone()
    state = torch.random.get_rng_state()
    first = transform(scene, SampleKey(1, 2, 3).generator("augment"))
    transform(scene, SampleKey(9, 9, 9).generator("augment"))
    second = transform(scene, SampleKey(1, 2, 3).generator("augment"))
    for name in ("image", "masks", "boxes", "kept", "ignore_boxes"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(scene.image, pixels)
    assert torch.equal(scene.masks, masks)
    others = [transform(scene, key.generator("augment")).image for key in (SampleKey(2, 2, 3), SampleKey(1, 3, 3))]
    assert not any(torch.equal(first.image, other) for other in others)


def test_color_changes_pixels_and_not_geometry() -> None:
    scene, key = make_scene(64, 64), SampleKey(0, 0, 1)
    jitter = JitterConfig(scale_range=(1.0, 1.0), flip=0.0)
    plain = JitterTransform(64, jitter)(scene, key.generator("augment"))
    assert torch.equal(plain.image, scene.image)
    colored = JitterTransform(64, JitterConfig(scale_range=(1.0, 1.0), flip=0.0, color=0.4))(
        scene, key.generator("augment")
    )
    assert not torch.equal(colored.image, plain.image)
    assert torch.equal(colored.boxes, plain.boxes)
    # A stronger setting with the same draws goes further the same way.
    weak = JitterTransform(64, JitterConfig(scale_range=(1.0, 1.0), flip=0.0, color=0.1))(
        scene, key.generator("augment")
    )
    distances = [(image.image.float() - plain.image.float()).abs().mean() for image in (weak, colored)]
    assert 0 < distances[0] < distances[1]


@pytest.mark.parametrize(
    ("height", "width", "size"), [(48, 64, (24, 32)), (64, 16, (32, 8)), (500, 5, (32, 1)), (7, 7, (32, 32))]
)
def test_fit_keeps_the_aspect_ratio(height, width, size) -> None:
    scene = make_scene(max(height, 8), max(width, 8)) if min(height, width) >= 8 else None
    if scene is None:
        image = torch.full((3, height, width), 7, dtype=torch.uint8)
        scene = Scene(image, torch.ones((1, height, width), dtype=torch.uint8), torch.zeros((0, 4)))
    result = FitTransform(32)(scene)
    assert result.size == size
    assert result.image.shape == (3, 32, 32)
    assert result.masks[:, size[0] :].sum() == result.masks[:, :, size[1] :].sum() == 0
    assert (result.boxes[:, 2] <= size[1]).all()
    assert (result.boxes[:, 3] <= size[0]).all()


def test_scenes_without_objects() -> None:
    scene = Scene(
        torch.zeros((3, 20, 30), dtype=torch.uint8), torch.zeros((0, 20, 30), dtype=torch.uint8), torch.zeros(0, 4)
    )
    for result in (
        FitTransform(64)(scene),
        JitterTransform(64, JitterConfig())(scene, SampleKey(0, 0, 0).generator("augment")),
    ):
        assert result.masks.shape == (0, 64, 64)
        assert result.boxes.shape == result.ignore_boxes.shape == (0, 4)
        assert result.boxes.dtype == torch.float32


def test_boxes_of_masks_against_nonzero() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand((50, 9, 13), generator=generator) > torch.rand((50, 1, 1), generator=generator).clamp(min=0.5)
    masks[7] = False
    masks[8] = True
    for dtype in (torch.bool, torch.uint8):
        for mask, box in zip(masks, boxes_of_masks(masks.to(dtype)).tolist()):
            rows, columns = torch.nonzero(mask, as_tuple=True)
            if len(rows):
                expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert box == [float(value) for value in expected]
            else:
                assert box == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "fields", [{"scale_range": (2.0, 1.0)}, {"scale_range": (0.0, 1.0)}, {"flip": 1.5}, {"color": 1.0}]
)
def test_impossible_jitter_is_refused(fields) -> None:
    with pytest.raises(DataError, match=next(iter(fields))):
        JitterConfig(**fields)
