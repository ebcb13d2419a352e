"""The SceneParsing layout: pairs, labels, augmentation as a function of the key, views, and everything bad that a folder can hold."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from permafrost.data.build import submission_set, train_set, val_set
from permafrost.data.errors import DataError
from permafrost.data.findings import count_kinds
from permafrost.data.pictures.geometry import NO_CLASS, PAD_COLOR
from permafrost.data.segmentation import labels as kinds
from permafrost.data.segmentation.check import check_ade20k
from permafrost.data.segmentation.classes import ADE20K_CLASSES, read_classes
from permafrost.data.segmentation.config import (
    ADE20KDataConfig,
    SegmentationEvaluationConfig,
    SegmentationJitterConfig,
)
from permafrost.data.segmentation.dataset import SceneParsing, is_full_release
from permafrost.data.segmentation.labels import LabelError, read_labels
from permafrost.data.segmentation.transforms import SegmentationJitter
from permafrost.data.segmentation.views import plan_views, see
from permafrost.data.stream.loader import collate, val_loader
from permafrost.data.types import SampleKey

sys.path.insert(0, str(Path(__file__).parent))
from scene_files import label_path, photo_path, write_scenes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_scenes(tmp_path / "ade")


def config_of(root: Path, **fields) -> ADE20KDataConfig:
    return ADE20KDataConfig(**{"root": str(root), "image_size": 64, **fields})


def save_label(
    root: Path, values: np.ndarray, folder: str = "training", number: int = 0, mode: str | None = None
) -> Path:
    path = label_path(root, folder, number)
    picture = Image.fromarray(values)
    (picture if mode is None else picture.convert(mode)).save(path)
    return path


# Names and layout.


def test_the_150_names_are_known_and_a_table_of_the_data_set_goes_first(root) -> None:
    assert len(set(ADE20K_CLASSES)) == 150
    assert [ADE20K_CLASSES[label - 1] for label in (1, 13, 45, 90, 106, 150)] == [
        "wall",
        "person",
        "chest of drawers",
        "television",
        "conveyer belt",
        "flag",
    ]
    assert train_set(config_of(root)).classes == list(ADE20K_CLASSES)
    # The official table: blanks around some cells, several names each.
    (root / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t1\t1\tbed \n2 \t.1\t1\t1\tsofa, couch\n"
    )
    assert train_set(config_of(root)).classes == ["bed", "sofa"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Idx\tName\n1\twall\n3\tsky\n", "line 3"),
        ("Idx\tName\n1\twall\n2\t\n", "line 3"),
        ("Idx\tName\nwall\n", "line 2"),
        ("Idx\tName\n1\twall\n2\twall, other\n", "called wall"),
        ("Idx\tName\n", "names 0 classes"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path, text, problem) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        read_classes(path)
    with pytest.raises(DataError, match="no such table"):
        read_classes(tmp_path / "other.txt")


def test_other_layouts_are_named(tmp_path, root) -> None:
    with pytest.raises(DataError, match="no such folder; expected the layout"):
        train_set(config_of(tmp_path / "nowhere"))
    (tmp_path / "ADEChallengeData2016").mkdir()
    with pytest.raises(DataError, match=r"is .*ADEChallengeData2016 meant"):
        val_set(config_of(tmp_path))
    for number, made in enumerate(("index_ade20k.pkl", "ADE20K_2021_17_01/images/ADE/training")):
        full = tmp_path / f"full{number}"
        (full / made).mkdir(parents=True)
        with pytest.raises(DataError, match=r"full release of ADE20K.*SceneParsing"):
            train_set(config_of(full))
    old = tmp_path / "old" / "images" / "training" / "a" / "abbey"
    old.mkdir(parents=True)
    (old / "ADE_train_00000970_seg.png").touch()
    with pytest.raises(DataError, match="full release"):
        train_set(config_of(tmp_path / "old"))
    assert not is_full_release(root)


def test_missing_pairs_stop_a_run_and_are_counted(root) -> None:
    photo_path(root, "training", 1).unlink()
    label_path(root, "validation", 0).unlink()
    with pytest.raises(DataError, match="no photo of this name"):
        train_set(config_of(root))
    with pytest.raises(DataError, match="with its labels"):
        val_set(config_of(root))
    findings = check_ade20k(config_of(root))
    assert all(finding.fatal for finding in findings)
    assert sorted(count_kinds(findings)) == ["1 error: labels without a photo", "1 error: photos without labels"]


# What a label PNG can hold.


def test_labels_become_classes(root) -> None:
    values = np.array([[0, 1], [2, 150]], dtype=np.uint8)
    found = read_labels(save_label(root, values), (2, 2), 150)
    assert found.classes.tolist() == [[NO_CLASS, 0], [1, 149]]
    assert found.notes == []


def test_a_palette_gives_its_indices_unless_its_tones_say_otherwise(root) -> None:
    values = np.array([[0, 3], [7, 150]], dtype=np.uint8)
    path = label_path(root, "training", 0)
    picture = Image.fromarray(values).convert("P")
    picture.putdata(values.ravel().tolist())
    rng = np.random.default_rng(0)
    for palette in (rng.integers(0, 256, 768).tolist(), np.repeat(np.arange(256), 3).tolist()):
        picture.putpalette(palette)
        picture.save(path)
        with Image.open(path) as written:
            assert written.mode == "P"
        found = read_labels(path, (2, 2), 150)
        assert found.classes.tolist() == [[NO_CLASS, 2], [6, 149]]
        assert [kind for kind, _ in found.notes] == [kinds.PALETTE]
    # What programs that make files smaller do to gray pictures: few indices, the tones in the palette.
    picture.putpalette(np.repeat(np.arange(256)[::-1], 3).tolist())
    picture.save(path)
    with pytest.raises(LabelError, match="tones are not its indices") as error:
        read_labels(path, (2, 2), 150)
    assert error.value.kind == kinds.PALETTE


def test_sixteen_bits_are_labels_where_they_fit(root) -> None:
    found = read_labels(save_label(root, np.array([[0, 150]], dtype=np.uint16)), (1, 2), 150)
    assert found.classes.tolist() == [[NO_CLASS, 149]]
    assert [kind for kind, _ in found.notes] == [kinds.SIXTEEN_BIT]
    # 256 must not wrap around to 0, nor 257 to 1.
    with pytest.raises(LabelError, match=r"labels 256 \(1 pixels\), 257 \(2 pixels\) are not in 0\.\.150") as error:
        read_labels(save_label(root, np.array([[256, 257, 257, 3]], dtype=np.uint16)), (1, 4), 150)
    assert error.value.kind == kinds.OUTSIDE


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1"])
def test_other_pixels_are_no_labels(root, mode) -> None:
    with pytest.raises(LabelError, match=f"mode {mode}"):
        read_labels(save_label(root, np.ones((4, 4), dtype=np.uint8), mode=mode), (4, 4), 150)


def test_values_that_are_no_classes_are_counted_and_a_known_cause_is_named(root) -> None:
    with pytest.raises(LabelError, match=r"151 \(2 pixels\), 255 \(1 pixels\).*255 is ignore"):
        read_labels(save_label(root, np.array([[151, 151, 255, 0]], dtype=np.uint8)), (1, 4), 150)


def test_labels_of_another_size_missing_or_damaged_are_errors(root) -> None:
    path = save_label(root, np.ones((4, 6), dtype=np.uint8))
    with pytest.raises(LabelError, match="labels are 6 x 4, their photo is 4 x 6"):
        read_labels(path, (6, 4), 150)
    path = save_label(root, np.arange(6400, dtype=np.uint8).reshape(80, 80) % 150)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(LabelError, match="cannot be read"):
        read_labels(path, (80, 80), 150)
    with pytest.raises(LabelError, match="no such file"):
        read_labels(path.with_name("other.png"), (4, 6), 150)


def spoil(root: Path, folder: str) -> dict[str, int]:
    """Make one label PNG of each bad kind in a split of eight; how many findings of each kind there must be."""
    size = (60, 80)
    for number in range(8):
        Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)).save(photo_path(root, folder, number))
        save_label(root, np.full(size, 5, dtype=np.uint8), folder, number)
    save_label(root, np.full(size, 151, dtype=np.uint8), folder, 0)
    save_label(root, np.full(size, 200, dtype=np.uint8), folder, 1)
    save_label(root, np.ones((80, 60), dtype=np.uint8), folder, 2)
    save_label(root, np.full(size, 2, dtype=np.uint8), folder, 3, mode="P")
    save_label(root, np.full(size, 300, dtype=np.uint16), folder, 4)
    save_label(root, np.zeros(size, dtype=np.uint8), folder, 5)
    save_label(root, np.ones(size, dtype=np.uint8), folder, 6, mode="RGB")
    label_path(root, folder, 7).write_bytes(b"\x89PNG")
    return {kinds.OUTSIDE: 3, kinds.SIZE: 1, kinds.PALETTE: 1, kinds.ALL_IGNORED: 1, kinds.MODE: 1, kinds.UNREADABLE: 1}


@pytest.mark.parametrize("folder", ["training", "validation"])
def test_check_counts_everything_bad(root, folder) -> None:
    expected = spoil(root, folder)
    seen = []
    findings = check_ade20k(config_of(root), on_progress=lambda done, total: seen.append((done, total)))
    counted = {}
    for line in count_kinds(findings):
        number, kind = line.split(" ", 1)[0], line.partition(": ")[2]
        counted[kind] = counted.get(kind, 0) + int(number)
    assert counted == expected
    # Training replaces what it cannot use; evaluation needs every image.
    is_usable = {kinds.PALETTE, kinds.ALL_IGNORED}
    for finding in findings:
        assert finding.fatal == (folder == "validation" and finding.kind not in is_usable), finding
    assert (8, 8) in seen
    assert not check_ade20k(config_of(root), decode=False)


def test_a_good_data_set_has_no_findings(root) -> None:
    assert check_ade20k(config_of(root)) == []


def test_training_replaces_bad_pairs_and_says_so(root) -> None:
    spoil(root, "training")
    dataset = train_set(config_of(root))
    sample = dataset[SampleKey(0, 0, 6)]
    # 6 and 7 cannot be used, then 0, 1 and 2 not either; 3 has a palette.
    assert sample.target.image_id == 3
    assert [Path(path).stem[-1] for path, _ in sample.replaced] == ["6", "7", "0", "1", "2"]
    assert set(sample.target.semantic.unique().tolist()) <= {1, NO_CLASS}
    ignored = dataset[SampleKey(0, 0, 5)]
    assert ignored.replaced == []
    assert len(ignored.target.labels) == 0
    assert (ignored.target.semantic == NO_CLASS).all()
    spoiled = [(str(number), "spoiled") for number in range(11)]
    with pytest.raises(DataError, match=r"data\.corrupt_share"):
        dataset.tracker().update(spoiled)


def test_evaluation_needs_every_pair(root) -> None:
    save_label(root, np.full((90, 50), 151, dtype=np.uint8), "validation", 1)
    dataset = val_set(config_of(root))
    with pytest.raises(DataError, match=r"ADE_val_00000001.*151.*evaluation needs every image"):
        dataset[SampleKey(0, 0, 1)]


# Samples.


def test_a_sample_is_a_function_of_its_key(root) -> None:
    dataset, again = train_set(config_of(root)), train_set(config_of(root))
    for index in range(4):
        one, other = dataset[SampleKey(3, 1, index)], again[SampleKey(3, 1, index)]
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.target.semantic, other.target.semantic)
        assert one.image.shape == (3, 64, 64)
        assert one.target.semantic.shape == (64, 64)
        assert one.target.labels.tolist() == [v for v in one.target.semantic.unique().tolist() if v != NO_CLASS]
        height, width = one.target.size
        assert (one.target.semantic[height:] == NO_CLASS).all()
        assert (one.target.semantic[:, width:] == NO_CLASS).all()
        assert (one.image[:, height:] == torch.tensor(PAD_COLOR)[:, None, None]).all()
        assert not torch.equal(one.image, dataset[SampleKey(3, 2, index)].image)


def test_labels_move_with_the_picture() -> None:
    """A photo that shows its own labels still does after scaling, cropping and flipping."""
    rows, columns = torch.meshgrid(torch.arange(120), torch.arange(160), indexing="ij")
    labels = ((rows // 30) * 6 + columns // 27).to(torch.uint8)
    image = (labels * 10)[None].expand(3, -1, -1).contiguous()
    jitter = SegmentationJitter(64, SegmentationJitterConfig(color_probability=0.0))
    sizes = set()
    for seed in range(20):
        found, semantic, size = jitter(image, labels, torch.Generator().manual_seed(seed))
        sizes.add(size)
        inside = semantic != NO_CLASS
        assert int(inside.sum()) == size[0] * size[1]
        agree = (found[0].float() / 10 - semantic.float()).abs()[inside] < 0.5
        # Blurred borders aside.
        assert agree.float().mean() > 0.7, seed
    assert len(sizes) > 3


def test_scales_are_sixteen_steps_of_the_shorter_side() -> None:
    jitter = SegmentationJitter(100, SegmentationJitterConfig(color_probability=0.0))
    found = set()
    for seed in range(200):
        labels = torch.zeros((50, 70), dtype=torch.uint8)
        _, _, size = jitter(labels[None].repeat(3, 1, 1), labels, torch.Generator().manual_seed(seed))
        found.add(size[0])
    assert found == {*range(50, 100, 10), 100}
    limited = SegmentationJitterConfig(scale_range=(2.0, 2.0), max_side=80)
    _, _, size = SegmentationJitter(100, limited)(labels[None].repeat(3, 1, 1), labels, torch.Generator())
    assert size == (57, 80)


def test_a_crop_keeps_a_class_below_its_limit_where_one_of_ten_does() -> None:
    labels = torch.zeros((64, 640), dtype=torch.uint8)
    labels[:, 300:] = 1
    image = labels[None].repeat(3, 1, 1)
    shares = {}
    for limit in (1.0, 0.75):
        config = SegmentationJitterConfig(scale_range=(1.0, 1.0), single_category_limit=limit, color_probability=0.0)
        jitter = SegmentationJitter(64, config)
        crops = [jitter(image, labels, torch.Generator().manual_seed(seed))[1] for seed in range(100)]
        shares[limit] = sum(float(crop.float().mean().sub(0.5).abs()) < 0.25 for crop in crops)
    # A window of 64 holds both classes, each with a quarter at least, in some 5 % of the places: 1 - 0.95^10 is 0.4.
    assert shares[1.0] < 15
    assert 25 < shares[0.75] < 60


def test_colors_change_within_their_limits() -> None:
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros((40, 40), dtype=torch.uint8)
    only = {"scale_range": (1.0, 1.0), "flip": 0.0, "color_probability": 1.0}
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}

    def change(seed: int, **strengths: float) -> torch.Tensor:
        jitter = SegmentationJitter(40, SegmentationJitterConfig(**only, **{**off, **strengths}))
        return jitter(image, labels, torch.Generator().manual_seed(seed))[0]

    assert torch.equal(change(0), image)
    for seed in range(5):
        moved = (change(seed, brightness=20.0).int() - image.int()).abs()
        assert 0 < moved.max() <= 20
        ratio = change(seed, contrast=0.5).float()[image > 100] / image.float()[image > 100]
        assert ratio.min() > 0.49
        assert ratio.median() < 1.51
        assert not torch.equal(change(seed, saturation=0.5), image)
        # The hue leaves the largest of R, G and B as large.
        assert (change(seed, hue=0.1).amax(dim=0).int() - image.amax(dim=0).int()).abs().max() <= 1
    assert not torch.equal(change(0, hue=0.1), image)


# Views.


def test_whole_views_are_scales_and_flips() -> None:
    evaluation = SegmentationEvaluationConfig(scales=(0.5, 1.0), flip=True)
    views = plan_views((100, 150), 64, evaluation)
    assert [(view.number, view.count, view.scaled, view.is_flipped) for view in views] == [
        (0, 4, (32, 48), False),
        (1, 4, (32, 48), True),
        (2, 4, (64, 96), False),
        (3, 4, (64, 96), True),
    ]


@pytest.mark.parametrize("size", [(64, 64), (64, 200), (131, 64), (150, 333)])
def test_windows_cover_the_image_in_steps_below_the_stride(size) -> None:
    views = plan_views(size, 64, SegmentationEvaluationConfig(mode="slide", short_side=min(size)))
    hits = np.zeros(size, dtype=int)
    for view in views:
        assert view.scaled == size
        top, left = view.place
        assert top + 64 <= size[0]
        assert left + 64 <= size[1]
        hits[top : top + 64, left : left + 64] += 1
    assert hits.min() >= 1
    for axis in (0, 1):
        starts = sorted({view.place[axis] for view in views})
        assert all(after - before <= 43 for before, after in itertools.pairwise(starts))
        assert starts[-1] + 64 == max(size[axis], 64)


def test_a_view_shows_its_part(root) -> None:
    image = torch.arange(50 * 70).reshape(1, 50, 70).expand(3, -1, -1).remainder(251).to(torch.uint8).contiguous()
    labels = image[0] % 150
    view = plan_views((50, 70), 40, SegmentationEvaluationConfig(mode="slide", short_side=50, flip=True))[-1]
    assert view.place == (10, 30)
    found, semantic, size = see(image, labels, view, 40)
    assert size == (40, 40)
    assert found.shape == (3, 64, 64)
    assert torch.equal(found[:, :40, :40], image[:, 10:, 30:].flip(-1))
    assert torch.equal(semantic[:40, :40], labels[10:, 30:].flip(-1))
    assert (semantic[40:] == NO_CLASS).all()


def test_evaluation_has_a_sample_for_each_view_and_keeps_a_photo_on_one_rank(root) -> None:
    evaluation = SegmentationEvaluationConfig(mode="slide", scales=(1.0, 1.5), flip=True)
    dataset = val_set(config_of(root, evaluation=evaluation))
    assert len(dataset.groups) == 3
    assert len(set(dataset.groups)) > 1
    assert len(dataset) == sum(dataset.groups)
    views = [dataset[SampleKey(0, 0, index)].target for index in range(len(dataset))]
    assert [(target.image_id, target.view.number) for target in views] == [
        (image_id, number) for image_id, count in enumerate(dataset.groups) for number in range(count)
    ]
    ranks, lengths = [], set()
    for rank in range(2):
        loader = val_loader(dataset, batch_size=3, rank=rank, world_size=2, groups=dataset.groups)
        batches = list(loader)
        assert len(batches) == len(loader)
        ranks.append([target for batch in batches if not batch.is_padding for target in batch.targets])
        assert all(len({target.image_id for target in batch.targets}) == 1 for batch in batches)
        ranks[-1] = [(target.image_id, target.view.number) for target in ranks[-1]]
        lengths.add(len(loader))
    assert len(lengths) == 1
    assert sorted(ranks[0] + ranks[1]) == [(target.image_id, target.view.number) for target in views]
    assert {image_id for image_id, _ in ranks[0]} == {0, 2}


def test_a_batch_of_several_sizes_is_padded(root) -> None:
    dataset = val_set(config_of(root))
    batch = collate([dataset[SampleKey(0, 0, index)] for index in range(2)])
    assert batch.images.shape[-2:] == batch.targets[0].semantic.shape == batch.targets[1].semantic.shape
    assert (batch.targets[0].semantic[:, batch.targets[0].size[1] :] == NO_CLASS).all()


def test_a_part_of_the_validation_images_is_spread_evenly(root) -> None:
    dataset = val_set(config_of(root, max_val_images=2))
    assert [dataset.image_path(index).stem for index in range(2)] == ["ADE_val_00000000", "ADE_val_00000002"]
    assert dataset.fingerprint != val_set(config_of(root)).fingerprint


def test_photos_without_labels(root, tmp_path) -> None:
    with pytest.raises(DataError, match=r"data\.test_images"):
        submission_set(config_of(root), tmp_path / "labels")
    dataset = submission_set(config_of(root, test_images=str(root / "images" / "validation")), tmp_path / "labels")
    assert isinstance(dataset, SceneParsing)
    assert dataset.num_images == 3
    assert (dataset[SampleKey(0, 0, 0)].target.semantic == NO_CLASS).all()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no photo"):
        submission_set(config_of(root, test_images=str(tmp_path / "empty")), tmp_path / "labels")


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": 8},
        {"max_val_images": 0},
        {"corrupt_share": 2.0},
    ],
)
def test_impossible_fields_are_named(fields) -> None:
    with pytest.raises(DataError, match=rf"data\.{next(iter(fields))}"):
        ADE20KDataConfig(**fields)
    good = SegmentationJitterConfig()
    for name, value in (("scale_range", (2.0, 1.0)), ("single_category_limit", 0.0), ("flip", 2.0), ("num_scales", 0)):
        with pytest.raises(DataError, match=rf"data\.jitter\.{name}"):
            replace(good, **{name: value})
    for name, value in (("scales", ()), ("stride", 0.0), ("short_side", 0)):
        with pytest.raises(DataError, match=rf"data\.evaluation\.{name}"):
            SegmentationEvaluationConfig(**{name: value})
