"""Kinetics' layouts and clips: the three lists, missing and broken files, flips, views, and independence of workers."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from permafrost.data.task import TaskDataset

sys.path.insert(0, str(Path(__file__).parent))
import video_files

from permafrost.data import ClipConfig, DataError, GlobalStream, KineticsDataConfig, SampleKey, train_loader, val_loader
from permafrost.data.build import train_set, val_set
from permafrost.data.video.transforms import random_crop

CLASSES = ("jump", "run left", "run right")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """One real video, to be copied."""
    return video_files.write_numbered(tmp_path_factory.mktemp("plain") / "v.mp4", 30)


@pytest.fixture
def make_root(tmp_path, plain) -> Callable[..., Path]:
    """A function: a data set of the layout `list` with copies of one video; both splits have 6 videos of 3 classes."""

    def make(num_videos=6) -> Path:
        for split in ("train", "val"):
            (tmp_path / split).mkdir()
            for index in range(num_videos):
                shutil.copy(plain, tmp_path / split / f"{index}.mp4")
            lines = "".join(f"{index}.mp4 {index % 3}\n" for index in range(num_videos))
            (tmp_path / f"{split}.txt").write_text(lines)
        (tmp_path / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        return tmp_path

    return make


def config_of(root, *, clip=None, **fields) -> KineticsDataConfig:
    small = {
        "num_frames": 4,
        "frame_stride": 2,
        "crop_size": 32,
        "test_short_side": 32,
        "test_clips": 2,
        "test_crops": 3,
    }
    return KineticsDataConfig(
        root=str(root), class_names="classes.txt", clip=ClipConfig(**{**small, **(clip or {})}), **fields
    )


def numbers(config, split) -> tuple[TaskDataset, list[tuple[str, int]]]:
    dataset = train_set(config) if split == "train" else val_set(config)
    return dataset, [dataset.records[index] for index in range(len(dataset.records))]


def test_the_three_layouts_list_the_same_videos(make_root, tmp_path) -> None:
    root = make_root()
    listed, _ = numbers(config_of(root), "val")

    folders = tmp_path / "folders"
    table = tmp_path / "table"
    rows = {"train": [], "val": []}
    for split in ("train", "val"):
        for index in range(6):
            name = CLASSES[index % 3]
            (folders / split / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(root / split / f"{index}.mp4", folders / split / name / f"{index}.mp4")
            # Downloaders put videos into one folder, into one per class, or into one per class without blanks.
            place = table / split / ("", name, name.replace(" ", "_"))[index // 2]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / split / f"{index}.mp4", place / f"id_{index}-x_{index:06d}_{index + 10:06d}.mp4")
            rows[split].append(f"{name},id_{index}-x,{index},{index + 10},{split}")
        (table / f"{split}.csv").write_text(
            "\n".join(["label,youtube_id,time_start,time_end,split", *rows[split]]) + "\n"
        )
    by_folder, records = numbers(KineticsDataConfig(root=str(folders), layout="folders", clip=ClipConfig()), "val")
    assert by_folder.classes == listed.classes == list(CLASSES)
    assert sorted(label for _, label in records) == [0, 0, 1, 1, 2, 2]
    by_table, records = numbers(
        KineticsDataConfig(root=str(table), layout="csv", train_list="train.csv", val_list="val.csv"), "val"
    )
    assert by_table.classes == list(CLASSES)
    assert [label for _, label in records] == [0, 1, 2, 0, 1, 2]
    assert by_table.num_missing == 0


def test_clips_are_pure_functions_of_their_keys(make_root) -> None:
    config = config_of(make_root())
    one, other = train_set(config), train_set(config)
    for key in (SampleKey(0, 0, 3), SampleKey(0, 1, 3), SampleKey(7, 0, 5)):
        first = one[key]
        other[SampleKey(1, 1, 1)]
        torch.manual_seed(0)
        second = other[key]
        assert torch.equal(first.image, second.image)
        assert first.image.shape == (4, 3, 32, 32)
        assert first.image.dtype == torch.uint8
    assert not torch.equal(one[SampleKey(0, 0, 3)].image, one[SampleKey(0, 1, 3)].image)


def test_batches_do_not_depend_on_workers(make_root) -> None:
    dataset = train_set(config_of(make_root()))
    found = []
    for workers in (0, 2):
        loader = train_loader(dataset, GlobalStream(6, 3), global_batch=3, num_steps=4, num_workers=workers, timeout=60)
        found.append([(batch.images, [int(t.label) for t in batch.targets]) for batch in loader])
        assert found[-1][0][0].shape == (3, 4, 3, 32, 32)
    for (images, labels), (same, again) in zip(*found):
        assert torch.equal(images, same)
        assert labels == again


def test_flips_swap_directions_and_spare_classes(make_root) -> None:
    root = make_root()
    always = {"flip": 1.0, "crop_scale": (1.0, 1.0)}
    options = {
        "never": config_of(root, clip={**always, "flip": 0.0}),
        "plain": config_of(root, clip=always),
        "aware": config_of(root, clip={**always, "flip_swaps": (("run left", "run right"),), "never_flip": ("jump",)}),
    }
    clips = {name: train_set(config) for name, config in options.items()}
    for index in range(3):
        key = SampleKey(0, 0, index)
        straight, flipped, aware = (clips[name][key] for name in options)
        assert torch.equal(flipped.image, straight.image.flip(-1))
        assert int(flipped.target.label) == index
        if index == 0:
            assert torch.equal(aware.image, straight.image)
            assert int(aware.target.label) == 0
        else:
            assert torch.equal(aware.image, flipped.image)
            assert int(aware.target.label) == 3 - index
    with pytest.raises(DataError, match="names hop, but the classes are jump, run left"):
        train_set(config_of(root, clip={"never_flip": ("hop",)}))


def test_every_view_of_every_video_comes_once(make_root) -> None:
    dataset = val_set(config_of(make_root(), clip={"test_short_side": 40}))
    assert len(dataset) == 6 * 2 * 3
    seen = []
    for batch in val_loader(dataset, batch_size=3):
        seen += [(target.video_id, target.view) for target in batch.targets]
    assert seen == [(video, view) for video in range(6) for view in range(6)]
    views = [dataset[SampleKey(0, 0, view)].image for view in range(6)]
    # 64 x 96 resized to 40 x 60: squares of 32 at columns 0, 14 and 28 overlap.
    assert torch.equal(views[0][..., 14:], views[1][..., :18])
    assert not torch.equal(views[0], views[3])


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.6)])
def test_random_crops_have_the_stated_shares_of_area_and_ratios(scale) -> None:
    height, width, side = 120, 160, 32
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    clip = torch.stack([columns, rows, rows]).to(torch.uint8).expand(2, -1, -1, -1)
    areas, lefts = [], []
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        crop = random_crop(clip, side, generator, scale).float()
        assert torch.equal(crop[0], crop[1])
        # A ramp of n pixels resized to 32 goes from its first pixel's cell to its last one's: (n - n / 32) apart.
        crop_width, crop_height = (
            (crop[0, channel].amax() - crop[0, channel].amin()).item() * side / (side - 1) for channel in (0, 1)
        )
        areas.append(crop_width * crop_height / (height * width))
        lefts.append(crop[0, 0].mean().item() / (width - 1))
        assert 3 / 4 * 0.85 < crop_width / crop_height < 4 / 3 * 1.15
        # However many tries it takes, what is drawn afterwards does not shift.
        other = torch.Generator().manual_seed(seed)
        random_crop(clip[..., :20], side, other, (1.0, 1.0))
        assert torch.rand((), generator=generator) == torch.rand((), generator=other)
    assert min(areas) > scale[0] * 0.85
    assert max(areas) < scale[1] * 1.1
    # Independently: torchvision's draws, which also try again where a part does not fit.
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(clip, list(scale), [3 / 4, 4 / 3]) for _ in range(400)]
    expected = sum(part_height * part_width for _, _, part_height, part_width in theirs) / (400 * height * width)
    assert sum(areas) / 400 == pytest.approx(expected, rel=0.1)
    assert sum(lefts) / 400 == pytest.approx(0.5, abs=0.03)


def test_segment_sampling_covers_the_video(make_root) -> None:
    dataset = val_set(config_of(make_root(), clip={"sampling": "segment", "test_clips": 1, "test_crops": 1}))
    clip = dataset[SampleKey(0, 0, 0)].image
    assert len({frame.numpy().tobytes() for frame in clip}) == 4


def test_missing_videos_are_counted_and_tolerated_up_to_a_share(make_root) -> None:
    root = make_root()
    (root / "val" / "4.mp4").unlink()
    with pytest.raises(
        DataError, match=r"1 of 6 videos are not in .*10\.0% are tolerated \(data\.missing_share\)[^+]*4\.mp4"
    ):
        val_set(config_of(root))
    dataset = val_set(config_of(root, missing_share=0.2))
    assert len(dataset.records) == 5
    assert dataset.notes == ["1 of 6 validation videos are missing, the first: 4.mp4"]
    evaluator = dataset.evaluator()
    assert (evaluator.num_missing, len(evaluator.labels)) == (1, 5)
    full = train_set(config_of(root))
    assert full.notes == []


def test_a_broken_video_is_replaced_in_training_and_counted_in_evaluation(make_root) -> None:
    root = make_root()
    for split in ("train", "val"):
        (root / split / "2.mp4").write_bytes(b"broken")
    train, val = train_set(config_of(root)), val_set(config_of(root))
    sample = train[SampleKey(0, 0, 2)]
    assert sample.target.video_id == 3
    ((path, reason),) = sample.replaced
    assert path.endswith("train/2.mp4")
    assert "cannot be opened" in reason
    tracker = train.tracker()
    assert tracker.update(sample.replaced) == sample.replaced
    sample = val[SampleKey(0, 0, 2 * 6 + 1)]
    assert (sample.target.video_id, sample.target.view, sample.target.is_readable) == (2, 1, False)
    assert not sample.image.any()
    assert sample.replaced[0][0].endswith("val/2.mp4")
    for index in range(6):
        (root / "train" / f"{index}.mp4").write_bytes(b"broken")
    with pytest.raises(DataError, match="and none of the 5 videos after it can be decoded"):
        train[SampleKey(0, 0, 2)]
    tracker.limit = 0
    with pytest.raises(DataError, match="2 of 6 training videos cannot be read, 0 are tolerated"):
        tracker.update(sample.replaced)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "train.txt").write_text(""), "it lists no video"),
        (lambda root: (root / "train.txt").unlink(), "there is no such list"),
        (lambda root: (root / "train.txt").write_text("0.mp4 3\n"), "label 3, outside of the 3 classes 0..2"),
        (lambda root: (root / "train.txt").write_text("0.mp4 -1\n"), "label -1, outside of the 3 classes"),
        (lambda root: (root / "train.txt").write_text("0.mp4 0\n1.mp4\n"), "line 2 is '1.mp4': `path label`"),
        (lambda root: (root / "classes.txt").write_text("a\na\n"), "names a class twice"),
        (lambda root: (root / "classes.txt").unlink(), "cannot be read"),
        (lambda root: shutil.rmtree(root / "train"), "there is no such folder of videos"),
        (lambda root: shutil.rmtree(root), "there is no such folder; data.layout 'list' reads"),
    ],
)
def test_bad_lists_are_named(make_root, break_it, message) -> None:
    root = make_root()
    break_it(root)
    with pytest.raises(DataError, match=message):
        train_set(config_of(root))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,youtube_id,time_start\na,x,1\n", "no column time_end"),
        ("label,youtube_id,time_start,time_end\na,x,now,2\n", "times 'now' and '2'"),
        ("label,youtube_id,time_start,time_end\na,x\n", "line 2 has fewer columns"),
        ("label,youtube_id,time_start,time_end\n", "it lists no video"),
    ],
)
def test_bad_tables_are_named(tmp_path, text, message) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train.csv").write_text(text)
    config = KineticsDataConfig(root=str(tmp_path), layout="csv", train_list="train.csv")
    with pytest.raises(DataError, match=message):
        train_set(config)


def test_a_class_of_the_validation_table_alone_is_refused(tmp_path) -> None:
    for split, name in (("train", "a"), ("val", "b")):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}.csv").write_text(f"label,youtube_id,time_start,time_end\n{name},x,0,10\n")
    config = KineticsDataConfig(root=str(tmp_path), layout="csv", train_list="train.csv", val_list="val.csv")
    with pytest.raises(DataError, match=r"val.csv: line 2 has the class 'b', which the training file does not have"):
        val_set(config)


def test_a_class_of_the_validation_split_alone_is_refused(tmp_path, plain) -> None:
    for place in ("train/a", "train/b", "val/c"):
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(plain, tmp_path / place / "v.mp4")
    config = KineticsDataConfig(root=str(tmp_path), layout="folders")
    with pytest.raises(DataError, match=r"val/c: the training split in .* has no such class"):
        val_set(config)
    shutil.rmtree(tmp_path / "train" / "b")
    with pytest.raises(DataError, match="all videos are of one class"):
        train_set(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClipConfig(num_frames=0), "clip.num_frames is 0"),
        (lambda: ClipConfig(test_short_side=200), "test_short_side is 200: it must not be below crop_size 224"),
        (lambda: ClipConfig(crop_scale=(0.0, 1.0)), "crop_scale"),
        (lambda: ClipConfig(flip_swaps=(("a", "b"), ("b", "c"))), "each class once"),
        (lambda: ClipConfig(flip_swaps=(("a", "b"),), never_flip=("a",)), "has a both in flip_swaps and in never_flip"),
        (lambda: KineticsDataConfig(missing_share=2.0), "missing_share is 2.0"),
        (lambda: KineticsDataConfig(decode_timeout=0.0), "decode_timeout is 0.0"),
        (lambda: KineticsDataConfig(num_classes=1), "num_classes is 1"),
    ],
)
def test_impossible_fields_are_named(make, message) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_160_damaged_videos_hold_no_run_and_are_all_reported(make_root, plain, monkeypatch) -> None:
    """Truncated, bit-flipped, zeroed and damaged headers, and two that never return, among good ones, through two workers."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    root = make_root(num_videos=3)
    content = plain.read_bytes()
    lines = []
    for split in ("train", "val"):
        lines = [f"{index}.mp4 {index % 3}" for index in range(3)]
        for kind in ("truncated", "flipped", "zeroed", "header"):
            for seed in range(40):
                (root / split / f"{kind}{seed}.mp4").write_bytes(video_files.damaged(content, kind, seed))
                lines.append(f"{kind}{seed}.mp4 {seed % 3}")
        for index in range(2):
            shutil.copy(plain, root / split / f"stuck{index}.mp4")
            lines.append(f"stuck{index}.mp4 0")
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    config = config_of(root, clip={"test_clips": 1, "test_crops": 1}, corrupt_share=1.0, decode_timeout=3.0)
    val = val_set(config)
    val.decoder._options["reader"] = "stuck_reader:open_video"
    longest, last, unreadable, readable = 0.0, time.monotonic(), {}, set()
    for batch in val_loader(val, batch_size=5, num_workers=2, timeout=30):
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
        reasons = {Path(path).name: reason for path, reason in batch.replaced}
        unreadable |= reasons
        for target in batch.targets:
            name = val.video_path(target.video_id).name
            assert target.is_readable == (name not in reasons)
            readable |= {name} if target.is_readable else set()
    assert longest < 30
    assert len(readable) + len(unreadable) == 165
    assert {"0.mp4", "1.mp4", "2.mp4"} <= readable
    assert {"stuck0.mp4", "stuck1.mp4"} <= set(unreadable)
    # What a decoder does not notice it decodes: flipped bits in the pictures. Missing ends and headers it notices.
    assert sum(name.startswith(("truncated", "header")) for name in unreadable) == 80
    assert all(reason for reason in unreadable.values())

    # A whole epoch of training through two workers, with a good video after each: all of them are replaced, by a good one.
    damaged = [line for line in lines if not line.startswith(("0.", "1.", "2."))]
    certain = {line.split()[0] for line in damaged if line.startswith(("truncated", "header", "stuck"))}
    assert len(certain) == 82
    (root / "train.txt").write_text("".join(f"{line}\n0.mp4 0\n" for line in damaged))
    train = train_set(config)
    train.decoder._options["reader"] = "stuck_reader:open_video"
    longest, last, replaced, seen = 0.0, time.monotonic(), {}, 0
    stream = GlobalStream(2 * 162, 3)
    for batch in train_loader(train, stream, global_batch=4, num_steps=81, num_workers=2, timeout=30):
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
        replaced |= {Path(path).name: reason for path, reason in batch.replaced}
        seen += len(batch.targets)
        assert not {train.video_path(target.video_id).name for target in batch.targets} & certain
    assert longest < 30
    assert seen == 2 * 162
    assert certain <= set(replaced)
    assert "0.mp4" not in replaced
    train.decoder.close(), val.decoder.close()


def test_a_video_shorter_than_the_window_is_looped(make_root) -> None:
    root = make_root()
    # The video has 30 frames.
    for num_frames, stride in ((31, 1), (16, 2)):
        dataset = val_set(config_of(root, clip={"num_frames": num_frames, "frame_stride": stride, "test_clips": 1}))
        clip = dataset[SampleKey(0, 0, 0)].image
        assert torch.equal(clip[-1], clip[0])
        assert len({frame.numpy().tobytes() for frame in clip}) == num_frames - 1
        dataset.decoder.close()


def test_a_stuck_video_is_waited_for_once_and_not_in_each_of_its_views(make_root, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    root = make_root()
    (root / "val" / "2.mp4").rename(root / "val" / "stuck.mp4")
    (root / "val.txt").write_text((root / "val.txt").read_text().replace("2.mp4", "stuck.mp4"))
    val = val_set(config_of(root, clip={"test_clips": 4}, decode_timeout=3.0))
    val.decoder._options["reader"] = "stuck_reader:open_video"
    val[SampleKey(0, 0, 0)]
    start = time.monotonic()
    views = [val[SampleKey(0, 0, view)] for view in range(2 * 12, 3 * 12)]
    assert time.monotonic() - start < 2 * 3.0
    assert not any(view.target.is_readable for view in views)
    assert all("not done after 3 s" in view.replaced[0][1] for view in views)
    # The next one is readable, and this one is tried again in the next evaluation.
    assert val[SampleKey(0, 0, 3 * 12)].target.is_readable
    val.decoder._options["reader"] = "permafrost.data.video.reader:open_video"
    assert val[SampleKey(0, 0, 2 * 12)].target.is_readable
    val.decoder.close()


def test_the_corrupt_share_reaches_the_tracker(make_root) -> None:
    config = dataclasses.replace(config_of(make_root()), corrupt_share=0.5)
    assert train_set(config).tracker().limit == 10
