"""Draw the built-in video world `motion`: short clips whose classes need time, or do not.

Every clip is one object over a textured background with resting clutter. Classes:

    order-only pairs   moves_right / moves_left, grows / shrinks, speeds_up / slows_down: the second is drawn as the first and
                       played backwards, so both have exactly the same frames and only their order tells them apart
    passes_before / passes_behind   a disc crosses a bar, in front of it or hidden by it: seen in some frames only
    turns_star / turns_cross        what the object is gives the class away in any frame

Everything about clip i of a split is a function of (world, split, i).
"""

from __future__ import annotations

import numpy as np

from permafrost.data.worlds.config import MotionWorld
from permafrost.data.worlds.drawing import colourise, composite, rings_mask, rotation, to_uint8
from permafrost.data.worlds.shapes import TEXTURES, outline, texture_field

CLASSES = MotionWorld.classes
ORDER_PAIRS = (("moves_right", "moves_left"), ("grows", "shrinks"), ("speeds_up", "slows_down"))
APPEARANCE = ("turns_star", "turns_cross")
SPLITS = ("train", "val")
MOVERS = ("circle", "square", "triangle", "heart", "ring")


def label_of(index: int) -> int:
    """Return the class of clip `index`: classes take turns, so that every split is balanced."""
    return index % len(CLASSES)


def render_clip(world: MotionWorld, split: str, index: int, label: int | None = None) -> np.ndarray:
    """Draw one clip.

    Args:
        world: the world's parameters.
        split: "train" or "val"; the two share no random number.
        index: 0-based index within the split.
        label: its class; None is label_of(index). All else that is drawn does not depend on it within an order-only pair.

    Returns:
        (T, side, side, 3) uint8.
    """
    rng = np.random.default_rng([world.seed, SPLITS.index(split), index])
    name = CLASSES[label_of(index) if label is None else label]
    backwards = name in ("moves_left", "shrinks", "slows_down")
    if backwards:
        name = next(first for first, second in ORDER_PAIRS if second == name)
    side = world.side
    background = _background(rng, world)
    colour, bar_colour = _far_colours(rng, background, world.contrast)
    size = rng.uniform(*world.object_size) * side
    turn = rng.uniform(-np.pi, np.pi)
    shape = MOVERS[rng.integers(len(MOVERS))]
    spin = rng.choice((-1.0, 1.0)) * rng.uniform(0.5, 1.0) * np.pi
    draws = rng.random(4)
    frames = []
    for frame, time in enumerate(np.linspace(0, 1, world.num_frames)):
        canvas = background
        centre, diameter, angle, figure = np.array([0.5, 0.5]) * side, size, turn, shape
        wander = (draws[:2] - 0.5) * 0.3 * side
        if name == "moves_right":
            travel = 0.25 + 0.25 * draws[2]
            centre = centre + (travel * side * (2 * time - 1), 2 * wander[1])
        elif name == "grows":
            centre, diameter = centre + wander, size * (0.5 + 1.2 * time)
        elif name == "speeds_up":
            # From up to down or from down to up: the direction is no hint.
            way = 1.0 if draws[3] < 0.5 else -1.0
            centre = centre + (2 * wander[0], way * 0.4 * side * (2 * time**3 - 1))
        elif name in ("turns_star", "turns_cross"):
            centre, angle, figure = centre + wander, turn + spin * time, name.removeprefix("turns_")
        if name in ("passes_before", "passes_behind"):
            way = 1.0 if draws[3] < 0.5 else -1.0
            centre = centre + (way * 0.38 * side * (2 * time - 1), 2 * wander[1])
            # Smaller than what moves elsewhere, so that disc and bar are apart in some frames.
            crossing = 0.75 * size
            half = (0.5 * crossing + 1, side)
            corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * half + (side / 2, side / 2)
            layers = [([corners], bar_colour), (_placed("circle", crossing, turn, centre), colour)]
            for rings, layer in layers if name == "passes_before" else layers[::-1]:
                canvas = composite(canvas, layer, rings_mask(rings, side, side))
        else:
            canvas = composite(canvas, colour, rings_mask(_placed(figure, diameter, angle, centre), side, side))
        if world.noise > 0:
            # Of its own generator, by the frame's place before any reversal.
            noise = np.random.default_rng([world.seed, SPLITS.index(split), index, frame])
            canvas = canvas + noise.standard_normal(canvas.shape, dtype=np.float32) * np.float32(world.noise)
        frames.append(to_uint8(canvas))
    return np.stack(frames[::-1] if backwards else frames)


def _placed(name: str, diameter: float, angle: float, centre: np.ndarray) -> list[np.ndarray]:
    return [ring @ rotation(angle).T * (diameter / 2) + centre for ring in outline(name)]


def _background(rng: np.random.Generator, world: MotionWorld) -> np.ndarray:
    """Draw a faint texture with resting shapes of faint colours, float32 (side, side, 3)."""
    side = world.side
    low = rng.uniform(0.2, 0.8, 3).astype(np.float32)
    high = np.clip(low + rng.uniform(-0.2, 0.2, 3).astype(np.float32), 0, 1)
    kind = TEXTURES[rng.integers(len(TEXTURES))]
    canvas = colourise(texture_field(rng, kind, side, side, rng.uniform(0.1, 0.4) * side), low, high)
    for _ in range(rng.integers(0, world.clutter + 1)):
        name = MOVERS[rng.integers(len(MOVERS))]
        rings = _placed(name, rng.uniform(0.06, 0.12) * side, rng.uniform(-np.pi, np.pi), rng.uniform(0, side, 2))
        colour = np.clip(low + rng.uniform(-0.25, 0.25, 3), 0, 1)
        canvas = composite(canvas, colour, rings_mask(rings, side, side))
    return canvas


def _far_colours(rng: np.random.Generator, background: np.ndarray, contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw two colours that keep the contrast from the background's mean and from one another, or come closest to it."""
    taken = [background.mean(axis=(0, 1))]
    for _ in range(2):
        candidates = rng.random((16, 3)).astype(np.float32)
        distances = np.min([np.abs(candidates - colour).max(axis=1) for colour in taken], axis=0)
        taken.append(candidates[int(np.argmax(np.minimum(distances, contrast)))])
    return taken[1], taken[2]
