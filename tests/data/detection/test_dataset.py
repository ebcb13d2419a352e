"""Reading COCO folders: what comes out of a good one, and what is said about a bad one."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from permafrost.data.build import check_data, train_set, val_set
from permafrost.data.detection.check import check_coco
from permafrost.data.detection.dataset import inference_sample
from permafrost.data.errors import DataError
from permafrost.data.types import SampleKey


def test_labels_are_contiguous_by_category_id(hand_made) -> None:
    dataset = val_set(hand_made.config())
    assert dataset.classes == ["apple", "fig", "pear"]
    assert dataset.category_ids == [5, 9, 70]
    labels = {entry["id"]: entry["category_id"] for entry in hand_made.content["val"]["annotations"]}
    for index, image_id in enumerate([3, 7, 12, 21, 33, 40]):
        target = dataset[SampleKey(0, 0, index)].target
        assert target.image_id == image_id
        expected = [
            labels[entry["id"]]
            for entry in hand_made.content["val"]["annotations"]
            if entry["image_id"] == image_id and not entry["iscrowd"]
        ]
        assert [dataset.category_ids[label] for label in target.labels] == expected


def test_an_unscaled_sample_equals_the_file(hand_made) -> None:
    """64 pixels fit the 64 x 48 image as it is: pixels, boxes, masks and the crowd must come through untouched."""
    dataset = val_set(hand_made.config())
    index = sorted([12, 3, 40, 7, 21, 33]).index(21)
    sample = dataset[SampleKey(0, 0, index)]
    stored = np.asarray(Image.open(dataset.image_path(index)))
    assert np.array_equal(sample.image[:, :48, :64].permute(1, 2, 0).numpy(), stored)
    assert sample.image[:, 48:].unique(dim=1).shape == (3, 1, 64)
    assert sample.target.size == sample.target.original_size == (48, 64)
    boxes = [e["bbox"] for e in hand_made.content["val"]["annotations"] if e["image_id"] == 21]
    assert sample.target.boxes.tolist() == [[x, y, x + w, y + h] for x, y, w, h in boxes]
    for mask, (x, y, w, h) in zip(sample.target.masks, boxes):
        expected = torch.zeros(64, 64, dtype=torch.bool)
        expected[y : y + h, x : x + w] = True
        assert torch.equal(mask, expected)


def test_run_lengths_and_crowds(hand_made) -> None:
    dataset = val_set(hand_made.config(image_size=40))
    index = sorted([12, 3, 40, 7, 21, 33]).index(12)
    target = dataset[SampleKey(0, 0, index)].target
    assert target.original_size == (30, 40)
    assert target.boxes[-1].tolist() == [25, 20, 39, 28]
    assert target.masks[-1].sum() == 14 * 8
    assert len(target.labels) == 2
    assert target.ignore_boxes.tolist() == [[0, 0, 1, 5]]


def test_empty_images_are_left_out_of_training_only(hand_made) -> None:
    for split in ("train", "val"):
        content = hand_made.content[split]
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 7]
    config = hand_made.write()
    train, val = train_set(config), val_set(config)
    assert (len(train), len(val)) == (5, 6)
    assert any("1 of 6 images" in note for note in train.notes)
    assert val.notes == []
    assert len(train_set(hand_made.config(train_empty_images=True))) == 6
    target = val[SampleKey(0, 0, 1)].target
    assert target.image_id == 7
    assert target.boxes.shape == (0, 4)
    assert target.masks.shape == (0, 64, 64)


def test_max_val_images_takes_the_first_by_id(hand_made) -> None:
    dataset = val_set(hand_made.config(max_val_images=2))
    assert [record["id"] for record in dataset.records] == [3, 7]
    assert set(dataset.evaluator().records) == {3, 7}


def test_fingerprint_follows_the_annotations(hand_made) -> None:
    first = train_set(hand_made.config()).fingerprint
    assert first == train_set(hand_made.config()).fingerprint
    assert first != val_set(hand_made.config()).fingerprint
    hand_made.content["train"]["annotations"][0]["bbox"][0] += 0.5
    assert train_set(hand_made.write()).fingerprint != first
    whole, part = val_set(hand_made.config()), val_set(hand_made.config(max_val_images=2))
    assert whole.fingerprint != part.fingerprint


def test_inference_sample_fits_the_image(hand_made) -> None:
    sample = inference_sample(hand_made.image("val", "val_021.jpg"), 32, image_id=4)
    assert sample.image.shape == (3, 32, 32)
    assert (sample.target.size, sample.target.original_size) == ((24, 32), (48, 64))
    with pytest.raises(DataError, match=r"nowhere\.jpg: there is no such file"):
        inference_sample(hand_made.image("val", "nowhere.jpg"), 32)


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_missing_root_says_the_layout(tmp_path) -> None:
    from permafrost.data.detection.config import CocoDataConfig

    config = CocoDataConfig(root=str(tmp_path / "nothing"))
    with pytest.raises(DataError) as error:
        train_set(config)
    for part in (str(tmp_path / "nothing"), "annotations/instances_train2017.json", "train2017/*.jpg", "val2017/*.jpg"):
        assert part in str(error.value)


def test_missing_annotations_and_folder_are_named(hand_made) -> None:
    shutil.move(hand_made.root / "train2017", hand_made.root / "elsewhere")
    with pytest.raises(DataError, match="train2017: there is no such folder of images; expected COCO's layout"):
        train_set(hand_made.config())
    assert len(train_set(hand_made.config(train_images="elsewhere"))) == 6
    hand_made.json("val").unlink()
    with pytest.raises(DataError, match=r"instances_val2017\.json: there is no such annotation file"):
        val_set(hand_made.config())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"images": [', "not valid JSON"),
        ("[]", "the JSON is a list"),
        ("{}", "images is missing"),
        ('{"images": [], "annotations": {}, "categories": []}', "annotations is a dict"),
        ('{"images": [1], "annotations": [], "categories": []}', r"images\[0\] is a int"),
        ('{"images": [], "annotations": [], "categories": []}', "images: the list is empty"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_malformed_json_names_the_file(hand_made, text, message) -> None:
    hand_made.json("train").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        train_set(hand_made.config())
    assert str(hand_made.json("train")) in str(error.value)
    assert any(finding.fatal for finding in check_coco(hand_made.config()))


def test_binary_json_is_refused(hand_made) -> None:
    hand_made.json("train").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="not valid JSON"):
        train_set(hand_made.config())


def _set(entries: str, position: int, **values: Any) -> Callable[[dict], None]:
    return lambda content: content[entries][position].update(values)


def _remove(entries: str, position: int, name: str) -> Callable[[dict], None]:
    return lambda content: content[entries][position].pop(name)


# Annotation 0 belongs to the image of 40 x 30; "counts" of that size sum to 1200.
SINGLE = {
    "nan box": (_set("annotations", 0, bbox=[float("nan"), 1, 5, 5]), "annotations[0].bbox", "not finite"),
    "negative box": (_set("annotations", 0, bbox=[3, 3, -2, 5]), "annotations[0].bbox", "degenerate"),
    "flat box": (_set("annotations", 0, bbox=[3, 3, 5, 0.0]), "annotations[0].bbox", "degenerate"),
    "box too far right": (
        _set("annotations", 0, bbox=[30, 3, 15, 5]),
        "annotations[0].bbox",
        "out of the image of 40 x 30",
    ),
    "box above": (_set("annotations", 0, bbox=[3, -9, 5, 5]), "annotations[0].bbox", "out of the image"),
    "box at the edge": (_set("annotations", 0, bbox=[40.5, 3, 1, 5]), "annotations[0].bbox", "no part in the image"),
    "three numbers": (_set("annotations", 0, bbox=[3, 3, 5]), "annotations[0].bbox", "is not [x, y, width, height]"),
    "box of words": (
        _set("annotations", 0, bbox=["a", 3, 5, 5]),
        "annotations[0].bbox",
        "is not [x, y, width, height]",
    ),
    "no box": (_remove("annotations", 0, "bbox"), "annotations[0].bbox", "None is not"),
    "two points": (_set("annotations", 0, segmentation=[[1, 1, 5, 5]]), "annotations[0].segmentation", "3 points"),
    "odd polygon": (
        _set("annotations", 0, segmentation=[[1, 1, 5, 5, 3, 9, 4]]),
        "annotations[0].segmentation",
        "3 points",
    ),
    "nan polygon": (
        _set("annotations", 0, segmentation=[[1, 1, 5, float("nan"), 3, 9]]),
        "annotations[0].segmentation",
        "not finite",
    ),
    "far polygon": (
        _set("annotations", 0, segmentation=[[1, 1, 5e9, 5, 3, 9]]),
        "annotations[0].segmentation",
        "out of the image",
    ),
    "no polygons": (_set("annotations", 0, segmentation=[]), "annotations[0].segmentation", "is empty"),
    "no segmentation": (_remove("annotations", 0, "segmentation"), "annotations[0].segmentation", "None is neither"),
    "other size": (
        _set("annotations", 0, segmentation={"counts": [1200], "size": [40, 30]}),
        "annotations[0].segmentation",
        "is 30 x 40, the image 40 x 30",
    ),
    "short runs": (
        _set("annotations", 0, segmentation={"counts": [100, 10], "size": [30, 40]}),
        "annotations[0].segmentation",
        "add up to 110 pixels",
    ),
    "long runs": (
        _set("annotations", 0, segmentation={"counts": [1100, 1000], "size": [30, 40]}),
        "annotations[0].segmentation",
        "add up to 2100 pixels",
    ),
    "negative runs": (
        _set("annotations", 0, segmentation={"counts": [1300, -100], "size": [30, 40]}),
        "annotations[0].segmentation",
        "negative run",
    ),
    "foreign text": (
        _set("annotations", 0, segmentation={"counts": "ab{}", "size": [30, 40]}),
        "annotations[0].segmentation",
        "outside the code",
    ),
    "nan area": (_set("annotations", 0, area=float("nan")), "annotations[0].area", "is not an area"),
}
WHOLE = {
    "unknown image": (_set("annotations", 2, image_id=999), "annotations[2].image_id", "999 is not among the images"),
    "unknown category": (_set("annotations", 2, category_id=6), "annotations[2].category_id", "6 is not among"),
    "double annotation": (_set("annotations", 2, id=1), "annotations[2].id", "1 is also the id of annotations[0]"),
    "text as id": (_set("annotations", 2, id="7"), "annotations[2].id", "'7' is not an integer"),
    "odd crowd": (_set("annotations", 2, iscrowd="yes"), "annotations[2].iscrowd", "neither 0 nor 1"),
    "double image": (_set("images", 1, id=12), "images[1].id", "12 is the id of an image before it"),
    "no file name": (_remove("images", 1, "file_name"), "images[1].file_name", "None is not a file name"),
    "no width": (_remove("images", 1, "width"), "images[1]", "must be integers"),
    "bomb": (_set("images", 1, width=40_000, height=40_000), "images[1]", "over the limit"),
    "strip": (_set("images", 1, width=1, height=65_535), "images[1]", "strip"),
    "double category": (_set("categories", 1, id=70), "categories[1].id", "70 is also the id of categories[0]"),
    "double class": (_set("categories", 1, name="pear"), "categories[1].name", "'pear' is also the name"),
    "no class name": (_remove("categories", 1, "name"), "categories[1].name", "None is not a name"),
}


@pytest.mark.parametrize("case", [*SINGLE, *WHOLE])
def test_bad_entries_are_refused_with_file_and_path(hand_made, case) -> None:
    change, where, what = {**SINGLE, **WHOLE}[case]
    change(hand_made.content["train"])
    config = hand_made.write()
    before = hand_made.json().read_bytes()
    with pytest.raises(DataError) as error:
        train_set(config)
    assert f"{hand_made.json()}: {where}: " in str(error.value)
    assert what in str(error.value)
    found = [finding for finding in check_coco(config, decode=False) if where in finding.path]
    assert len(found) == 1
    assert found[0].fatal
    assert what in found[0].what
    val_set(config)
    assert hand_made.json().read_bytes() == before


@pytest.mark.parametrize("case", SINGLE)
def test_single_bad_annotations_can_be_left_out(hand_made, case) -> None:
    change, where, _ = SINGLE[case]
    change(hand_made.content["train"])
    hand_made.write()
    config = hand_made.config(bad_annotations="drop")
    dataset = train_set(config)
    assert len(dataset.notes) == 1
    assert "1 annotations are left out" in dataset.notes[0]
    assert where in dataset.notes[0]
    entries = [entry for record in dataset.records for entry in record["annotations"]]
    assert len(entries) == len(hand_made.content["train"]["annotations"]) - 1
    assert not any(finding.fatal for finding in check_coco(config))
    for index in range(len(dataset)):
        assert torch.isfinite(dataset[SampleKey(0, 0, index)].target.boxes).all()


@pytest.mark.parametrize("case", WHOLE)
def test_broken_files_are_refused_under_drop_too(hand_made, case) -> None:
    change, where, _ = WHOLE[case]
    change(hand_made.content["train"])
    hand_made.write()
    with pytest.raises(DataError) as error:
        train_set(hand_made.config(bad_annotations="drop"))
    assert where in str(error.value)


def test_many_problems_are_counted(hand_made) -> None:
    for entry in hand_made.content["train"]["annotations"]:
        entry["bbox"][2] = 0
    count = len(hand_made.content["train"]["annotations"])
    with pytest.raises(DataError, match=rf"{count} problems in the data:") as error:
        train_set(hand_made.write())
    assert "annotations[0].bbox" in str(error.value)
    assert f"and {count - 8} more" in str(error.value)
    assert "data.bad_annotations drop" in str(error.value)


def test_small_overhang_is_rounding(hand_made) -> None:
    hand_made.content["train"]["annotations"][0]["bbox"] = [-0.4, 3, 41.5, 5]
    assert len(train_set(hand_made.write())) == 6


def test_annotation_id_0_is_told_but_harmless(hand_made) -> None:
    hand_made.content["val"]["annotations"][0]["id"] = 0
    config = hand_made.write()
    findings = [finding for finding in check_coco(config) if finding.path.endswith("annotations[0].id")]
    assert [finding.fatal for finding in findings] == [False]
    val_set(config)


def test_nothing_to_learn_is_refused(hand_made) -> None:
    hand_made.content["train"]["annotations"] = []
    with pytest.raises(DataError, match="not one object"):
        train_set(hand_made.write())


def test_missing_image_files_are_refused_at_once(hand_made) -> None:
    hand_made.image("train", "train_040.jpg").unlink()
    for finding in (check_coco(hand_made.config(), decode=False), check_coco(hand_made.config())):
        assert [(one.path.endswith("train_040.jpg"), one.fatal) for one in finding] == [(True, True)]
    with pytest.raises(DataError, match=r"train2017/train_040\.jpg: there is no such image file"):
        train_set(hand_made.config())


def test_file_names_may_hold_folders(hand_made) -> None:
    (hand_made.root / "train2017" / "sub").mkdir()
    name = hand_made.content["train"]["images"][0]["file_name"]
    shutil.move(hand_made.image("train", name), hand_made.image("train", f"sub/{name}"))
    hand_made.content["train"]["images"][0]["file_name"] = f"sub/{name}"
    dataset = train_set(hand_made.write())
    assert dataset[SampleKey(0, 0, 2)].replaced == []
    assert check_coco(hand_made.config()) == []


def _damage(path) -> dict[str, str]:
    whole = path.read_bytes()
    return {"truncated": whole[: len(whole) // 2], "empty": b"", "page": b"<html>404</html>"}


@pytest.mark.parametrize("kind", ["truncated", "empty", "page"])
def test_corrupt_training_image_is_replaced_by_the_next(hand_made, kind) -> None:
    clean = train_set(hand_made.config())
    path = clean.image_path(2)
    neighbour = clean[SampleKey(5, 1, 3)]
    path.write_bytes(_damage(path)[kind])
    damaged = path.read_bytes()
    dataset = train_set(hand_made.config())
    sample = dataset[SampleKey(5, 1, 2)]
    assert sample.target.image_id == neighbour.target.image_id
    assert [name for name, _ in sample.replaced] == [str(path)]
    assert sample.key == SampleKey(5, 1, 2)
    again = train_set(hand_made.config())[SampleKey(5, 1, 2)]
    assert torch.equal(sample.image, again.image)
    assert sample.replaced == again.replaced
    assert path.read_bytes() == damaged
    assert dataset[SampleKey(5, 1, 3)].replaced == []
    findings = check_coco(hand_made.config())
    assert [(finding.path, finding.fatal) for finding in findings] == [(str(path), False)]
    assert findings[0].what == sample.replaced[0][1]


def test_replacement_wraps_around_and_gives_up_when_nothing_is_readable(hand_made) -> None:
    dataset = train_set(hand_made.config())
    for index in (4, 5):
        dataset.image_path(index).write_bytes(b"")
    sample = dataset[SampleKey(0, 0, 4)]
    assert sample.target.image_id == 3
    assert [name for name, _ in sample.replaced] == [str(dataset.image_path(4)), str(dataset.image_path(5))]
    for index in range(4):
        dataset.image_path(index).write_bytes(b"")
    with pytest.raises(DataError, match="none of the 5 images after it can be read"):
        dataset[SampleKey(0, 0, 4)]


def test_corrupt_validation_image_is_an_error(hand_made) -> None:
    dataset = val_set(hand_made.config())
    dataset.image_path(1).write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"val_007\.jpg: it is not an image"):
        dataset[SampleKey(0, 0, 1)]
    assert [finding.fatal for finding in check_coco(hand_made.config())] == [True]
    # Images beyond max_val_images are never read.
    assert check_coco(hand_made.config(max_val_images=1)) == []


def test_image_of_another_size_is_no_use(hand_made) -> None:
    dataset = train_set(hand_made.config())
    Image.new("RGB", (48, 24)).save(dataset.image_path(0))
    with Image.open(dataset.image_path(0)) as image:
        assert image.size == (48, 24)
    reason = dataset[SampleKey(0, 0, 0)].replaced[0][1]
    assert "48 x 24, the annotations say 24 x 48" in reason
    assert "EXIF" in reason


def test_ten_images_are_always_tolerated(hand_made) -> None:
    tracker = train_set(hand_made.config()).tracker()
    tracker.update([(f"{number}.jpg", "x") for number in range(10)])
    with pytest.raises(DataError):
        tracker.update([("10.jpg", "x")])


def test_check_of_a_good_folder_finds_nothing_and_counts(hand_made, shapes_config, file_bytes) -> None:
    before = file_bytes(hand_made.root)
    seen = []
    assert check_coco(hand_made.config(), on_progress=lambda done, total: seen.append((done, total))) == []
    assert seen == [(6, 6), (6, 6)]
    assert check_data(shapes_config) == []
    train_set(hand_made.config())[SampleKey(0, 0, 0)]
    assert file_bytes(hand_made.root) == before


def test_check_lists_everything_at_once(hand_made) -> None:
    original = copy.deepcopy(hand_made.content["train"])
    changes = [SINGLE["nan box"], WHOLE["unknown image"], WHOLE["double class"]]
    for change, _, _ in changes:
        change(hand_made.content["train"])
    hand_made.write()
    hand_made.image("val", "val_003.jpg").unlink()
    assert json.loads(hand_made.json().read_text()) != original
    paths = [finding.path for finding in check_coco(hand_made.config())]
    assert len(paths) == 4
    for _, where, _ in changes:
        assert any(path.endswith(where) for path in paths)


def test_check_of_a_missing_root_is_a_finding(tmp_path, hand_made) -> None:
    findings = check_coco(hand_made.config(root=str(tmp_path / "nothing")))
    assert len(findings) == 2
    assert all(finding.fatal and "expected COCO's layout" in finding.what for finding in findings)
