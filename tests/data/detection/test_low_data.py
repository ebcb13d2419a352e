"""Exact shares of the training set, semantic maps and pasted objects of a COCO folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from permafrost.data.build import train_set, val_set
from permafrost.data.detection.config import CocoDataConfig, EvaluationConfig, JitterConfig, MultiScaleConfig
from permafrost.data.detection.copy_paste import paste
from permafrost.data.detection.transforms import FitTransform, MultiScaleTransform, NetworkInput, Scene, boxes_of_masks
from permafrost.data.errors import DataError
from permafrost.data.pictures.geometry import NO_CLASS, PAD_COLOR
from permafrost.data.stream.loader import collate
from permafrost.data.stream.records import choose_share
from permafrost.data.types import SampleKey


def test_shares_are_exact_nested_and_of_the_seed_alone() -> None:
    ids = list(range(7, 7 + 118_287 * 3, 3))
    one, ten = choose_share(ids, 0.01, 1), choose_share(ids, 0.1, 1)
    assert (len(one), len(ten)) == (1183, 11829)
    assert one < ten
    assert one == choose_share(reversed(ids), 0.01, 1)
    other = choose_share(ids, 0.01, 2)
    # Two draws of 1183 out of 118,287 have about 12 in common.
    assert len(one & other) < 40
    # Known by heart: what another machine must find, too.
    assert choose_share(range(100), 0.05, 0) == {21, 30, 43, 64, 70}
    assert choose_share([4], 0.01, 0) == {4}


def test_a_share_is_taken_of_all_images_and_said(hand_made) -> None:
    config = hand_made.config(train_share=0.5, train_share_seed=3)
    dataset, again = train_set(config), train_set(config)
    assert sorted(dataset.image_ids) == sorted(choose_share([12, 3, 40, 7, 21, 33], 0.5, 3))
    assert any("3 of 6 images" in note and "seed 3" in note for note in dataset.notes)
    assert dataset.fingerprint == again.fingerprint != train_set(hand_made.config()).fingerprint
    assert len(val_set(config)) == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_share": 0.0}, "train_share is 0.0"),
        ({"copy_paste": 1.5}, "copy_paste is 1.5"),
        ({"copy_paste": 0.5, "jitter": MultiScaleConfig()}, "copy_paste needs images of one size"),
        ({"semantic_classes": 256}, "semantic_classes is 256"),
    ],
)
def test_impossible_values_name_the_field(fields, message) -> None:
    with pytest.raises(DataError, match=message):
        CocoDataConfig(**fields)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (MultiScaleConfig, {"short_sides": ()}, "short_sides"),
        (MultiScaleConfig, {"short_sides": (800,), "max_side": 700}, "max_side"),
        (EvaluationConfig, {"short_side": 0}, "short_side is 0"),
    ],
)
def test_impossible_resizing_is_refused(kind, fields, message) -> None:
    with pytest.raises(DataError, match=message):
        kind(**fields)


def scene_of(height, width, num_objects=2) -> Scene:
    ramp = torch.arange(width).expand(3, height, width).to(torch.uint8)
    masks = torch.zeros(num_objects, height, width, dtype=torch.uint8)
    for i, mask in enumerate(masks):
        mask[2 : height // 2, 3 + 4 * i : width // 2 + 4 * i] = 1
    return Scene(ramp, masks, torch.tensor([[0.0, 0.0, width / 4, height / 4]]), masks.amax(dim=0) * 7)


@pytest.mark.parametrize(("height", "width"), [(30, 40), (50, 20), (64, 64)])
def test_multi_scale_keeps_the_aspect_ratio_and_everything_in_sight(height, width) -> None:
    config = MultiScaleConfig(short_sides=(24, 36), max_side=48, flip=0.5)
    sides, flips = set(), set()
    for index in range(24):
        scene, key = scene_of(height, width), SampleKey(0, 0, index)
        result = MultiScaleTransform(config)(scene, key.generator("augment"))
        draws = torch.rand(5, generator=key.generator("augment"))
        side = (24, 36)[int(draws[0] * 2)]
        ratio = min(side / min(height, width), 48 / max(height, width))
        assert result.size == (round(height * ratio), round(width * ratio))
        assert result.image.shape[1:] == result.masks.shape[1:] == result.semantic.shape
        assert all(s % 32 == 0 and s - inner < 32 for s, inner in zip(result.image.shape[1:], result.size))
        assert len(result.kept) == 2
        own = result.image[0, : result.size[0], : result.size[1]].int()
        flipped = bool(draws[1] < 0.5)
        assert bool((own[:, 1:] <= own[:, :-1]).all()) == flipped
        assert (result.image[:, result.size[0] :] == torch.tensor(PAD_COLOR)[:, None, None]).all()
        assert (result.semantic[result.size[0] :] == NO_CLASS).all()
        # The map is the masks' union, resized in the same way.
        assert torch.equal(result.semantic == 7, result.masks.any(dim=0))
        sides.add(side)
        flips.add(flipped)
    assert (sides, flips) == ({24, 36}, {False, True})


def test_evaluation_by_the_shorter_side() -> None:
    scene = scene_of(30, 40)
    evaluation = EvaluationConfig(resize="short_side", short_side=60, max_side=90)
    whole = FitTransform(1, evaluation)(scene)
    assert (whole.size, tuple(whole.image.shape[1:])) == ((60, 80), (64, 96))
    assert FitTransform(1, EvaluationConfig(resize="short_side", short_side=60, max_side=70))(scene).size == (52, 70)


def test_images_of_different_sizes_become_one_batch(hand_made) -> None:
    config = hand_made.config(
        jitter=MultiScaleConfig(short_sides=(20, 60), max_side=90), semantic="instances", semantic_classes=4
    )
    dataset = train_set(config)
    samples = [dataset[SampleKey(0, 0, index)] for index in range(6)]
    assert len({tuple(sample.image.shape) for sample in samples}) > 1
    batch = collate(samples)
    height, width = batch.images.shape[-2:]
    assert (height, width) == tuple(max(s.image.shape[axis] for s in samples) for axis in (1, 2))
    for image, target, sample in zip(batch.images, batch.targets, samples):
        h, w = sample.image.shape[1:]
        assert torch.equal(image[:, :h, :w], sample.image)
        assert torch.equal(target.masks[:, :h, :w], sample.target.masks)
        assert target.masks.shape[1:] == target.semantic.shape == (height, width)
        assert not target.masks[:, h:].any()
        assert (target.semantic[h:] == NO_CLASS).all()
        assert (image[:, h:] == torch.tensor(PAD_COLOR)[:, None, None]).all()
        assert target.size == sample.target.size


def write_maps(hand_made, change=None) -> Path:
    folder = hand_made.root / "stuff" / "train2017"
    folder.mkdir(parents=True)
    for image in hand_made.content["train"]["images"]:
        values = np.full((image["height"], image["width"]), image["id"] % 90, dtype=np.uint8)
        values[:3] = 255
        Image.fromarray(values).save((folder / image["file_name"]).with_suffix(".png"))
    return folder


def test_semantic_maps_come_along(hand_made) -> None:
    write_maps(hand_made)
    config = hand_made.config(jitter=JitterConfig(scale_range=(1.0, 1.0), flip=0.0), semantic="stuff/train2017")
    dataset = train_set(config)
    for index in range(len(dataset)):
        target = dataset[SampleKey(0, 0, index)].target
        assert target.semantic.shape == (64, 64)
        inside = target.semantic[: target.size[0], : target.size[1]]
        assert set(inside.unique().tolist()) == {target.image_id % 90, 255}
        assert (target.semantic[target.size[0] :] == NO_CLASS).all()
    assert val_set(config)[SampleKey(0, 0, 0)].target.semantic is None


def test_faulty_semantic_maps(hand_made) -> None:
    folder = write_maps(hand_made)
    files = sorted(folder.iterdir())
    good = files[0].read_bytes()
    config = hand_made.config(semantic="stuff/train2017", semantic_classes=90)
    with Image.open(files[0]) as image:
        size = image.size
    faults = {
        "holds 93: data.semantic_classes allows 0..89 and 255": Image.fromarray(
            np.full(size[::-1], 93, dtype=np.uint8)
        ),
        "the semantic map is 5 x 5": Image.fromarray(np.zeros((5, 5), dtype=np.uint8)),
        "is of mode RGB": Image.fromarray(np.zeros((*size[::-1], 3), dtype=np.uint8)),
    }
    dataset = train_set(config)
    index = dataset.image_ids.index(int(files[0].stem.split("_")[1]))
    for message, image in faults.items():
        image.save(files[0])
        sample = dataset[SampleKey(0, 0, index)]
        # The next image stands in its place, as for an image that cannot be read.
        assert message in sample.replaced[0][1]
        assert sample.target.image_id == dataset.image_ids[(index + 1) % 6]
    files[0].write_bytes(good[:40])
    assert "cannot be read" in dataset[SampleKey(0, 0, index)].replaced[0][1]
    files[0].unlink()
    with pytest.raises(DataError, match=rf"{files[0].name}: there is no such image file"):
        train_set(config)
    with pytest.raises(DataError, match=r"data.semantic is 'nowhere': there is no folder"):
        train_set(hand_made.config(semantic="nowhere"))


def test_maps_painted_from_instances(hand_made) -> None:
    config = hand_made.config(
        jitter=JitterConfig(scale_range=(1.0, 1.0), flip=0.0), semantic="instances", semantic_classes=4
    )
    dataset = train_set(config)
    target = dataset[SampleKey(0, 0, dataset.image_ids.index(12))].target
    expected = torch.full((64, 64), 3, dtype=torch.uint8)
    for mask, label in zip(target.masks, target.labels):
        expected[mask] = int(label)
    height, width = target.size
    assert torch.equal(target.semantic[:height, :width], expected[:height, :width])
    with pytest.raises(DataError, match="3 classes and the background: set it to 4"):
        train_set(hand_made.config(semantic="instances"))


def test_pasted_objects_cover_what_lies_below() -> None:
    def layer(value, boxes) -> NetworkInput:
        masks = torch.zeros(len(boxes), 32, 32, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes):
            mask[y0:y1, x0:x1] = True
        scene = Scene(torch.full((3, 32, 32), value, dtype=torch.uint8), masks.to(torch.uint8), torch.zeros(0, 4))
        return FitTransform(32)(scene)

    below = layer(10, [(2, 2, 10, 10), (20, 20, 30, 30), (4, 4, 6, 6)])
    above = layer(200, [(3, 3, 12, 12), (0, 0, 32, 4)])
    seen = set()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(2, generator=torch.Generator().manual_seed(seed)) < 0.5
        scene, labels = paste(below, torch.tensor([1, 2, 3]), above, torch.tensor([8, 9]), generator, min_box_side=1.0)
        covered = above.masks[chosen].any(dim=0)
        assert torch.equal(scene.image[0] == 200, covered)
        # Object 3 lies wholly under object 8.
        expected = [1, 2] + ([] if chosen[0] else [3]) + [label for label, own in zip((8, 9), chosen) if own]
        assert labels.tolist() == expected
        assert not (scene.masks[:2] & covered).any()
        assert torch.equal(scene.boxes, boxes_of_masks(scene.masks))
        assert scene.masks.shape[0] == len(labels)
        seen.add(tuple(chosen.tolist()))
    assert len(seen) == 4


def test_copy_paste_is_a_function_of_the_key(hand_made) -> None:
    plain, pasted = train_set(hand_made.config()), train_set(hand_made.config(copy_paste=1.0))
    more = 0
    for index in range(6):
        for epoch in range(3):
            key = SampleKey(1, epoch, index)
            first, second = pasted[key], pasted[key]
            assert torch.equal(first.image, second.image)
            assert torch.equal(first.target.boxes, second.target.boxes)
            assert len(first.target.labels) == len(first.target.masks) == len(first.target.boxes)
            assert torch.equal(first.target.boxes, boxes_of_masks(first.target.masks))
            more += len(first.target.labels) - len(plain[key].target.labels)
    assert more > 0
