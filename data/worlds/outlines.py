"""Give the 100 outlines of the `glyphs` world: hand-made silhouettes, letters of a bundled font, and fixed random contours.

An outline is a list of rings (N, 2) in the unit disc, y down, largest first; nesting follows the even-odd rule. A class
is an outline up to similarity, reflection included, so no two classes are rotations or mirror images of each other, and
none is a look-alike of what the detection world draws (circle, square, triangle, star, cross, ring, heart, crescent).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from permafrost.data.worlds.drawing import fourier_ring

# Characters of DejaVu Sans Bold. Left out: rotations or mirror images of each other (6/9, M/W, N/Z, b/d/p/q, 2/5),
# twins of silhouettes (J, L, T, U, V) and look-alikes of what the detection world draws (O, Q, C, D, X, t, +, *, %).
CHARACTERS = "ABEFGHKMNPRSY23479ae&?§#$ΩΣπψλЖ"
# Seeds of the random contours; seeds whose contour resembles a cross or a star are skipped.
BLOB_SEEDS = (0, 2, 3, 5, 6, 8, 9, 10, 11, 13, 15, 16, 17, 18, 19)
_FONT_SEGMENTS = 200.0

Points = list[tuple[float, float]]


def _mirrored(right_half: Points) -> list[Points]:
    """Close the right half of a symmetric outline, listed top to bottom, with its mirror image."""
    return [right_half + [(-x, y) for x, y in reversed(right_half)]]


def _arc(cx: float, cy: float, radius: float, start: float, stop: float, num_points: int = 16) -> Points:
    """Return the points of a circular arc; angles in degrees, clockwise on the screen because y is down."""
    angles = np.radians(np.linspace(start, stop, num_points))
    return [(cx + radius * float(np.cos(a)), cy + radius * float(np.sin(a))) for a in angles]


def _polar(radius, num_points: int = 240) -> list[Points]:
    """Return the closed contour of radius(angle), a function of an array of angles in radians."""
    angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    return [list(zip(radius(angles) * np.cos(angles), radius(angles) * np.sin(angles), strict=True))]


def _gear(num_teeth: int, depth: float, hole: float) -> list[Points]:
    """Return a cog wheel with trapezoidal teeth; `depth` and `hole` are parts of the outer radius."""
    rings = _polar(lambda a: 1 - depth * (0.5 - 0.5 * np.clip(2.5 * np.cos(num_teeth * a), -1, 1)), 480)
    return [*rings, _arc(0, 0, hole, 0, 352, 45)]


def _ribbon(centre: np.ndarray, half_width: np.ndarray | float) -> list[Points]:
    """Return the outline of a band around a centre line (N, 2)."""
    tangent = np.gradient(centre, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1) / np.linalg.norm(tangent, axis=1, keepdims=True)
    offset = normal * np.broadcast_to(np.asarray(half_width, dtype=float), len(centre))[:, None]
    return [[*map(tuple, centre + offset), *map(tuple, (centre - offset)[::-1])]]


def _spiral() -> list[Points]:
    angles = np.linspace(0.6, 4.6 * np.pi, 160)
    return _ribbon(np.stack([angles * np.cos(angles), angles * np.sin(angles)], axis=1), 1.5)


def _wave() -> list[Points]:
    x = np.linspace(-1, 1, 90)
    return _ribbon(np.stack([x, 0.28 * np.sin(2.6 * np.pi * x)], axis=1), 0.11)


def _hook() -> list[Points]:
    line = [(0.35, -1.0), (0.35, -0.6), (0.35, -0.2), *_arc(0, 0.3, 0.35, 0, 205, 24)]
    return _ribbon(np.array(line), 0.13)


def _handmade() -> dict[str, list[Points]]:
    """Return silhouettes by name; coordinates are arbitrary units, normalised afterwards."""
    return {
        "arrow": [[(-1, -0.2), (0.2, -0.2), (0.2, -0.6), (1, 0), (0.2, 0.6), (0.2, 0.2), (-1, 0.2)]],
        "double_arrow": [
            [(-1, 0), (-0.5, -0.5), (-0.5, -0.18), (0.5, -0.18), (0.5, -0.5)]
            + [(1, 0), (0.5, 0.5), (0.5, 0.18), (-0.5, 0.18), (-0.5, 0.5)]
        ],
        "turn_arrow": [
            [
                (-0.8, 1),
                (-0.8, -0.5),
                (0.2, -0.5),
                (0.2, -0.95),
                (0.95, -0.25),
                (0.2, 0.45),
                (0.2, 0),
                (-0.3, 0),
                (-0.3, 1),
            ]
        ],
        "lightning": [[(0.1, -1), (-0.55, 0.15), (-0.05, 0.15), (-0.3, 1), (0.55, -0.25), (0.05, -0.25), (0.45, -1)]],
        "gear_7": _gear(7, 0.28, 0.3),
        "spiral": _spiral(),
        "wave": _wave(),
        "hook": _hook(),
        "hourglass": _mirrored([(0.65, -1), (0.65, -0.8), (0.12, -0.05), (0.12, 0.05), (0.65, 0.8), (0.65, 1)]),
        "house": _mirrored([(0, -1), (0.95, -0.15), (0.68, -0.15), (0.68, 0.9), (0.2, 0.9), (0.2, 0.3)]),
        "fish": [
            [(-1, 0), (-0.6, -0.32), (-0.1, -0.45), (0.3, -0.3), (0.6, -0.1), (1, -0.45), (0.88, 0), (1, 0.45)]
            + [(0.6, 0.1), (0.3, 0.3), (-0.1, 0.45), (-0.6, 0.32)]
        ],
        "l_piece": [[(-0.6, -1), (0, -1), (0, 0.4), (0.7, 0.4), (0.7, 1), (-0.6, 1)]],
        "t_piece": _mirrored([(1, -0.65), (1, 0), (0.33, 0), (0.33, 0.75)]),
        "z_piece": [[(-1, -0.65), (0.33, -0.65), (0.33, 0), (1, 0), (1, 0.65), (-0.33, 0.65), (-0.33, 0), (-1, 0)]],
        "u_piece": _mirrored([(0.3, 0.2), (0.3, -0.8), (0.85, -0.8), (0.85, 0.8)]),
        "stairs": [[(-1, 1), (-1, 0.4), (-0.35, 0.4), (-0.35, -0.25), (0.3, -0.25), (0.3, -0.9), (1, -0.9), (1, 1)]],
        "comb": [
            [(-1, -0.6), (1, -0.6), (1, 0.6), (0.72, 0.6), (0.72, -0.1), (0.43, -0.1), (0.43, 0.6), (0.14, 0.6)]
            + [
                (0.14, -0.1),
                (-0.14, -0.1),
                (-0.14, 0.6),
                (-0.43, 0.6),
                (-0.43, -0.1),
                (-0.72, -0.1),
                (-0.72, 0.6),
                (-1, 0.6),
            ]
        ],
        "fork": _mirrored(
            [(0.12, -1), (0.12, -0.35), (0.4, -0.35), (0.4, -1), (0.65, -1), (0.65, -0.1), (0.14, 0.1), (0.14, 1)]
        ),
        "clover": _polar(lambda a: 0.35 + 0.65 * np.abs(np.cos(1.5 * a)) ** 0.6),
        "flower": _polar(lambda a: 0.72 + 0.28 * np.cos(6 * a)),
        "pinwheel": _polar(lambda a: 0.3 + 0.7 * ((a * 4 / (2 * np.pi)) % 1.0), 480),
        "propeller": _polar(lambda a: 0.16 + 0.84 * np.clip(np.cos(3 * a), 0, 1) ** 0.8),
        "droplet": _mirrored([(0, -1), (0.15, -0.6), (0.38, -0.15), *_arc(0, 0.4, 0.58, -35, 90, 14)]),
        "leaf": _mirrored([*_arc(-0.75, 0, 1.25, -53, 53, 24)]),
        "key": [
            [
                (-0.35, -0.12),
                (1, -0.12),
                (1, 0.42),
                (0.8, 0.42),
                (0.8, 0.12),
                (0.6, 0.12),
                (0.6, 0.36),
                (0.4, 0.36),
                (0.4, 0.12),
            ]
            + [(-0.35, 0.12), *_arc(-0.7, 0, 0.38, 20, 340, 28)],
            _arc(-0.74, 0, 0.17, 0, 340, 18),
        ],
        "anchor": _mirrored(
            [
                (0, -1),
                (0.2, -0.95),
                (0.22, -0.75),
                (0.12, -0.65),
                (0.45, -0.62),
                (0.45, -0.42),
                (0.12, -0.42),
                (0.12, 0.6),
            ]
            + [
                (0.45, 0.45),
                (0.6, 0.2),
                (0.5, 0.2),
                (0.75, -0.15),
                (0.95, 0.25),
                (0.8, 0.25),
                (0.6, 0.7),
                (0.25, 0.95),
                (0, 1),
            ]
        ),
        "bow_tie": [
            [(-1, -0.55), (-0.2, -0.2), (-0.2, -0.3), (0.2, -0.3), (0.2, -0.2), (1, -0.55)]
            + [(1, 0.55), (0.2, 0.2), (0.2, 0.3), (-0.2, 0.3), (-0.2, 0.2), (-1, 0.55)]
        ],
        "parallelogram": [[(-1, 0.45), (-0.35, -0.45), (1, -0.45), (0.35, 0.45)]],
        "trapezoid": _mirrored([(0.4, -0.5), (1, 0.5)]),
        "kite": _mirrored([(0, -0.65), (0.6, -0.15), (0, 1)]),
        "chevron": [[(-0.7, -0.8), (0.1, -0.8), (0.8, 0), (0.1, 0.8), (-0.7, 0.8), (0, 0)]],
        "pacman": [[(0, 0), *_arc(0, 0, 1, 38, 322, 40)]],
        "quadrant": [[(-0.6, 0.6), *_arc(-0.6, 0.6, 1.3, -90, 0, 20)]],
        "pill": [[*_arc(0.62, 0, 0.34, -90, 90, 12), *_arc(-0.62, 0, 0.34, 90, 270, 12)]],
        "mushroom": _mirrored([*_arc(0, 0, 0.95, -90, 0, 16), (0.95, 0.15), (0.28, 0.15), (0.34, 0.9)]),
        "umbrella": _mirrored(
            [
                (0, -1),
                *_arc(0, 0, 0.98, -88, 0, 14),
                *_arc(0.74, 0, 0.24, 0, -180, 8),
                *_arc(0.27, 0, 0.2, 0, -150, 6),
                (0.08, 1),
            ]
        ),
        "mug": [
            [
                (-0.8, -0.75),
                (0.4, -0.75),
                (0.4, -0.5),
                *_arc(0.45, 0, 0.5, -90, 90, 14),
                (0.4, 0.5),
                (0.4, 0.75),
                (-0.8, 0.75),
            ],
            [(0.4, -0.28), *_arc(0.45, 0, 0.27, -90, 90, 10), (0.4, 0.28)],
        ],
        "bottle": _mirrored([(0.16, -1), (0.16, -0.5), (0.4, -0.15), (0.4, 1)]),
        "wine_glass": _mirrored([(0.5, -1), (0.55, -0.5), (0.4, -0.1), (0.09, 0.1), (0.09, 0.8), (0.5, 0.9), (0.5, 1)]),
        "hammer": [
            [
                (-0.8, -0.9),
                (0.5, -0.9),
                (0.9, -0.55),
                (0.5, -0.45),
                (0.12, -0.45),
                (0.12, 1),
                (-0.2, 1),
                (-0.2, -0.45),
                (-0.8, -0.45),
            ]
        ],
        "axe": [
            [
                (-0.15, -1),
                (0.12, -1),
                (0.12, -0.75),
                (0.75, -0.95),
                (0.9, -0.45),
                (0.75, 0.1),
                (0.12, -0.2),
                (0.12, 1),
                (-0.15, 1),
            ]
        ],
        "pine": _mirrored(
            [(0, -1), (0.45, -0.4), (0.22, -0.4), (0.65, 0.15), (0.35, 0.15), (0.8, 0.7), (0.16, 0.7), (0.16, 1)]
        ),
        "cloud": [
            [
                *_arc(-0.55, 0.2, 0.4, 90, 250, 10),
                *_arc(-0.1, -0.15, 0.45, 190, 330, 12),
                *_arc(0.55, 0.15, 0.45, 270, 450, 14),
            ]
        ],
        "crown": _mirrored([(0, -0.75), (0.35, -0.05), (0.9, -0.6), (0.72, 0.7)]),
        "flag": [[(-0.7, -1), (0.8, -0.75), (0.3, -0.4), (0.8, 0), (-0.5, 0), (-0.5, 1), (-0.7, 1)]],
        "rocket": _mirrored(
            [(0, -1), (0.28, -0.6), (0.32, 0.2), (0.75, 0.65), (0.75, 0.95), (0.3, 0.65), (0.15, 0.65), (0.1, 0.95)]
        ),
        "boat": [
            [
                (0.05, -1),
                (0.75, 0.1),
                (0.05, 0.1),
                (0.05, 0.3),
                (1, 0.3),
                (0.65, 0.85),
                (-0.65, 0.85),
                (-1, 0.3),
                (-0.08, 0.3),
                (-0.08, -1),
            ]
        ],
        "wrench": [
            [(-0.14, 0.9), (-0.14, -0.25), *_arc(0, -0.58, 0.42, 130, 245, 12), (-0.18, -0.5), (0.18, -0.5)]
            + [*_arc(0, -0.58, 0.42, 295, 410, 12), (0.14, -0.25), (0.14, 0.9)]
        ],
        "dumbbell": _mirrored([(0.35, -1), (0.35, -0.5), (0.1, -0.5), (0.1, 0.5), (0.35, 0.5), (0.35, 1)]),
        "bone": _mirrored(
            [(0, -0.8), *_arc(0.25, -0.82, 0.26, 190, 400, 14), (0.14, -0.45), (0.14, 0.45)]
            + [*_arc(0.25, 0.82, 0.26, -40, 170, 14), (0, 0.8)]
        ),
        "butterfly": _polar(
            lambda a: 0.18 + 0.82 * np.abs(np.sin(a)) ** 0.7 * np.abs(np.cos(1.5 * a + 0.4 * np.pi)) ** 0.6
        ),
        "bell": _mirrored(
            [(0, -1), (0.3, -0.85), (0.45, -0.4), (0.5, 0.2), (0.85, 0.6), (0.2, 0.62), (0.15, 0.85), (0, 0.9)]
        ),
        "speech_bubble": [
            [
                *_arc(-0.6, -0.4, 0.35, 180, 270, 6),
                *_arc(0.6, -0.4, 0.35, 270, 360, 6),
                *_arc(0.6, 0.05, 0.35, 0, 90, 6),
            ]
            + [(0, 0.4), (-0.5, 0.95), (-0.4, 0.4), *_arc(-0.6, 0.05, 0.35, 90, 180, 6)]
        ],
        "padlock": [
            [
                (-0.7, -0.1),
                (-0.5, -0.1),
                (-0.5, -0.45),
                *_arc(0, -0.45, 0.5, 180, 360, 16),
                (0.5, -0.1),
                (0.7, -0.1),
                (0.7, 0.9),
                (-0.7, 0.9),
            ],
            [(-0.28, -0.1), (-0.28, -0.45), *_arc(0, -0.45, 0.28, 180, 360, 12), (0.28, -0.1)],
        ],
    }


def _characters() -> dict[str, list[np.ndarray]]:
    """Return the outlines of `CHARACTERS` from the font file that matplotlib carries: the same on every machine."""
    import matplotlib
    from matplotlib.ft2font import FT2Font
    from matplotlib.path import Path as FontPath

    font = FT2Font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"))
    font.set_size(_FONT_SEGMENTS, 72)
    outlines = {}
    for character in CHARACTERS:
        font.load_char(ord(character))
        vertices, codes = font.get_path()
        rings = [np.asarray(ring) for ring in FontPath(vertices, codes).to_polygons(closed_only=True)]
        outlines[f"char_{character}"] = [ring[:-1] * (1, -1) for ring in rings if len(ring) > 3]
    return outlines


def _normalised(rings) -> tuple[np.ndarray, ...]:
    """Centre the bounding box at the origin, make the largest radius 1, order the rings by area, largest first."""
    arrays = [np.asarray(ring, dtype=float) for ring in rings]
    points = np.concatenate(arrays)
    centre = (points.min(0) + points.max(0)) / 2
    radius = np.linalg.norm(points - centre, axis=1).max()

    def area(ring: np.ndarray) -> float:
        x, y = ring.T
        return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2

    return tuple((ring - centre) / radius for ring in sorted(arrays, key=area, reverse=True))


@cache
def outlines() -> dict[str, tuple[np.ndarray, ...]]:
    """Return all outlines by class name, in label order: rings (N, 2) in the unit disc, y down."""
    shapes: dict[str, list] = dict(_handmade())
    shapes.update(_characters())
    for k in BLOB_SEEDS:
        rng = np.random.default_rng([20_201, k])
        shapes[f"blob_{k:02d}"] = [
            fourier_ring(rng, num_harmonics=4 + k % 5, roughness=0.34, num_points=128, decay=0.4)
        ]
    return {name: _normalised(rings) for name, rings in shapes.items()}
