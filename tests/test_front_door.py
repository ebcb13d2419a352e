"""`import permafrost`: what a notebook or a service calls, on a run that the command line trained."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import permafrost
from permafrost.launcher.cli import main

RECIPE = f"{Path(__file__).parent / 'launcher' / 'tiny_recipe.py'}:tiny"
LOW = "0.01"
"""A tiny head is sure of nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("front_door") / "run"
    assert main(["train", RECIPE, "--output", str(folder), "--loop.num-steps", "2"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> permafrost.TrainedRun:
    return permafrost.load_run(folder, device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three pictures of two sizes, without loss."""
    place = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    paths = []
    for number, size in enumerate([(60, 90, 3), (96, 96, 3), (60, 90, 3)]):
        paths.append(place / f"{number}.png")
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(paths[-1])
    return paths


def test_importing_takes_no_time_and_no_torch(tmp_path: Path) -> None:
    code = (
        "import time; start = time.perf_counter(); import permafrost; took = time.perf_counter() - start; import sys;"
        "assert not {'torch', 'numpy', 'importlib.metadata'} & set(sys.modules), 'heavy';"
        "assert permafrost.__version__ == '0.1.0', permafrost.__version__; print(took)"
    )
    took = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(3)
    ]
    assert min(took) < 0.1


@pytest.mark.parametrize("name", ["TrainedRun", "evaluate", "load_backbone", "load_run", "train"])
def test_names_are_there(name: str) -> None:
    assert name in dir(permafrost)
    assert name in permafrost.__all__
    assert callable(getattr(permafrost, name))


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        permafrost.nothing  # noqa: B018


def test_python_m_permafrost(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "permafrost"]
    version = subprocess.run([*command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert version == f"permafrost {permafrost.__version__}\n"
    typo = subprocess.run([*command, "trian"], cwd=tmp_path, capture_output=True, text=True)
    assert typo.returncode == 2
    assert "did you mean train?" in typo.stderr


def test_a_path_a_picture_an_array_and_a_tensor_are_the_same_image(
    run: permafrost.TrainedRun, pictures: list[Path]
) -> None:
    with Image.open(pictures[0]) as image:
        picture = image.convert("RGB")
    array = np.asarray(picture)
    forms = [
        pictures[0],
        str(pictures[0]),
        picture,
        array,
        np.asfortranarray(array),
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ]
    found = [run.predict(form, score_threshold=float(LOW)) for form in forms]
    assert len(found[0].scores) > 0
    for other in found[1:]:
        torch.testing.assert_close(other.boxes, found[0].boxes, rtol=0, atol=0)
        torch.testing.assert_close(other.masks, found[0].masks, rtol=0, atol=0)
        assert other.names == found[0].names


def test_what_is_found_is_in_the_pictures_own_pixels_with_names(
    run: permafrost.TrainedRun, folder: Path, pictures: list[Path], tmp_path: Path
) -> None:
    arguments = ["--output", str(tmp_path / "out"), "--score-threshold", LOW, "--device", "cpu"]
    assert main(["predict", str(folder), str(pictures[0]), *arguments]) == 0
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    found = run.predict(pictures[0], score_threshold=float(LOW))
    assert len(entries) == len(found.scores) > 0
    for entry, (left, top, right, bottom), score, label in zip(
        entries, found.boxes.tolist(), found.scores, found.labels, strict=True
    ):
        assert entry["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=0.02)
        assert entry["score"] == pytest.approx(float(score), abs=1e-4)
        assert entry["category_id"] == run.category_ids[label]
    assert found.names == [run.classes[label] for label in found.labels]
    assert found.masks.shape == (len(found.scores), 60, 90)
    assert found.masks.dtype == torch.bool
    for mask, box in zip(found.masks, found.boxes, strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        if len(rows):
            assert box[1] - 1 <= rows.min() <= rows.max() <= box[3] + 1
            assert box[0] - 1 <= columns.min() <= columns.max() <= box[2] + 1


def test_a_list_gives_a_list_in_order_whatever_the_batch(run: permafrost.TrainedRun, pictures: list[Path]) -> None:
    alone = [run.predict(path, score_threshold=float(LOW)) for path in pictures]
    for batch_size in (1, 2, 8):
        together = run.predict(pictures, score_threshold=float(LOW), batch_size=batch_size)
        assert [one.names for one in together] == [one.names for one in alone]
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-4, atol=1e-3)
    assert run.predict([]) == []
    assert isinstance(run.predict([pictures[0]]), list)


def test_the_model_is_built_once(run: permafrost.TrainedRun, pictures: list[Path]) -> None:
    backbone = run.backbone
    took = []
    for _ in range(3):
        start = time.perf_counter()
        run.predict(pictures[1])
        took.append(time.perf_counter() - start)
    assert run.backbone is backbone
    assert min(took) < 1.0


def test_features_are_the_backbones_maps(run: permafrost.TrainedRun, pictures: list[Path]) -> None:
    maps = run.features(pictures[1])
    assert [tuple(one.shape[:2]) for one in maps] == [(1, channels) for channels in run.backbone.spec.channels]
    assert [64 // one.shape[-1] for one in maps] == list(run.backbone.spec.strides)
    several = run.features(pictures)
    assert len(several) == 3
    torch.testing.assert_close(several[1][0], maps[0], rtol=1e-5, atol=1e-5)
    assert not maps[0].requires_grad


def test_evaluate_and_train(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = permafrost.evaluate(folder, device="cpu")
    assert set(metrics) == {"detection"}
    assert "bbox/AP" in metrics["detection"]
    run = permafrost.load_run(folder, device="cpu")
    assert permafrost.train(run.experiment, device="cpu")["detection"].keys() == metrics["detection"].keys()


WRONG = {
    "a grey array": (np.zeros((60, 90), np.uint8), r"shape \(60, 90\).*\(H, W, 3\)"),
    "channels first, as an array": (np.zeros((3, 60, 90), np.uint8), r"shape \(3, 60, 90\).*\(H, W, 3\)"),
    "channels last, as a tensor": (torch.zeros(60, 90, 3, dtype=torch.uint8), r"shape \(60, 90, 3\).*\(3, H, W\)"),
    "a batch as an array": (np.zeros((2, 60, 90, 3), np.uint8), r"shape \(2, 60, 90, 3\).*list"),
    "four channels": (np.zeros((60, 90, 4), np.uint8), r"shape \(60, 90, 4\)"),
    "floats": (np.zeros((60, 90, 3), np.float32), "float32.*uint8"),
    "float tensors": (torch.zeros(3, 60, 90), "float32.*uint8"),
    "nothing": (np.zeros((0, 90, 3), np.uint8), "90 x 0"),
    "a number": (7, "int.*path"),
    "no image": (None, "NoneType"),
    "no such file": ("nowhere.jpg", "nowhere.jpg: there is no such file"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_image_is_one_sentence(run: permafrost.TrainedRun, what: str) -> None:
    given, message = WRONG[what]
    for call in (run.predict, run.features):
        with pytest.raises(ValueError, match=message) as caught:
            call(given)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message) as caught:
        run.predict([np.zeros((60, 90, 3), np.uint8), given])
    if not isinstance(given, str):
        assert "images[1]" in str(caught.value)


def test_what_is_no_run_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run") as caught:
        permafrost.load_run(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no run"):
        permafrost.load_run(tmp_path / "empty")
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "recipe.json").write_bytes((folder / "recipe.json").read_bytes())
    with pytest.raises(ValueError, match="checkpoint") as caught:
        permafrost.load_run(tmp_path / "started")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="has no head mask"):
        permafrost.load_run(folder, head="mask")
