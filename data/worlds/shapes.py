"""Draw the built-in detection world `shapes`: scenes of simple objects, for use without any download.

A scene is a textured background (stripes, checkers, value noise, gradients, or two of them mixed) with distracting
strokes, objects of eight classes under random scale, stretch, rotation, colour and texture that hide one another, and
sometimes a crowd: many tiny shapes annotated as one region. Everything about image i of a split is a function of
(world, split, i), so equal parameters give equal bytes.
`shapes_files` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from permafrost.data.worlds.config import TEXTURES, ShapesWorld
from permafrost.data.worlds.drawing import colourise, rings_mask, rotation, smooth_noise, strokes_mask, to_uint8

CLASSES = ShapesWorld.classes
SPLITS = ("train", "val")

_PLACEMENTS = 8
_HUE_OFFSETS = np.array([0, 4, 2], dtype=np.float32)


@dataclass
class SceneObject:
    """One annotated region of a scene.

    Attributes:
        label: 0..7, an index into CLASSES.
        rings: contours in image pixels, each (N, 2) xy, the outer one first; empty for a crowd.
        mask: (H, W) bool, the visible part.
        full_area: area of the whole shape in pixels, hidden and outside parts included.
        is_crowd: whether the region stands for many objects.
        is_whole: whether nothing of it is hidden or outside the image.
    """

    label: int
    rings: list[np.ndarray]
    mask: np.ndarray
    full_area: float
    is_crowd: bool = False
    is_whole: bool = True


@cache
def outline(name: str) -> tuple[np.ndarray, ...]:
    """Return the rings (N, 2) of a class inside the unit disc, y down; a second ring is a hole."""
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if name == "circle":
        return (circle,)
    if name == "ring":
        return circle, circle * 0.55
    if name in ("square", "triangle"):
        corners = 4 if name == "square" else 3
        angles = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
        return (np.stack([np.cos(angles), np.sin(angles)], axis=1),)
    if name == "star":
        angles = np.pi * np.arange(10) / 5 - np.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        return (np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1),)
    if name == "cross":
        half, end = 0.3, 0.95
        quarter = np.array([(half, -end), (half, -half), (end, -half)])
        return (np.concatenate([quarter @ rotation(k * np.pi / 2).T for k in range(4)]),)
    if name == "heart":
        # The classic parametric heart, 16 sin^3 t against a sum of cosines, moved and scaled into the unit disc.
        x = 16 * np.sin(turn) ** 3
        y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
        return (np.stack([x, y - 2.5], axis=1) / 17.5,)
    if name == "crescent":
        # The unit disc less a disc of radius 0.8 whose centre is 0.55 to the right; the two circles meet at angle
        # `tip`.
        shift, inner = 0.55, 0.8
        tip = np.arccos((1 + shift**2 - inner**2) / (2 * shift))
        outer_arc = np.linspace(tip, 2 * np.pi - tip, 36)
        bite_tip = np.arctan2(np.sin(tip), np.cos(tip) - shift)
        bite_arc = np.linspace(2 * np.pi - bite_tip, bite_tip, 24)[1:-1]
        outside = np.stack([np.cos(outer_arc), np.sin(outer_arc)], axis=1)
        bite = np.stack([shift + inner * np.cos(bite_arc), inner * np.sin(bite_arc)], axis=1)
        return (np.concatenate([outside, bite]) + (0.25, 0.0),)
    raise AssertionError(name)


def texture_field(rng: np.random.Generator, kind: str, height: int, width: int, period: float) -> np.ndarray:
    """Draw one of TEXTURES as a field, float32 (height, width) in [0, 1]; `period` is its scale in pixels."""
    if kind == "noise":
        return smooth_noise(rng, height, width, max(2.0, period))
    y, x = np.ogrid[:height, :width]
    angle = rng.uniform(0, 2 * np.pi)
    along = (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))).astype(np.float32)
    if kind == "gradient":
        if rng.random() < 0.5:
            centre_y, centre_x = rng.uniform(0, height), rng.uniform(0, width)
            along = np.hypot(x - np.float32(centre_x), y - np.float32(centre_y)).astype(np.float32)
        low, high = along.min(), along.max()
        return (along - low) / max(float(high - low), 1e-6)
    frequency = np.float32(2 * np.pi / period)
    wave = np.sin(along * frequency + np.float32(rng.uniform(0, 2 * np.pi)))
    if kind == "checkers":
        across = (y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))).astype(np.float32)
        wave = wave * np.sin(across * frequency + np.float32(rng.uniform(0, 2 * np.pi)))
    elif rng.random() < 0.5:
        return 0.5 + 0.5 * wave
    # A steep ramp instead of a sign: edges about a pixel wide.
    return np.clip(0.5 + wave * np.float32(period / 6), 0, 1)


def render_scene(world: ShapesWorld, split: str, index: int) -> tuple[np.ndarray, list[SceneObject]]:
    """Draw one image.

    Args:
        world: the world's parameters.
        split: "train" or "val"; the two share no random number.
        index: 0-based index within the split.

    Returns:
        the image, uint8 (side, side, 3), and its annotated regions from back to front.
    """
    rng = np.random.default_rng([world.seed, SPLITS.index(split), index])
    side = world.image_side
    canvas = _background(rng, world)
    for _ in range(rng.integers(0, world.clutter + 1)):
        draw_stroke(rng, canvas)
    objects: list[SceneObject] = []
    if rng.random() < world.crowd_share:
        objects.append(draw_crowd(rng, world, canvas))
    for _ in range(rng.integers(world.objects[0], world.objects[1] + 1)):
        place_object(rng, world, canvas, objects)
    if world.noise > 0:
        canvas += rng.standard_normal((side, side, 3), dtype=np.float32) * np.float32(world.noise)
    return to_uint8(canvas), objects


def random_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw random RGB colours (count, 3), saturated or dull, bright or dark."""
    draws = rng.random((count, 3, 1), dtype=np.float32)
    hue, saturation, value = draws[:, 0], 0.1 + 0.9 * draws[:, 1], 0.15 + 0.85 * draws[:, 2]
    pure = np.abs((hue * 6 + _HUE_OFFSETS) % 6 - 3) - 1
    return value * (1 - saturation * (1 - np.minimum(np.maximum(pure, 0), 1)))


def _background(rng: np.random.Generator, world: ShapesWorld) -> np.ndarray:
    """Draw the canvas before any object, float32 (side, side, 3): one texture, or two of them with a ragged border."""
    side = world.image_side

    def layer() -> np.ndarray:
        low, high = random_colours(rng, 2)
        high = low + (high - low) * np.float32(world.background_contrast)
        kind = TEXTURES[rng.integers(len(TEXTURES))]
        return colourise(texture_field(rng, kind, side, side, rng.uniform(0.05, 0.3) * side), low, high)

    canvas = layer()
    if rng.random() < 0.25:
        border = np.clip((smooth_noise(rng, side, side, side / 3) - 0.5) * 12 + 0.5, 0, 1)
        canvas += border[..., None] * (layer() - canvas)
    return canvas


def draw_stroke(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Draw one distracting open polyline of 2 to 4 points that belongs to no class; returns its (side, side) bool pixels."""
    side = len(canvas)
    start = rng.uniform(0, side, 2)
    steps = rng.normal(0, 0.12 * side, (rng.integers(1, 4), 2))
    path = np.concatenate([start[None], start + np.cumsum(steps, axis=0)])
    thickness = rng.uniform(0.006, 0.02) * side
    window = _window([path], side, margin=thickness + 1)
    covered = np.zeros((side, side), dtype=bool)
    if window is None:
        return covered
    top, left, bottom, right = window
    mask = strokes_mask([path - (left, top)], bottom - top, right - left, thickness, supersample=2)
    _blend(canvas, window, random_colours(rng, 1)[0], mask)
    covered[top:bottom, left:right] = mask >= 0.5
    return covered


def _window(rings: list[np.ndarray], side: int, margin: float = 1.0) -> tuple[int, int, int, int] | None:
    """Return (top, left, bottom, right) of the canvas pixels that rings can touch, or None when they lie outside."""
    points = np.concatenate(rings)
    left, top = np.maximum(np.floor(points.min(axis=0) - margin), 0).astype(int)
    right, bottom = np.minimum(np.ceil(points.max(axis=0) + margin), side).astype(int)
    return None if left >= right or top >= bottom else (int(top), int(left), int(bottom), int(right))


def _blend(canvas: np.ndarray, window: tuple[int, int, int, int], layer: np.ndarray, mask: np.ndarray) -> None:
    """Lay `layer` ((h, w, 3) or one colour) over a window of the canvas, in place, by coverage `mask` (h, w)."""
    top, left, bottom, right = window
    patch = canvas[top:bottom, left:right]
    patch += mask[..., None] * (layer - patch)


def _shape_rings(rng: np.random.Generator, world: ShapesWorld, label: int, size: float, centre: np.ndarray) -> list:
    """Return a class outline under random stretch and rotation, `size` pixels across, at `centre` (x, y)."""
    stretch = np.exp(rng.uniform(-1, 1) * np.log(world.stretch) / 2)
    turn = rotation(rng.uniform(-np.pi, np.pi) * world.rotation)
    return [(ring * (stretch, 1 / stretch)) @ turn.T * (size / 2) + centre for ring in outline(CLASSES[label])]


def _full_area(rings: list[np.ndarray]) -> float:
    """Return the area within the first ring less the holes, by the shoelace formula."""

    def area(ring: np.ndarray) -> float:
        after = np.roll(ring, -1, axis=0)
        return abs(float((ring[:, 0] * after[:, 1] - ring[:, 1] * after[:, 0]).sum())) / 2

    return area(rings[0]) - sum(area(ring) for ring in rings[1:])


def _fill(rng: np.random.Generator, world: ShapesWorld, under: np.ndarray, height: int, width: int, size: float):
    """Draw a colour, or a texture of two, that keeps at least the world's contrast to the mean colour `under` (3,)."""
    candidates = random_colours(rng, 12)
    distances = np.abs(candidates - under).max(axis=1)
    # The first that is far enough, or the farthest of all.
    colour = candidates[int(np.argmax(np.minimum(distances, world.contrast)))]
    if rng.random() >= world.textured_share:
        return colour
    # The second colour moves away from the ground, so that a texture never dissolves the outline.
    second = np.clip(colour + (colour - under) * np.float32(rng.uniform(0.2, 0.8)), 0, 1)
    if np.abs(second - colour).max() < 0.15:
        second = colour * np.float32(0.6)
    kind = TEXTURES[rng.integers(len(TEXTURES))]
    return colourise(texture_field(rng, kind, height, width, size * rng.uniform(0.15, 0.5)), colour, second)


def place_object(rng: np.random.Generator, world: ShapesWorld, canvas: np.ndarray, objects: list[SceneObject]) -> None:
    """Draw one object where every region keeps its visible share; give up after a few tries."""
    side = world.image_side
    label = int(rng.integers(len(CLASSES)))
    low, high = np.log(world.object_size)
    for _ in range(_PLACEMENTS):
        size = float(np.exp(rng.uniform(low, high))) * side
        rings = _shape_rings(rng, world, label, size, rng.uniform(0.05, 0.95, 2) * side)
        window = _window(rings, side)
        if window is None:
            continue
        top, left, bottom, right = window
        coverage = rings_mask([ring - (left, top) for ring in rings], bottom - top, right - left)
        mask = np.zeros((side, side), dtype=bool)
        mask[top:bottom, left:right] = coverage >= 0.5
        full_area = _full_area(rings)
        if mask.sum() < max(4.0, world.min_visible * full_area):
            continue
        remains = [(region.mask & ~mask).sum() for region in objects]
        if any(left_over < world.min_visible * region.full_area for left_over, region in zip(remains, objects)):
            continue
        for region, left_over in zip(objects, remains):
            if left_over < region.mask.sum():
                region.mask = region.mask & ~mask
                region.is_whole = False
        under = canvas[top:bottom, left:right].mean(axis=(0, 1))
        _blend(canvas, window, _fill(rng, world, under, bottom - top, right - left, size), coverage)
        points = np.concatenate(rings)
        inside = bool((points >= 0).all() and (points <= side).all())
        objects.append(SceneObject(label, rings, mask, full_area, is_whole=inside))
        return


def draw_crowd(rng: np.random.Generator, world: ShapesWorld, canvas: np.ndarray) -> SceneObject:
    """Draw a tight cluster of tiny shapes of one class; the region is the union of what they cover."""
    side = world.image_side
    label = int(rng.integers(len(CLASSES)))
    radius = rng.uniform(0.1, 0.18) * side
    centre = rng.uniform(0.2, 0.8, 2) * side
    window = _window([centre + radius * outline("square")[0]], side)
    assert window is not None  # the centre is inside
    under = canvas[window[0] : window[2], window[1] : window[3]].mean(axis=(0, 1))
    union = np.zeros((side, side), dtype=bool)
    for _ in range(rng.integers(20, 36)):
        size = max(4.0, rng.uniform(0.3, 0.5) * radius)
        where = centre + rotation(rng.uniform(0, 2 * np.pi)) @ (radius * np.sqrt(rng.random()), 0.0)
        rings = _shape_rings(rng, world, label, size, where)
        window = _window(rings, side)
        if window is None:
            continue
        top, left, bottom, right = window
        coverage = rings_mask([ring - (left, top) for ring in rings], bottom - top, right - left)
        _blend(canvas, window, _fill(rng, world, under, bottom - top, right - left, size), coverage)
        union[top:bottom, left:right] |= coverage >= 0.5
    return SceneObject(label, [], union, float(union.sum()), is_crowd=True, is_whole=False)
