"""The built-in world `motion`: deterministic, real H.264, and pairs that only the order of frames tells apart."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from permafrost.data import DataError, MotionDataConfig, MotionWorld, SampleKey
from permafrost.data.build import train_set, val_set
from permafrost.data.video.reader import open_video
from permafrost.data.worlds import motion_files
from permafrost.data.worlds.files import WorldFiles
from permafrost.data.worlds.motion import APPEARANCE, CLASSES, ORDER_PAIRS, render_clip
from permafrost.data.worlds.motion_files import MOTION

TINY = MotionWorld(num_train=10, num_val=10, side=64, num_frames=8)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    return MOTION.ensure(TINY, tmp_path_factory.mktemp("motion") / "world")


def test_a_video_is_the_same_whatever_the_memory_held_before(tmp_path) -> None:
    frames, rng, seen, litter = render_clip(TINY, "val", 0), np.random.default_rng(0), set(), []
    for number in range(60):
        litter = [*litter[-5:], rng.integers(0, 255, rng.integers(1_000, 200_000), dtype=np.uint8)]
        motion_files.write_video(tmp_path / f"{number}.mp4", frames, TINY.rate)
        seen.add((tmp_path / f"{number}.mp4").read_bytes())
    assert len(seen) == 1


@pytest.mark.parametrize("pair", ORDER_PAIRS)
def test_an_order_pair_has_the_same_frames_backwards(pair) -> None:
    first, second = (render_clip(TINY, "train", 3, CLASSES.index(name)) for name in pair)
    assert np.array_equal(first, second[::-1])
    assert np.abs(first.astype(int) - second).mean() > 1


@pytest.mark.parametrize("index", range(6))
def test_before_and_behind_differ_only_where_they_cross(index) -> None:
    before, behind = (render_clip(TINY, "val", index, CLASSES.index(f"passes_{way}")) for way in ("before", "behind"))
    differs = (before != behind).any(axis=(1, 2, 3))
    assert differs.any()
    assert not differs.all()


def test_what_appearance_gives_away_differs_in_every_frame() -> None:
    one, other = (render_clip(TINY, "train", 5, CLASSES.index(name)) for name in APPEARANCE)
    assert (one != other).any(axis=(1, 2, 3)).all()


def test_a_clip_depends_on_its_index_only_and_splits_share_none() -> None:
    longer = dataclasses.replace(TINY, num_train=1000)
    assert np.array_equal(render_clip(TINY, "train", 7), render_clip(longer, "train", 7))
    assert not np.array_equal(render_clip(TINY, "train", 7), render_clip(TINY, "val", 7))


def test_files_hold_what_was_drawn(tiny_folder) -> None:
    video = open_video(tiny_folder / "train" / "00002.mp4")
    assert video.num_frames == TINY.num_frames
    assert video.rate == pytest.approx(TINY.rate)
    decoded = video.frames(range(TINY.num_frames))
    drawn = render_clip(TINY, "train", 2)
    assert decoded.shape == drawn.shape
    # H.264 with halved colour planes: close, not equal.
    assert np.abs(decoded.astype(int) - drawn).mean() < 6
    header = (tiny_folder / "train" / "00002.mp4").read_bytes()
    assert header[4:8] == b"ftyp"
    assert b"avc1" in header


def test_equal_parameters_give_equal_bytes_however_many_processes(tiny_folder, tmp_path) -> None:
    MOTION.write(TINY, tmp_path, num_processes=2)

    def digests(folder) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    assert digests(tmp_path) == digests(tiny_folder)
    assert len(digests(tmp_path)) == 24


def test_it_is_rendered_once_and_read_like_kinetics(tiny_folder, monkeypatch) -> None:
    monkeypatch.setattr(WorldFiles, "write", lambda *_: pytest.fail("rendered again"))
    config = MotionDataConfig(root=str(tiny_folder), world=TINY)
    train, val = train_set(config), val_set(config)
    assert train.classes == list(CLASSES) == val.classes
    assert [int(val[SampleKey(0, 0, i)].target.label) for i in range(10)] == list(range(10))
    train.decoder.close(), val.decoder.close()
    with pytest.raises(DataError, match="world of other parameters"):
        train_set(MotionDataConfig(root=str(tiny_folder), world=dataclasses.replace(TINY, seed=1)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"side": 47}, "side is 47: give an even number"),
        ({"num_train": 0}, "num_train is 0"),
        ({"num_frames": 2}, "2 frames at 12 a second"),
        ({"object_size": (0.5, 0.2)}, "object_size"),
        ({"noise": 2.0}, "noise is 2.0"),
        ({"seed": -1}, "cannot be negative"),
    ],
)
def test_impossible_worlds_are_refused(fields, message) -> None:
    with pytest.raises(DataError, match=message):
        MotionWorld(**fields)
