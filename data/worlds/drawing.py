"""Drawing primitives that the procedural worlds share: anti-aliased masks, noise fields, palettes, pixel degradations.

Conventions: a *ring* is a closed contour, float array (N, 2) of xy in pixels, the last point joined to the first; pixel
(0, 0) covers the square [0, 1) x [0, 1). A *mask* is float32 (H, W) coverage in [0, 1]; a *field* is float32 (H, W) in
[0, 1]; an *image* is float32 (H, W, 3) in [0, 1] until `to_uint8`. Every random function takes a numpy Generator and
draws from nothing else, so an image is a pure function of its generator's seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def rings_mask(rings: Sequence[np.ndarray], height: int, width: int, supersample: int = 3) -> np.ndarray:
    """Rasterise nested rings by the even-odd rule, anti-aliased by box supersampling.

    Args:
        rings: contours (N, 2), xy pixels, outermost first; a ring at even nesting depth adds, at odd depth cuts a hole.
        height: rows of the mask.
        width: columns of the mask.
        supersample: subpixels per pixel and axis.

    Returns:
        coverage, float32 (height, width) in [0, 1].
    """
    canvas = Image.new("L", (width * supersample, height * supersample), 0)
    draw = ImageDraw.Draw(canvas)
    for ring, depth in zip(rings, nesting_depths(rings), strict=True):
        draw.polygon(_pil_points(ring, supersample), fill=255 if depth % 2 == 0 else 0)
    return _reduced(canvas, supersample)


def strokes_mask(
    paths: Sequence[np.ndarray], height: int, width: int, thickness: float, closed: bool = False, supersample: int = 3
) -> np.ndarray:
    """Rasterise polylines of one thickness with round ends and joints.

    Args:
        paths: polylines (N, 2), xy pixels, N >= 2.
        height: rows of the mask.
        width: columns of the mask.
        thickness: stroke width in pixels.
        closed: whether the last point of each path is joined to its first.
        supersample: subpixels per pixel and axis.

    Returns:
        coverage, float32 (height, width) in [0, 1].
    """
    canvas = Image.new("L", (width * supersample, height * supersample), 0)
    draw = ImageDraw.Draw(canvas)
    pen = max(1, round(thickness * supersample))
    for path in paths:
        points = _pil_points(np.concatenate([path, path[:1]]) if closed else path, supersample)
        draw.line(points, fill=255, width=pen, joint="curve")
        if not closed and pen > 2:
            for x, y in (points[0], points[-1]):
                draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
    return _reduced(canvas, supersample)


def nesting_depths(rings: Sequence[np.ndarray]) -> list[int]:
    """Return, for each ring, how many of the rings before it its first point lies in."""
    return [sum(contains_point(outer, ring[0]) for outer in rings[:i]) for i, ring in enumerate(rings)]


def contains_point(ring: np.ndarray, point: np.ndarray) -> bool:
    """Return whether a point (x, y) lies inside a ring (N, 2), by ray crossing parity."""
    following = np.roll(ring, -1, axis=0)
    straddles = (ring[:, 1] > point[1]) != (following[:, 1] > point[1])
    edge, after = ring[straddles], following[straddles]
    crossing_x = edge[:, 0] + (point[1] - edge[:, 1]) * (after[:, 0] - edge[:, 0]) / (after[:, 1] - edge[:, 1])
    return bool(np.count_nonzero(crossing_x > point[0]) % 2)


def rotation(angle: float) -> np.ndarray:
    """Return the rotation matrix (2, 2), angle in radians; points are rows: `points @ rotation(angle).T`."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine], [sine, cosine]])


def fourier_ring(
    rng: np.random.Generator, num_harmonics: int, roughness: float, num_points: int = 96, decay: float = 1.0
) -> np.ndarray:
    """Return a random smooth closed contour around the origin in polar form, always simple (star-shaped), radius at most 1.

    Args:
        rng: source of the harmonics.
        num_harmonics: highest angular frequency; harmonics start at 2 (the first one only shifts the contour).
        roughness: standard deviation of the log radius that the harmonics give together.
        num_points: points of the ring.
        decay: exponent of the amplitudes' fall with frequency.

    Returns:
        ring (num_points, 2).
    """
    angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    orders = np.arange(2, num_harmonics + 1)
    amplitudes = rng.normal(size=len(orders)) * orders.astype(float) ** -decay
    amplitudes *= roughness / max(np.sqrt((amplitudes**2).sum() / 2), 1e-9)
    phases = rng.uniform(0, 2 * np.pi, len(orders))
    radius = np.exp((amplitudes * np.cos(np.outer(angles, orders) + phases)).sum(1))
    radius /= radius.max()
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def band_noise(rng: np.random.Generator, height: int, width: int, low: float, high: float) -> np.ndarray:
    """Return Gaussian noise kept between two spatial frequencies, scaled to about [0, 1]; it tiles at its borders.

    Args:
        rng: source of the noise.
        height: rows.
        width: columns.
        low: lowest frequency kept, cycles per pixel.
        high: highest frequency kept, cycles per pixel; 0.5 is the finest.

    Returns:
        field (height, width), mean near 0.5, two standard deviations on either side reach 0 and 1.
    """
    spectrum = np.fft.rfft2(rng.standard_normal((height, width), dtype=np.float32))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    centre, spread = (low + high) / 2, max((high - low) / 2, 1e-3)
    # A soft edge: a hard one rings.
    noise = np.fft.irfft2(spectrum * np.exp(-(((frequency - centre) / spread) ** 4)), s=(height, width))
    noise = noise - noise.mean()
    return np.clip(0.5 + noise / (4 * max(noise.std(), 1e-9)), 0, 1).astype(np.float32)


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Return value noise: random values on a coarse grid, bicubically enlarged.

    Args:
        rng: source of the grid values.
        height: rows.
        width: columns.
        cell: grid spacing in pixels.

    Returns:
        field (height, width).
    """
    grid = rng.random((int(np.ceil(height / cell)) + 2, int(np.ceil(width / cell)) + 2), dtype=np.float32)
    full = (round(grid.shape[1] * cell), round(grid.shape[0] * cell))
    enlarged = np.asarray(Image.fromarray(grid).resize(full, Image.Resampling.BICUBIC))
    top, left = round(cell / 2), round(cell / 2)
    return np.clip(enlarged[top : top + height, left : left + width], 0, 1).astype(np.float32)


def colourise(field: np.ndarray, low_colour: np.ndarray, high_colour: np.ndarray) -> np.ndarray:
    """Map a field (H, W) linearly onto the way from one RGB colour (3,) to another; returns an image (H, W, 3)."""
    low = np.asarray(low_colour, dtype=np.float32)
    return low + field[..., None] * (np.asarray(high_colour, dtype=np.float32) - low)


def composite(image: np.ndarray, layer: np.ndarray, mask: np.ndarray, opacity: float = 1.0) -> np.ndarray:
    """Lay a layer over an image.

    Args:
        image: (H, W, 3).
        layer: (H, W, 3), or one colour (3,).
        mask: coverage (H, W).
        opacity: multiplies the coverage.

    Returns:
        a new image (H, W, 3), float32.
    """
    alpha = (mask * np.float32(opacity))[..., None]
    return image + alpha * (np.asarray(layer, dtype=np.float32) - image)


def blur(image: np.ndarray, radius: float) -> np.ndarray:
    """Blur an image (H, W, 3) with a Gaussian of `radius` pixels standard deviation."""
    blurred = Image.fromarray(to_uint8(image)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(blurred, dtype=np.float32) / 255


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Round an image in [0, 1] to uint8, clipping what lies outside."""
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _pil_points(points: np.ndarray, supersample: int) -> list[tuple[float, float]]:
    """Return a ring or path in subpixels; half a subpixel back because PIL puts integer coordinates on pixel centres."""
    return [(x, y) for x, y in (np.asarray(points, dtype=float) * supersample - 0.5).tolist()]


def _reduced(canvas: Image.Image, supersample: int) -> np.ndarray:
    """Average supersample x supersample blocks of an 8-bit canvas; float32 in [0, 1]."""
    return np.asarray(canvas.reduce(supersample), dtype=np.float32) / 255
