"""Results for COCO's evaluation server: on images without annotations, in its format and under its names."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from permafrost.launcher.cli import main, parse_experiment
from permafrost.launcher.submission import write_zips
from permafrost.launcher.train import train

RECIPE = f"{Path(__file__).with_name('tiny_recipe.py')}:tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and its data set's root."""
    output = tmp_path_factory.mktemp("run") / "run"
    arguments = ["--output", str(output), "--loop.num-steps", "2", "--loop.image-every", "0"]
    arguments += ["--heads.detection.model.box.score-threshold", "0.0"]
    experiment = parse_experiment(RECIPE, arguments)
    train(experiment)
    return output, Path(experiment.data.located().root)


@pytest.fixture
def image_info(run, tmp_path):
    """As COCO publishes it for test-dev: images and categories, no annotations."""
    _, root = run
    content = json.loads((root / "annotations/instances_val2017.json").read_text())
    path = tmp_path / "image_info_test-dev2017.json"
    path.write_text(json.dumps({key: content[key] for key in ("images", "categories")} | {"info": {}, "licenses": []}))
    return path


def test_the_files_are_those_of_the_server(run, image_info, capsys):
    output, root = run
    images = str(root / "val2017")
    assert main(["evaluate", str(output), "--image-info", str(image_info), "--images", images, "--flip"]) == 0
    assert "5 test images, 2 view(s) of each" in capsys.readouterr().out
    content = json.loads(image_info.read_text())
    known_images = {image["id"]: image for image in content["images"]}
    known_ids = {category["id"] for category in content["categories"]}
    name = "detections_test-dev2017_tiny_results"
    found = {}
    for kind, field in (("bbox", "bbox"), ("segm", "segmentation")):
        with zipfile.ZipFile(output / "test-dev2017" / "detection" / kind / f"{name}.zip") as archive:
            assert archive.namelist() == [f"{name}.json"]
            found[kind] = json.loads(archive.read(f"{name}.json"))
        assert found[kind]
        for entry in found[kind]:
            assert set(entry) == {"image_id", "category_id", "score", field}
            assert entry["category_id"] in known_ids
            assert 0 <= entry["score"] <= 1
    assert len(found["bbox"]) == len(found["segm"])
    for box, mask in zip(found["bbox"], found["segm"]):
        image = known_images[box["image_id"]]
        x, y, width, height = box["bbox"]
        assert min(x, y, width, height) >= 0
        assert x + width <= image["width"] + 1e-2
        assert y + height <= image["height"] + 1e-2
        assert mask["segmentation"]["size"] == [image["height"], image["width"]]
        assert isinstance(mask["segmentation"]["counts"], str)
    # It is no evaluation: what a run says of itself is as it was.
    assert not (output / "evaluation.json").exists()
    assert not (output / "results_detection.json").exists()


def test_names_are_what_the_server_can_take_apart(tmp_path):
    entry = {"image_id": 1, "category_id": 2, "score": 0.5, "bbox": [0, 0, 1, 1]}
    (path,) = write_zips([entry], tmp_path, "test-dev2017", "paper_table5 giant/htc")
    assert path == tmp_path / "bbox" / "detections_test-dev2017_papertable5gianthtc_results.zip"


def test_other_classes_and_missing_files_are_refused(run, image_info, tmp_path, capsys):
    output, root = run
    content = json.loads(image_info.read_text())
    content["categories"][0]["name"] = "oval"
    other = tmp_path / "image_info_other.json"
    other.write_text(json.dumps(content))
    command = ["evaluate", str(output), "--image-info"]
    assert main([*command, str(other), "--images", str(root / "val2017")]) == 2
    assert "the server would take one for another" in capsys.readouterr().err
    assert main([*command, str(image_info), "--images", str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder of images" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "none.json"), "--images", str(root / "val2017")]) == 2
    assert "there is no such annotation file" in capsys.readouterr().err
    assert main([*command, str(image_info)]) == 2
    assert "belong together" in capsys.readouterr().err
