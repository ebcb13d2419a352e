"""Draw the built-in segmentation world `scenery`: the objects of `shapes` before backgrounds of several stuff-like regions.

A background is divided along ragged borders; every region has one of four textures, which is its class. Strokes belong to no class
and are ignored. Everything about image i of a split is a function of (world, split, i), so equal parameters give equal bytes.
`scenery_files` writes them.
"""

from __future__ import annotations

import numpy as np

from permafrost.data.worlds.config import SceneryWorld
from permafrost.data.worlds.drawing import colourise, smooth_noise, to_uint8
from permafrost.data.worlds.shapes import (
    CLASSES as SHAPES,
    SPLITS,
    TEXTURES,
    SceneObject,
    draw_crowd,
    draw_stroke,
    place_object,
    random_colours,
    texture_field,
)

CLASSES = SceneryWorld.classes
# Before the numbers that `shapes` draws with: its pictures and these share no random number.
_STREAM = 1


def render_labelled(world: SceneryWorld, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image.

    Args:
        world: the world's parameters.
        split: "train" or "val"; the two share no random number.
        index: 0-based index within the split.

    Returns:
        the image, uint8 (side, side, 3), and its labels, uint8 (side, side): 0 is ignore.
    """
    rng = np.random.default_rng([world.seed, SPLITS.index(split), index, _STREAM])
    side = world.image_side
    canvas, labels = _regions(rng, world)
    for _ in range(rng.integers(0, world.clutter + 1)):
        labels[draw_stroke(rng, canvas)] = 0
    objects: list[SceneObject] = []
    if rng.random() < world.crowd_share:
        objects.append(draw_crowd(rng, world, canvas))
    for _ in range(rng.integers(world.objects[0], world.objects[1] + 1)):
        place_object(rng, world, canvas, objects)
    for region in objects:
        labels[region.mask] = 1 + region.label
    if world.noise > 0:
        canvas += rng.standard_normal((side, side, 3), dtype=np.float32) * np.float32(world.noise)
    return to_uint8(canvas), labels


def _regions(rng: np.random.Generator, world: SceneryWorld) -> tuple[np.ndarray, np.ndarray]:
    """Draw the canvas before any object, float32 (side, side, 3), and its labels."""
    side = world.image_side
    count = int(rng.integers(world.regions[0], world.regions[1] + 1))
    kinds = rng.permutation(len(TEXTURES))[:count]
    # Where one field is above all others lies one region.
    owner = np.argmax([smooth_noise(rng, side, side, side / 3) for _ in range(count)], axis=0)
    canvas = np.empty((side, side, 3), dtype=np.float32)
    for number, kind in enumerate(kinds):
        low, high = random_colours(rng, 2)
        high = low + (high - low) * np.float32(world.background_contrast)
        field = texture_field(rng, TEXTURES[kind], side, side, rng.uniform(0.05, 0.15) * side)
        region = owner == number
        canvas[region] = colourise(field, low, high)[region]
    return canvas, (1 + len(SHAPES) + kinds[owner]).astype(np.uint8)
