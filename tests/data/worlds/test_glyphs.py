"""The glyphs world and the drawing primitives: geometry against closed forms, classes distinct, pictures reproducible."""

from __future__ import annotations

import ast
import json
from collections import namedtuple
from pathlib import Path
from typing import Never

import numpy as np
import pytest

from permafrost.data.errors import DataError
from permafrost.data.worlds import drawing, glyphs, outlines

CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 240)[:-1]), np.sin(np.linspace(0, 2 * np.pi, 240)[:-1])], axis=1)


def moment_normalised(rings: list[np.ndarray]) -> list[np.ndarray]:
    """Area centroid to the origin, radius of gyration to 0.45."""
    mask = drawing.rings_mask([ring * 100 + 128 for ring in rings], 256, 256, supersample=1)
    y, x = np.mgrid[:256, :256] + 0.5
    area = mask.sum()
    centre = np.array([(mask * x).sum(), (mask * y).sum()]) / area
    gyration = np.sqrt((((x - centre[0]) ** 2 + (y - centre[1]) ** 2) * mask).sum() / area)
    return [(ring * 100 + 128 - centre) / gyration * 0.45 for ring in rings]


def turned_masks(rings: list[np.ndarray], num_turns: int = 24, side: int = 40) -> np.ndarray:
    """Masks (2 * num_turns, side * side) of an outline and its mirror image, turned all around."""
    masks = []
    for mirror in (1, -1):
        for k in range(num_turns):
            turn = drawing.rotation(2 * np.pi * k / num_turns).T
            placed = [(ring * (mirror, 1)) @ turn * side * 0.48 + side / 2 for ring in rings]
            masks.append(drawing.rings_mask(placed, side, side, supersample=2).ravel())
    return np.stack(masks)


def best_overlap(masks: np.ndarray, reference: np.ndarray) -> float:
    """Highest intersection over union of masks (T, P) with one mask (P,)."""
    return float((np.minimum(masks, reference).sum(1) / np.maximum(masks, reference).sum(1)).max())


def detection_shapes() -> dict[str, list[np.ndarray]]:
    """The eight outlines of the detection world, written down here from their definitions."""
    t = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    tenths = np.arange(10) * np.pi / 5
    heart = np.stack(
        [16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))], axis=1
    )
    thirds = np.arange(3) * 2 * np.pi / 3
    third = 1 / 3
    arm = [(-third, -1), (third, -1), (third, -third), (1, -third), (1, third), (third, third)]
    outer = np.linspace(np.pi / 3, 5 * np.pi / 3, 60)
    tip_angle = np.arctan2(np.sin(np.pi / 3), 0.5 - 0.45)
    tip_radius = np.hypot(np.sin(np.pi / 3), 0.5 - 0.45)
    inner = np.linspace(2 * np.pi - tip_angle, tip_angle, 60)
    crescent = np.concatenate(
        [
            np.stack([np.cos(outer), np.sin(outer)], axis=1),
            np.stack([0.45 + tip_radius * np.cos(inner), tip_radius * np.sin(inner)], axis=1),
        ]
    )
    return {
        "circle": [CIRCLE],
        "square": [np.array([(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)])],
        "triangle": [np.stack([np.cos(thirds), np.sin(thirds)], axis=1)],
        "star": [np.stack([radii * np.cos(tenths), radii * np.sin(tenths)], axis=1)],
        "cross": [np.array(arm + [(-x, -y) for x, y in arm])],
        "ring": [CIRCLE, CIRCLE * 0.55],
        "heart": [heart / 17],
        "crescent": [crescent],
    }


@pytest.fixture(scope="module")
def class_masks() -> dict[str, np.ndarray]:
    return {name: turned_masks(moment_normalised(rings)) for name, rings in outlines.outlines().items()}


class TestDrawing:
    def test_area_of_a_disc_with_a_hole(self) -> None:
        rings = [CIRCLE * 30 + 40, CIRCLE * 12 + 40]
        mask = drawing.rings_mask(rings, 80, 80)
        assert mask.sum() == pytest.approx(np.pi * (30**2 - 12**2), rel=0.02)
        assert mask[40, 40] == 0
        assert mask[40, 60] == 1

    def test_mask_is_where_the_ring_is(self) -> None:
        ring = np.array([(10.0, 5.0), (30.0, 5.0), (30.0, 13.0), (10.0, 13.0)])
        mask = drawing.rings_mask([ring], 40, 50)
        y, x = np.mgrid[:40, :50] + 0.5
        assert (mask * x).sum() / mask.sum() == pytest.approx(20, abs=0.3)
        assert (mask * y).sum() / mask.sum() == pytest.approx(9, abs=0.3)

    def test_an_island_in_a_hole_is_filled(self) -> None:
        mask = drawing.rings_mask([CIRCLE * 30 + 40, CIRCLE * 20 + 40, CIRCLE * 8 + 40], 80, 80)
        assert mask[40, 40] == 1
        assert mask[40, 54] == 0

    def test_stroke_area(self) -> None:
        path = np.array([(10.0, 20.0), (70.0, 20.0)])
        mask = drawing.strokes_mask([path], 40, 80, thickness=6)
        assert mask.sum() == pytest.approx(60 * 6 + np.pi * 9, rel=0.05)

    def test_closed_stroke_is_hollow(self) -> None:
        mask = drawing.strokes_mask([CIRCLE * 25 + 32], 64, 64, thickness=4, closed=True)
        assert mask[32, 32] == 0
        assert mask.sum() == pytest.approx(2 * np.pi * 25 * 4, rel=0.1)

    @pytest.mark.parametrize(("point", "inside"), [((0, 0), True), ((0.8, 0), False), ((0.45, 0.45), True)])
    def test_contains_point(self, point, inside) -> None:
        square = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
        assert drawing.contains_point(square, np.array(point)) is inside

    def test_band_noise_keeps_to_its_band(self) -> None:
        field = drawing.band_noise(np.random.default_rng(0), 128, 128, 0.1, 0.2)
        power = np.abs(np.fft.fft2(field - field.mean())) ** 2
        frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)[None])
        within = (frequency > 0.08) & (frequency < 0.22)
        assert power[within].sum() / power.sum() > 0.9

    def test_fourier_ring_reaches_one_and_stays_simple(self) -> None:
        ring = drawing.fourier_ring(np.random.default_rng(3), 7, 0.3)
        angles = np.unwrap(np.arctan2(ring[:, 1], ring[:, 0]))
        assert np.linalg.norm(ring, axis=1).max() == pytest.approx(1)
        assert (np.diff(angles) > 0).all()

    def test_composite_by_hand(self) -> None:
        image = np.full((1, 2, 3), 0.2, dtype=np.float32)
        result = drawing.composite(image, np.array([1.0, 0.0, 0.6]), np.array([[0.5, 0.0]], dtype=np.float32), 0.5)
        np.testing.assert_allclose(result[0], [[0.4, 0.15, 0.3], [0.2, 0.2, 0.2]], atol=1e-6)


class TestOutlines:
    def test_a_hundred_classes_in_the_unit_disc(self) -> None:
        shapes = outlines.outlines()
        assert len(shapes) == 100
        for name, rings in shapes.items():
            points = np.concatenate(rings)
            assert np.linalg.norm(points, axis=1).max() == pytest.approx(1), name
            np.testing.assert_allclose(points.min(0) + points.max(0), 0, atol=1e-9, err_msg=name)
            assert drawing.rings_mask([ring * 50 + 52 for ring in rings], 104, 104).mean() > 0.08, name

    def test_no_two_classes_are_alike(self, class_masks) -> None:
        names = list(class_masks)
        for i, name in enumerate(names):
            for other in names[:i]:
                assert best_overlap(class_masks[name], class_masks[other][0]) < 0.92, (name, other)

    def test_no_class_is_a_shape_of_the_detection_world(self, class_masks) -> None:
        for reference, rings in detection_shapes().items():
            masks = turned_masks(moment_normalised(rings))
            # The measure itself: the same shape, turned and mirrored, is found again.
            moved = [(ring * (-0.6, 0.6)) @ drawing.rotation(0.5).T for ring in rings]
            assert best_overlap(masks, turned_masks(moment_normalised(moved), num_turns=1)[0]) > 0.92, reference
            for name, candidates in class_masks.items():
                assert best_overlap(candidates, masks[0]) < 0.9, (reference, name)

    def test_the_worlds_share_no_code_but_the_primitives(self) -> None:
        folder = Path(drawing.__file__).parent
        tree = ast.parse((folder / "shapes.py").read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"permafrost.data.worlds.glyphs", "permafrost.data.worlds.outlines"}


class TestRender:
    def test_a_pure_function(self) -> None:
        first, label = glyphs.render("train", 7)
        again, _ = glyphs.render("train", 7)
        np.testing.assert_array_equal(first, again)
        assert (first.shape, first.dtype, label) == ((128, 128, 4), np.uint8, 7)
        for other in (("train", 107), ("val", 7)):
            assert (glyphs.render(*other)[0] != first).any()
        assert (glyphs.render("train", 7, seed=1)[0] != first).any()

    def test_every_figure_is_there_and_has_the_outline_of_its_class(self) -> None:
        """Easy pictures are hardly turned: the mask must overlap with the upright outline of its label, not another."""
        shapes = list(outlines.outlines().values())
        easy = [i for i in range(600) if glyphs._generator("train", i, 0).random() < 0.08]
        assert len(easy) > 20
        closest = []
        for index in easy[:30]:
            picture, label = glyphs.render("train", index)
            assert label == index % 100
            seen = picture[..., 3] > 127
            rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
            assert 0.3 < max(np.ptp(rows), np.ptp(columns)) / 128 < 0.95
            y, x = np.mgrid[:128, :128] + 0.5
            scale = max(np.ptp(rows), np.ptp(columns)) + 1
            centre = np.array([(seen * x).sum(), (seen * y).sum()]) / seen.sum()

            def overlap(rings, seen=seen, centre=centre, scale=scale) -> float:
                best = 0.0
                for turn in np.linspace(-0.3, 0.3, 7):
                    turned = [ring @ drawing.rotation(turn).T for ring in rings]
                    placed = [ring / np.ptp(np.concatenate(turned), axis=0).max() * scale for ring in turned]
                    mask = drawing.rings_mask([ring - _centroid(placed) + centre for ring in placed], 128, 128, 1) > 0.5
                    best = max(best, (mask & seen).sum() / (mask | seen).sum())
                return best

            mine = overlap(shapes[label])
            others = [overlap(shapes[(label + step) % 100]) for step in (17, 43, 71)]
            closest.append(mine > max(others))
        # A few easy pictures are mirrored.
        assert np.mean(closest) > 0.9

    def test_figures_stand_out_when_easy(self) -> None:
        gaps = {True: [], False: []}
        for index in range(120):
            difficulty = glyphs._generator("train", index, 0).random()
            if 0.4 < difficulty < 0.7:
                continue
            picture, _ = glyphs.render("train", index)
            inside = picture[..., 3] > 127
            if inside.any():
                pixels = picture[..., :3] / 255
                gaps[bool(difficulty < 0.4)].append(np.linalg.norm(pixels[inside].mean(0) - pixels[~inside].mean(0)))
        assert np.median(gaps[True]) > np.median(gaps[False]) > 0.1


def _centroid(rings) -> np.ndarray:
    mask = drawing.rings_mask([ring + 150 for ring in rings], 300, 300, 1)
    y, x = np.mgrid[:300, :300] + 0.5
    return np.array([(mask * x).sum(), (mask * y).sum()]) / mask.sum() - 150


class TestCache:
    def test_rendered_once_and_equal_to_render(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setenv("PERMAFROST_CACHE", str(tmp_path))
        split = glyphs.load_split("val", 6, image_size=32)
        for index in range(6):
            picture, label = glyphs.render("val", index, image_size=32)
            np.testing.assert_array_equal(split.images[index], picture)
            assert split.labels[index] == label
            assert split.difficulties[index] == glyphs._generator("val", index, 0).random()
        assert list(split.class_names) == list(outlines.outlines())

        def fail(job) -> Never:
            raise AssertionError("rendered again")

        monkeypatch.setattr(glyphs, "_render_chunk", fail)
        np.testing.assert_array_equal(glyphs.load_split("val", 6, image_size=32).images, split.images)
        with pytest.raises(AssertionError, match="rendered again"):
            glyphs.load_split("val", 7, image_size=32)

    def test_workers_render_the_same(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(glyphs, "_CHUNK", 3)
        one = glyphs.load_split("train", 8, image_size=32, cache_dir=tmp_path / "one", num_workers=1)
        two = glyphs.load_split("train", 8, image_size=32, cache_dir=tmp_path / "two", num_workers=2)
        np.testing.assert_array_equal(one.images, two.images)
        (folder,) = (tmp_path / "two" / "glyphs").iterdir()
        assert json.loads((folder / "done.json").read_text())["num_images"] == 8

    def test_an_interrupted_rendering_leaves_no_cache(self, tmp_path, monkeypatch) -> None:
        def stop(job) -> Never:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(glyphs, "_render_chunk", stop)
            with pytest.raises(KeyboardInterrupt):
                glyphs.load_split("val", 4, image_size=32, cache_dir=tmp_path)
        split = glyphs.load_split("val", 4, image_size=32, cache_dir=tmp_path)
        np.testing.assert_array_equal(split.images[3], glyphs.render("val", 3, image_size=32)[0])

    def test_mistakes_are_named(self, tmp_path, monkeypatch) -> None:
        with pytest.raises(DataError, match=r"unknown split 'test'.*train.*val"):
            glyphs.load_split("test", 4, cache_dir=tmp_path)
        with pytest.raises(DataError, match="0 images"):
            glyphs.load_split("val", 0, cache_dir=tmp_path)
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(glyphs.shutil, "disk_usage", lambda path: usage(10, 10, 1000))
        with pytest.raises(DataError, match="PERMAFROST_CACHE"):
            glyphs.load_split("val", 4, cache_dir=tmp_path)
