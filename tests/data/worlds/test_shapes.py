"""The built-in world: equal bytes for equal parameters, and annotations that say what was drawn."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from permafrost.data.build import located
from permafrost.data.detection.annotations import load_coco_file
from permafrost.data.detection.masks import encode_segmentation
from permafrost.data.errors import DataError
from permafrost.data.worlds import files as world_files
from permafrost.data.worlds.config import ShapesDataConfig, ShapesWorld
from permafrost.data.worlds.files import WorldFiles
from permafrost.data.worlds.shapes import CLASSES, TEXTURES, outline, render_scene, texture_field
from permafrost.data.worlds.shapes_files import (
    CATEGORY_IDS,
    SHAPES,
    _run_lengths,
)

TINY = ShapesWorld(num_train=5, num_val=3, image_side=64, crowd_share=0.5)


def _load(config: ShapesDataConfig, split: str) -> dict:
    return json.loads(located(config).paths(split)[0].read_text())


def test_equal_parameters_give_equal_bytes(tmp_path, file_bytes) -> None:
    for name in ("first", "second", "other"):
        (tmp_path / name).mkdir()
    SHAPES.write(TINY, tmp_path / "first")
    SHAPES.write(TINY, tmp_path / "second")
    first = file_bytes(tmp_path / "first")
    assert first == file_bytes(tmp_path / "second")
    assert len(first) == 5 + 3 + 3
    SHAPES.write(dataclasses.replace(TINY, seed=1), tmp_path / "other")
    other = file_bytes(tmp_path / "other")
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_the_number_of_processes_changes_no_byte(tmp_path, file_bytes) -> None:
    for processes in (1, 2, 7):
        (tmp_path / str(processes)).mkdir()
        SHAPES.write(TINY, tmp_path / str(processes), num_processes=processes)
    one = file_bytes(tmp_path / "1")
    assert one == file_bytes(tmp_path / "2")
    assert one == file_bytes(tmp_path / "7"), "more processes than pictures in a split"


def test_a_rendering_process_that_dies_is_an_error(tmp_path, monkeypatch) -> None:
    start = world_files._start_process

    def start_and_kill(*job) -> subprocess.Popen[str]:
        child = start(*job)
        child.kill()
        return child

    monkeypatch.setattr(world_files, "_start_process", start_and_kill)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    files = dataclasses.replace(SHAPES, per_process=4)
    with pytest.raises(DataError, match="renders the shapes world ended with -9"):
        files.ensure(TINY, tmp_path / "world")
    assert list(tmp_path.iterdir()) == [], "and nothing half-written stays"


def test_an_image_depends_on_its_index_only(tmp_path) -> None:
    longer = dataclasses.replace(TINY, num_train=50)
    assert np.array_equal(render_scene(TINY, "train", 3)[0], render_scene(longer, "train", 3)[0])


def test_splits_share_no_image(shapes_config) -> None:
    world = dataclasses.replace(shapes_config.world, noise=0.0)
    train = {render_scene(world, "train", index)[0].tobytes() for index in range(20)}
    val = {render_scene(world, "val", index)[0].tobytes() for index in range(20)}
    assert len(train) == len(val) == 20
    assert not train & val
    ids = [{image["id"] for image in _load(shapes_config, split)["images"]} for split in ("train", "val")]
    assert not ids[0] & ids[1]


def test_files_follow_the_official_layout(shapes_config) -> None:
    root = Path(located(shapes_config).root)
    for split, count in (("train", 40), ("val", 24)):
        content = _load(shapes_config, split)
        assert [category["name"] for category in content["categories"]] == list(CLASSES)
        assert [category["id"] for category in content["categories"]] == list(CATEGORY_IDS)
        assert len(content["images"]) == len(list((root / f"{split}2017").iterdir())) == count
        for entry in content["images"]:
            assert entry["file_name"] == f"{entry['id']:012d}.jpg"
            with Image.open(root / f"{split}2017" / entry["file_name"]) as image:
                assert (image.format, image.mode) == ("JPEG", "RGB")
                assert image.size == (entry["width"], entry["height"]) == (96, 96)


def test_our_own_reader_finds_nothing_wrong(shapes_config) -> None:
    for split in ("train", "val"):
        assert load_coco_file(located(shapes_config).paths(split)[0]).findings == []


def test_boxes_and_areas_are_those_of_the_masks(shapes_config) -> None:
    forms = set()
    for entry in _load(shapes_config, "train")["annotations"]:
        segmentation = entry["segmentation"]
        mask = mask_api.decode(encode_segmentation(segmentation, 96, 96))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
        assert entry["bbox"] == box
        assert entry["area"] == mask.sum()
        kind = "polygon" if isinstance(segmentation, list) else type(segmentation["counts"]).__name__
        forms.add((kind, entry["iscrowd"]))
    assert forms == {("polygon", 0), ("str", 0), ("list", 1)}


def test_every_object_keeps_its_visible_share_and_masks_do_not_overlap(shapes_config) -> None:
    world, hidden = shapes_config.world, 0
    for index in range(40):
        _, objects = render_scene(world, "train", index)
        covered = np.zeros((96, 96), dtype=int)
        for region in objects:
            covered += region.mask
            # The drawn area is a count of pixels, the full one a formula: a tenth apart for small shapes.
            assert region.mask.sum() >= world.min_visible * region.full_area * 0.999
            hidden += not region.is_crowd and not region.is_whole
        assert covered.max() <= 1
    assert hidden > 20


def test_no_occlusion_when_all_must_be_visible() -> None:
    world = ShapesWorld(image_side=96, min_visible=0.97, objects=(4, 8), crowd_share=0.0)
    for index in range(10):
        _, objects = render_scene(world, "train", index)
        for region in objects:
            assert region.mask.sum() >= 0.97 * region.full_area


def test_polygons_cover_what_was_drawn(shapes_config) -> None:
    checked = 0
    for index in range(20):
        _, objects = render_scene(shapes_config.world, "train", index)
        for region in objects:
            if region.is_whole and len(region.rings) == 1:
                polygon = region.rings[0].ravel().tolist()
                mask = mask_api.decode(mask_api.frPyObjects([polygon], 96, 96)[0]).astype(bool)
                union = (mask | region.mask).sum()
                assert (mask & region.mask).sum() / union > 0.85
                checked += 1
    assert checked > 15


@pytest.mark.parametrize("name", CLASSES)
def test_outlines_fill_the_unit_disc(name) -> None:
    rings = outline(name)
    assert len(rings) == (2 if name == "ring" else 1)
    radius = np.hypot(*rings[0].T)
    assert 0.9 < radius.max() <= 1.26
    # Simple contours: the shoelace area and the drawn area agree only when no edge crosses another.
    polygon = (rings[0] * 100 + 150).ravel().tolist()
    drawn = mask_api.area(mask_api.frPyObjects([polygon], 300, 300))[0]
    after = np.roll(rings[0], -1, axis=0)
    shoelace = abs((rings[0][:, 0] * after[:, 1] - rings[0][:, 1] * after[:, 0]).sum()) / 2 * 1e4
    assert drawn == pytest.approx(shoelace, rel=0.03)


@pytest.mark.parametrize("kind", TEXTURES)
def test_textures_are_fields(kind) -> None:
    rng = np.random.default_rng(0)
    field = texture_field(rng, kind, 40, 50, 8.0)
    assert field.shape == (40, 50)
    assert field.dtype == np.float32
    assert 0 <= field.min() < field.max() <= 1
    assert field.std() > 0.05


def test_difficulty_fields_change_the_picture() -> None:
    flat = ShapesWorld(image_side=64, clutter=0, noise=0.0, crowd_share=0.0, background_contrast=0.0)
    busy = dataclasses.replace(flat, clutter=30, noise=0.1, background_contrast=1.0)

    def roughness(world: ShapesWorld) -> float:
        images = [render_scene(world, "train", index)[0].astype(float) for index in range(8)]
        return float(np.mean([np.abs(np.diff(image, axis=1)).mean() for image in images]))

    assert roughness(busy) > 3 * roughness(flat)
    few = sum(len(render_scene(dataclasses.replace(flat, objects=(1, 1)), "train", i)[1]) for i in range(10))
    assert few <= 10
    crowded = render_scene(dataclasses.replace(flat, crowd_share=1.0), "train", 0)[1]
    assert [region.is_crowd for region in crowded].count(True) == 1


def test_sizes_lie_in_the_range() -> None:
    world = ShapesWorld(image_side=200, object_size=(0.2, 0.3), stretch=1.0, objects=(3, 3), crowd_share=0.0)
    for index in range(10):
        for region in render_scene(world, "train", index)[1]:
            points = region.rings[0]
            diameter = np.hypot(*(points[:, None] - points[None]).reshape(-1, 2).T).max()
            # The outlines' own diameters are 1.6 (triangle) to 2.1 (crescent) unit radii.
            assert 0.2 * 200 * 0.8 < diameter < 0.3 * 200 * 1.06


def test_run_lengths_are_those_of_pycocotools() -> None:
    rng = np.random.default_rng(1)
    for mask in [rng.random((7, 5)) < 0.5, np.zeros((4, 3), bool), np.ones((4, 3), bool), np.eye(6, dtype=bool)]:
        back = mask_api.decode(
            mask_api.frPyObjects({"counts": _run_lengths(mask), "size": list(mask.shape)}, *mask.shape)
        )
        assert np.array_equal(back, mask)


def _ensure(world: ShapesWorld, folder: Path) -> None:
    SHAPES.ensure(world, folder)


def test_processes_that_start_together_agree(tmp_path, file_bytes) -> None:
    folder = tmp_path / "cache" / "world"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_ensure, args=(TINY, folder)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in folder.parent.iterdir()] == ["world"]
    (tmp_path / "alone").mkdir()
    SHAPES.write(TINY, tmp_path / "alone")
    assert file_bytes(folder) == file_bytes(tmp_path / "alone")


def test_a_lost_race_keeps_the_winner(tmp_path, monkeypatch, capsys) -> None:
    """The other process finishes while this one renders."""
    folder = tmp_path / "world"
    real = SHAPES.write

    def render_and_lose(files: WorldFiles, world: ShapesWorld, staging: Path) -> None:
        real(world, staging)
        folder.mkdir()
        real(world, folder)

    monkeypatch.setattr(WorldFiles, "write", render_and_lose)
    assert SHAPES.ensure(TINY, folder) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    assert capsys.readouterr().out == ""


def test_an_interrupted_writer_leaves_nothing(tmp_path, monkeypatch) -> None:
    def fail(files: WorldFiles, world: ShapesWorld, staging: Path) -> None:
        (staging / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WorldFiles, "write", fail)
    with pytest.raises(DataError, match=r"cannot write the shapes world .*No space left"):
        SHAPES.ensure(TINY, tmp_path / "world")
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_written_once_with_one_line(permafrost_cache, capsys) -> None:
    world = dataclasses.replace(TINY, seed=77)
    config = ShapesDataConfig(world=world)
    root = Path(located(config).root)
    assert root == SHAPES.folder(world)
    assert root.parent == permafrost_cache
    assert capsys.readouterr().out.count("\n") == 1
    before = (root / "world.json").stat().st_mtime_ns
    assert located(config).root == str(root)
    assert capsys.readouterr().out == ""
    assert (root / "world.json").stat().st_mtime_ns == before
    assert SHAPES.folder(dataclasses.replace(world, noise=0.03)) != root


def test_a_folder_of_something_else_is_refused(tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="holds something other than a shapes world"):
        located(ShapesDataConfig(root=str(tmp_path), world=TINY))
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    other = tmp_path / "world"
    assert located(ShapesDataConfig(root=str(other), world=TINY)).root == str(other)
    with pytest.raises(DataError, match="a world of other parameters"):
        located(ShapesDataConfig(root=str(other), world=dataclasses.replace(TINY, seed=5)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_train", 0),
        ("image_side", 8),
        ("objects", (3, 2)),
        ("object_size", (0.5, 0.2)),
        ("stretch", 0.5),
        ("clutter", -1),
        ("noise", 2.0),
        ("min_visible", 0.0),
    ],
)
def test_impossible_worlds_name_the_field(field, value) -> None:
    with pytest.raises(DataError, match=field):
        ShapesWorld(**{field: value})
