"""The built-in segmentation world: equal bytes for equal parameters, labels that say what was drawn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from permafrost.data.build import check_data, located, submission_set, train_set, val_set
from permafrost.data.errors import DataError
from permafrost.data.types import SampleKey
from permafrost.data.worlds.config import SceneryDataConfig, SceneryWorld
from permafrost.data.worlds.scenery import CLASSES, render_labelled
from permafrost.data.worlds.scenery_files import SCENERY
from permafrost.data.worlds.shapes import TEXTURES, render_scene

TINY = SceneryWorld(num_train=5, num_val=3, image_side=64, crowd_share=0.5)


def test_equal_parameters_give_equal_bytes_whatever_the_number_of_processes(tmp_path, file_bytes) -> None:
    found = {}
    for name, world, processes in (
        ("one", TINY, 1),
        ("three", TINY, 3),
        ("other", dataclasses.replace(TINY, seed=1), 1),
    ):
        (tmp_path / name).mkdir()
        SCENERY.write(world, tmp_path / name, num_processes=processes)
        found[name] = file_bytes(tmp_path / name)
    assert found["one"] == found["three"]
    assert len(found["one"]) == 2 * 8 + 2
    assert found["one"].keys() == found["other"].keys()
    assert all(found["one"][name] != found["other"][name] for name in found["one"])


def test_the_files_are_a_data_set_without_faults(permafrost_cache, tmp_path) -> None:
    config = SceneryDataConfig(image_size=64, world=TINY)
    assert check_data(config) == []
    train, val = train_set(config), val_set(config)
    assert train.classes == val.classes == list(CLASSES)
    assert (train.num_images, val.num_images) == (5, 3)
    sample = val[SampleKey(0, 0, 1)]
    picture, labels = render_labelled(TINY, "val", 1)
    # 0 - 1 is 255 in a byte: ignored.
    assert np.array_equal(sample.target.semantic.numpy(), labels - np.uint8(1))
    assert np.abs(sample.image.permute(1, 2, 0).numpy().astype(int) - picture).mean() < 12, "a JPEG of it"
    assert submission_set(config, tmp_path).num_images == 3
    assert SCENERY.ensure(TINY) == SCENERY.ensure(TINY)


def test_labels_are_objects_before_regions_and_strokes_are_ignored() -> None:
    world = SceneryWorld(clutter=4, crowd_share=0.3)
    counts = np.zeros(len(CLASSES) + 1, dtype=int)
    regions = set()
    for index in range(40):
        picture, labels = render_labelled(world, "train", index)
        assert picture.shape == (160, 160, 3)
        assert labels.max() <= len(CLASSES)
        counts += np.bincount(labels.ravel(), minlength=len(counts))
        regions.add(len(np.unique(labels[labels > len(CLASSES) - len(TEXTURES)])))
    assert (counts > 0).all()
    assert regions == {1, 2, 3}
    assert counts[0] < 0.05 * counts.sum()
    assert counts[-len(TEXTURES) :].sum() > 0.5 * counts.sum()
    calm = dataclasses.replace(world, clutter=0, objects=(1, 1), crowd_share=0.0, regions=(1, 1), noise=0.0)
    labels = render_labelled(calm, "train", 0)[1]
    assert len(np.unique(labels)) == 2


def test_the_picture_is_another_one_than_that_of_shapes() -> None:
    assert not np.array_equal(
        render_labelled(SceneryWorld(), "train", 0)[0], render_scene(SceneryWorld(), "train", 0)[0]
    )


def test_a_folder_of_something_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="something other than a scenery world"):
        located(SceneryDataConfig(root=str(tmp_path), world=TINY))
    with pytest.raises(DataError, match=r"data\.world\.regions"):
        SceneryWorld(regions=(0, 2))
