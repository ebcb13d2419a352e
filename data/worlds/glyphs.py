"""Draw the `glyphs` world: pictures of one outline among clutter, for pretraining a backbone by classification.

The class is the outline and nothing else. Colour, fill (flat, textured, or a stroke along the contour), contrast,
position, size (25 to 90 % of the image), rotation, reflection, shear and perspective, occluders, distractors,
background texture, blur, noise and JPEG damage are drawn anew for every picture, so a network has to tell figure from
ground and read the contour: what a frozen detector backbone needs later. How far each of these ranges is the picture's
difficulty, uniform in [0, 1]: a curriculum takes the easy ones first. Nothing is shared with the detection world:
other outlines (`outlines`), other textures (Voronoi cells, band-passed noise, brush strokes, dot lattices,
cross-hatching, wood rings, shards, scales) and another seed space.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from permafrost._files import replacing
from permafrost.data.cache import cache_folder
from permafrost.data.errors import DataError
from permafrost.data.pictures.read import open_image
from permafrost.data.worlds import drawing, outlines

# First word of every seed of this world: no other world uses it.
_SEED_SPACE = 0x617C5
_SPLIT_SEEDS = {"train": 0, "val": 1}
_CHUNK = 512


@dataclass(frozen=True)
class GlyphSplit:
    """A rendered split.

    Attributes:
        images: uint8 (N, S, S, 4): RGB and, last, the visible part of the figure (255 inside the outline); a read-only
            memory map.
        labels: int64 (N,).
        difficulties: float64 (N,) in [0, 1].
        class_names: names in label order.
    """

    images: np.ndarray
    labels: np.ndarray
    difficulties: np.ndarray
    class_names: tuple[str, ...]


def class_names() -> tuple[str, ...]:
    """Return the names of the classes, in label order."""
    return tuple(outlines.outlines())


def load_split(
    split: str,
    num_images: int,
    image_size: int = 128,
    seed: int = 0,
    cache_dir: Path | None = None,
    num_workers: int = 2,
) -> GlyphSplit:
    """Read a split from the cache, rendering it first where it is not there.

    Args:
        split: "train" or "val": disjoint seeds.
        num_images: pictures in the split; classes take turns, so they are equally frequent.
        image_size: side in pixels.
        seed: another seed is another sample of the same world.
        cache_dir: folder of the caches; None is $PERMAFROST_CACHE, else ~/.cache/permafrost.
        num_workers: rendering processes.

    Raises:
        DataError: an unknown split, no picture asked for, or not enough disk space.
    """
    if split not in _SPLIT_SEEDS:
        raise DataError(f"unknown split {split!r} of the glyphs world: expected one of {sorted(_SPLIT_SEEDS)}")
    if num_images < 1:
        raise DataError(f"{num_images} images asked of the glyphs world: expected at least 1")
    root = Path(cache_dir) if cache_dir is not None else cache_folder()
    folder = root / "glyphs" / f"{split}_{num_images}_{image_size}_seed{seed}_{_source_hash()}"
    if not (folder / "done.json").exists():
        _render_split(folder, split, num_images, image_size, seed, num_workers)
    images = np.load(folder / "images.npy", mmap_mode="r")
    difficulties = np.array([_generator(split, index, seed).random() for index in range(num_images)])
    return GlyphSplit(images, np.arange(num_images) % len(class_names()), difficulties, class_names())


def render(split: str, index: int, image_size: int = 128, seed: int = 0) -> tuple[np.ndarray, int]:
    """Draw one picture: a pure function of its arguments.

    Args:
        split: "train" or "val".
        index: position in the split.
        image_size: side in pixels.
        seed: seed of the whole sample.

    Returns:
        the picture, uint8 (image_size, image_size, 4), RGB and the visible part of the figure, and its label.
    """
    rng = _generator(split, index, seed)
    shapes = list(outlines.outlines().values())
    label = index % len(shapes)
    difficulty = rng.random()
    ground, ground_colour = _texture(rng, image_size, _colour(rng), spread=rng.uniform(0.03, 0.1 + 0.5 * difficulty))
    image = ground
    for _ in range(rng.poisson(3 * difficulty**1.5)):
        image = _distractor(rng, image, shapes)
    rings = _placed(rng, shapes[label], image_size, difficulty)
    image = _figure(rng, image, rings, ground_colour, difficulty)
    visible = drawing.rings_mask(rings, image_size, image_size)
    if rng.random() < 0.5 * difficulty:
        image, cover = _occluded(rng, image, rings)
        visible = visible * (1 - cover)
    pixels = _degraded(rng, image, difficulty)
    return np.concatenate([pixels, drawing.to_uint8(visible)[..., None]], axis=2), label


def _generator(split: str, index: int, seed: int) -> np.random.Generator:
    """Return the source of everything random in a picture; its first draw is the difficulty."""
    return np.random.default_rng([_SEED_SPACE, _SPLIT_SEEDS[split], seed, index])


def _placed(rng: np.random.Generator, rings: tuple[np.ndarray, ...], size: int, difficulty: float) -> list[np.ndarray]:
    """Place a unit outline in pixels: reflection, stretch, shear, rotation, perspective, size, position."""
    reflection = np.diag([-1.0 if rng.random() < min(0.5, difficulty) else 1.0, 1.0])
    stretch = np.exp(difficulty * rng.uniform(-0.2, 0.2))
    affine = np.array([[stretch, difficulty * rng.uniform(-0.25, 0.25)], [0, 1 / stretch]])
    turn = np.pi * min(1.0, 0.06 + 2 * difficulty**2)
    matrix = drawing.rotation(rng.uniform(-turn, turn)) @ affine @ reflection
    vanishing = difficulty * rng.uniform(-0.22, 0.22, 2)
    warped = []
    for ring in rings:
        points = ring @ matrix.T
        warped.append(points / (1 + points @ vanishing)[:, None])
    every = np.concatenate(warped)
    low, high = every.min(0), every.max(0)
    side = size * np.exp(rng.uniform(np.log(max(0.25, 0.6 - 0.6 * difficulty)), np.log(0.9)))
    scale = side / (high - low).max()
    # A hard picture may lose up to an eighth of the figure's width and height.
    half = (high - low) / 2 * scale * (1 - 0.25 * difficulty)
    centre = rng.uniform(half, np.maximum(size - half, half))
    return [(ring - (low + high) / 2) * scale + centre for ring in warped]


def _figure(
    rng: np.random.Generator, image: np.ndarray, rings: list[np.ndarray], ground_colour: np.ndarray, difficulty: float
) -> np.ndarray:
    """Draw the figure: flat, textured, or stroked, with a contrast that falls with the difficulty."""
    size = len(image)
    contrast = rng.uniform(0.6 - 0.38 * difficulty, 0.95 - 0.4 * difficulty)
    colour = _colour_away_from(rng, ground_colour, contrast)
    kind = rng.random()
    extent = np.ptp(np.concatenate(rings), axis=0).max()
    if kind < 0.2 * difficulty:
        thickness = max(1.5, extent * rng.uniform(0.025, 0.06))
        mask = drawing.strokes_mask(rings, size, size, thickness, closed=True)
        return drawing.composite(image, colour, mask)
    mask = drawing.rings_mask(rings, size, size)
    if kind < 1 - 0.6 * difficulty:
        layer = colour
    else:
        layer, _ = _texture(rng, size, colour, spread=rng.uniform(0.05, 0.1 + 0.3 * difficulty))
    if rng.random() < 0.25:
        # A soft shadow beside the figure: an edge that is not the contour.
        shift = tuple(int(s) for s in rng.integers(-4, 5, 2))
        shadow = drawing.blur(np.repeat(np.roll(mask, shift, axis=(0, 1))[..., None], 3, axis=2), rng.uniform(1, 3))
        image = drawing.composite(image, np.zeros(3), shadow[..., 0], rng.uniform(0.2, 0.5))
    image = drawing.composite(image, layer, mask, rng.uniform(0.85, 1))
    if rng.random() < 0.25:
        edge = drawing.strokes_mask(rings, size, size, rng.uniform(1, 2.5), closed=True)
        image = drawing.composite(image, _colour(rng), edge, rng.uniform(0.5, 1))
    return image


def _distractor(rng: np.random.Generator, image: np.ndarray, shapes: list[tuple[np.ndarray, ...]]) -> np.ndarray:
    """Add a stroke, a blob, or a piece of some contour: things with edges that are no class."""
    size = len(image)
    centre, extent, colour = rng.uniform(0, size, 2), size * rng.uniform(0.06, 0.3), _colour(rng)
    kind = rng.random()
    if kind < 0.4:
        ring = drawing.fourier_ring(rng, int(rng.integers(3, 8)), rng.uniform(0.15, 0.35), num_points=48)
        mask = drawing.rings_mask([ring * extent * 0.7 + centre], size, size, supersample=2)
    elif kind < 0.7:
        turns = np.cumsum(rng.normal(0, 0.5, 10)) + rng.uniform(0, 2 * np.pi)
        path = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], axis=1), axis=0) * extent / 5 + centre
        mask = drawing.strokes_mask([path], size, size, rng.uniform(1.5, 7), supersample=2)
    else:
        ring = shapes[rng.integers(len(shapes))][0]
        start, length = int(rng.integers(len(ring))), max(3, int(len(ring) * rng.uniform(0.15, 0.3)))
        piece = (
            np.take(ring, range(start, start + length), axis=0, mode="wrap") @ drawing.rotation(rng.uniform(0, 6.3)).T
        )
        mask = drawing.strokes_mask([piece * extent + centre], size, size, rng.uniform(1.5, 5), supersample=2)
    return drawing.composite(image, colour, mask, rng.uniform(0.5, 1))


def _occluded(rng: np.random.Generator, image: np.ndarray, rings: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Cover a minor part of the figure, at its rim, with a stroke or a blob; also returns the cover (S, S)."""
    size = len(image)
    outer = rings[0]
    extent = np.ptp(outer, axis=0).max()
    at = outer[rng.integers(len(outer))]
    if rng.random() < 0.5:
        direction = drawing.rotation(rng.uniform(0, np.pi)) @ np.array([1.0, 0.0])
        path = np.stack([at - direction * size, at + direction * size])
        mask = drawing.strokes_mask([path], size, size, max(1.5, extent * rng.uniform(0.04, 0.1)), supersample=2)
    else:
        ring = drawing.fourier_ring(rng, 5, 0.25, num_points=48) * extent * rng.uniform(0.1, 0.24)
        mask = drawing.rings_mask([ring + at], size, size, supersample=2)
    return drawing.composite(image, _colour(rng), mask), mask


def _degraded(rng: np.random.Generator, image: np.ndarray, difficulty: float) -> np.ndarray:
    """Add shading, blur, noise and JPEG damage, each at random; returns uint8."""
    size = len(image)
    if rng.random() < 0.3:
        angle = rng.uniform(0, 2 * np.pi)
        ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        shade = np.cos(angle) * ramp[:, None] + np.sin(angle) * ramp[None]
        image = image * (1 + rng.uniform(0.1, 0.6) * shade)[..., None].astype(np.float32)
    if rng.random() < 0.3:
        image = drawing.blur(image, rng.uniform(0.3, 0.5 + difficulty))
    if rng.random() < 0.6:
        image = image + np.float32(rng.uniform(0, 0.02 + 0.06 * difficulty)) * rng.standard_normal(
            image.shape, dtype=np.float32
        )
    pixels = drawing.to_uint8(image)
    if rng.random() < 0.25:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(35, 90)))
        pixels = np.asarray(open_image(buffer))
    return pixels


def _colour(rng: np.random.Generator) -> np.ndarray:
    """Draw a colour, RGB in [0, 1], greys and pale ones included."""
    colour = rng.random(3)
    grey = colour.mean()
    return (grey + (colour - grey) * rng.uniform(0.2, 1.3)).clip(0.02, 0.98).astype(np.float32)


def _colour_away_from(rng: np.random.Generator, other: np.ndarray, distance: float) -> np.ndarray:
    """Draw a colour about `distance` from another in RGB, along a random direction that stays inside the cube."""
    best, best_gap = other, -1.0
    for _ in range(8):
        direction = rng.normal(size=3)
        candidate = np.clip(other + distance * direction / np.linalg.norm(direction), 0, 1)
        gap = float(np.linalg.norm(candidate - other))
        if gap > best_gap:
            best, best_gap = candidate, gap
        if gap > 0.95 * distance:
            break
    return best.astype(np.float32)


def _texture(rng: np.random.Generator, size: int, colour: np.ndarray, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw a textured picture around a colour; return it and its mean colour (3,)."""
    low, high = _colour_away_from(rng, colour, spread), _colour_away_from(rng, colour, spread)
    field = _TEXTURES[rng.integers(len(_TEXTURES))](rng, size)
    image = drawing.colourise(field, low, high)
    return image, image.mean((0, 1))


def _grid(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixel coordinates u, v (size, size), rotated by a random angle about a random point."""
    turn = drawing.rotation(rng.uniform(0, 2 * np.pi)).astype(np.float32)
    x = np.arange(size, dtype=np.float32)[None] - np.float32(rng.uniform(0, size))
    y = np.arange(size, dtype=np.float32)[:, None] - np.float32(rng.uniform(0, size))
    return turn[0, 0] * x + turn[0, 1] * y, turn[1, 0] * x + turn[1, 1] * y


def _voronoi(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw the cells of random sites, each of one value."""
    sites = rng.uniform(-0.1 * size, 1.1 * size, (int(rng.integers(6, 22)), 2)).astype(np.float32)
    axis = np.arange(size, dtype=np.float32)
    squared = ((axis[:, None] - sites[:, 1]) ** 2)[:, None] + ((axis[:, None] - sites[:, 0]) ** 2)[None]
    return rng.random(len(sites), dtype=np.float32)[squared.argmin(2)]


def _band_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    low = np.exp(rng.uniform(np.log(0.02), np.log(0.2)))
    return drawing.band_noise(rng, size, size, low, low * rng.uniform(1.3, 2))


def _brush(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw broad, roughly parallel strokes over each other."""
    field = np.full((size, size), 0.5, dtype=np.float32)
    lean = rng.uniform(0, np.pi)
    for _ in range(int(rng.integers(5, 11))):
        angle = lean + rng.normal(0, 0.3)
        step = np.array([np.cos(angle), np.sin(angle)]) * size * rng.uniform(0.2, 0.7)
        middle, bend = rng.uniform(0, size, 2), rng.normal(0, 0.08 * size, 2)
        path = np.stack([middle - step, middle - step / 2 + bend, middle + step / 2 + bend, middle + step])
        mask = drawing.strokes_mask([path], size, size, size * rng.uniform(0.03, 0.12), supersample=1)
        field += mask * np.float32(rng.uniform(0.6, 1)) * (np.float32(rng.random()) - field)
    return field


def _dots(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a lattice of dots of one size, square or staggered."""
    u, v = _grid(rng, size)
    pitch = rng.uniform(6, 22)
    row = np.floor(v / pitch)
    du = (u / pitch + (0.5 * (row % 2) if rng.random() < 0.5 else 0)) % 1 - 0.5
    dv = (v / pitch) % 1 - 0.5
    distance = np.sqrt(du**2 + dv**2) * pitch
    return np.clip(rng.uniform(0.15, 0.4) * pitch - distance + 0.5, 0, 1).astype(np.float32)


def _hatching(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw two families of thin lines that cross at an oblique angle."""
    field = np.zeros((size, size), dtype=np.float32)
    for _ in range(2):
        u, _ = _grid(rng, size)
        pitch = rng.uniform(7, 20)
        line = np.abs(u / pitch % 1 - 0.5) * pitch
        field = np.maximum(field, np.clip(rng.uniform(0.6, 1.6) - line + 0.5, 0, 1))
    return field.astype(np.float32)


def _wood(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw warped rings around a far centre, sharp on one side as in grown wood."""
    u, v = _grid(rng, size)
    warp = drawing.band_noise(rng, size, size, 0.005, 0.03)
    distance = np.hypot(u + size * np.float32(rng.uniform(0.3, 1)), v * np.float32(rng.uniform(0.3, 1)))
    return ((distance / rng.uniform(8, 24) + warp * rng.uniform(1, 3)) % 1).astype(np.float32)


def _shards(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw half-planes on top of each other: long straight edges at all angles."""
    field = np.zeros((size, size), dtype=np.float32)
    for _ in range(int(rng.integers(4, 10))):
        u, _ = _grid(rng, size)
        field += np.clip(u + 0.5, 0, 1) * np.float32(rng.normal())
    low, high = field.min(), field.max()
    return (field - low) / max(high - low, 1e-6)


def _scales(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw overlapping rows of scales, each shaded from its root to its rim."""
    u, v = _grid(rng, size)
    pitch = rng.uniform(10, 26)
    row = np.floor(v / pitch * 2)
    across = (u / pitch + 0.5 * (row % 2)) % 1 - 0.5
    along = (v / pitch * 2) % 1
    return ((along + np.sqrt(np.maximum(0.25 - across**2, 0)) * 1.4) % 1).astype(np.float32)


_TEXTURES: tuple[Callable[[np.random.Generator, int], np.ndarray], ...] = (
    _voronoi,
    _band_noise,
    _brush,
    _dots,
    _hatching,
    _wood,
    _shards,
    _scales,
)


def _source_hash() -> str:
    """Return a hash of the code that draws: an edited world never reads a stale cache."""
    digest = hashlib.sha256()
    for module in (drawing, outlines):
        digest.update(Path(inspect.getfile(module)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:8]


def _render_split(folder: Path, split: str, num_images: int, image_size: int, seed: int, num_workers: int) -> None:
    """Render a split into a folder beside the final one, then rename: a cache is complete or absent."""
    needed = num_images * image_size * image_size * 4
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < needed * 1.05:
        raise DataError(
            f"{folder.parent}: {needed / 1e9:.1f} GB needed for {num_images} images, more than is free; set PERMAFROST_CACHE"
        )
    try:
        with replacing(folder, folder=True) as partial:
            path, shape = partial / "images.npy", (num_images, image_size, image_size, 4)
            np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
            starts = range(0, num_images, _CHUNK)
            jobs = [(path, split, start, min(start + _CHUNK, num_images), image_size, seed) for start in starts]
            if num_workers > 1 and len(jobs) > 1:
                # Spawned, not forked: the caller may hold threads (torch, TensorBoard).
                with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
                    list(pool.map(_render_chunk, jobs))
            else:
                for job in jobs:
                    _render_chunk(job)
            (partial / "done.json").write_text(json.dumps({"split": split, "num_images": num_images, "seed": seed}))
    except OSError:
        # Another process may have finished the same cache first.
        if not (folder / "done.json").exists():
            raise


def _render_chunk(job: tuple[Path, str, int, int, int, int]) -> None:
    """Render pictures [start, stop) into the memory map."""
    path, split, start, stop, image_size, seed = job
    images = np.lib.format.open_memmap(path, mode="r+")
    for index in range(start, stop):
        images[index] = render(split, index, image_size, seed)[0]
    images.flush()
