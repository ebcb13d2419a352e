"""Results for COCO's evaluation server: on images without annotations, in its format and under its names."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from permafrost.data.build import located, submission_set, val_set
from permafrost.data.detection.server import server_files
from permafrost.launcher.cli import main
from permafrost.launcher.recipes.overrides import parse_experiment
from permafrost.launcher.train import train

RECIPE = f"{Path(__file__).with_name('tiny_recipe.py')}:tiny"


INFO = "annotations/image_info_test-dev2017.json"
NAME = "detections_test-dev2017_swinv2g.htc_results"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """A finished run whose data has a test set, and the data's root."""
    folder = tmp_path_factory.mktemp("run")
    root = located(parse_experiment(RECIPE, []).data).root
    shutil.copytree(root, folder / "data")
    write_info(folder / "data", lambda content: None)
    arguments = ["--output", str(folder / "run"), "--loop.num-steps", "2", "--loop.image-every", "0"]
    arguments += ["--heads.detection.model.box.score-threshold", "0.0", "--data.root", str(folder / "data")]
    train(parse_experiment(RECIPE, [*arguments, "--data.test-annotations", INFO]))
    return folder / "run", folder / "data"


def write_info(root, change) -> dict[str, Any]:
    """The annotation file as COCO publishes it for test-dev: images and categories, no annotations."""
    content = json.loads((root / "annotations/instances_val2017.json").read_text())
    content = {key: content[key] for key in ("images", "categories")} | {"info": {}, "licenses": []}
    change(content)
    (root / INFO).write_text(json.dumps(content))
    return content


def test_the_files_are_those_of_the_server(run, tmp_path, capsys) -> None:
    output, root = run
    content = write_info(root, lambda content: None)
    folder = tmp_path / "made here" / "swinv2_g.htc"
    before = sorted(path.name for path in output.iterdir())
    assert main(["evaluate", str(output), "--submission", str(folder), "--flip"]) == 0
    assert f"bbox/{NAME}.zip, segm/{NAME}.zip in {folder}" in capsys.readouterr().out
    known_images = {image["id"]: image for image in content["images"]}
    known_ids = {category["id"] for category in content["categories"]}
    found = {}
    for kind, field in (("bbox", "bbox"), ("segm", "segmentation")):
        with zipfile.ZipFile(folder / kind / f"{NAME}.zip") as archive:
            assert archive.namelist() == [f"{NAME}.json"]
            found[kind] = json.loads(archive.read(f"{NAME}.json"))
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
    assert sorted(path.name for path in output.iterdir()) == before


def test_annotations_of_a_test_set_are_not_looked_at(run) -> None:
    """The built-in world has no test set and takes its validation images for one."""
    _, root = run
    data = parse_experiment(RECIPE, ["--data.root", str(root)]).data
    dataset = submission_set(data, Path("here"))
    assert len(dataset) == len(val_set(data))
    assert not any(record["annotations"] for record in dataset.records)
    evaluator = dataset.evaluator()
    evaluator.merge([])
    assert evaluator.compute() == {}
    assert list(evaluator.result_files("detection")) == [
        f"{kind}/detections_val2017_here_results.zip" for kind in ("bbox", "segm")
    ]


def test_names_are_what_the_server_can_take_apart(tmp_path) -> None:
    entry = {"image_id": 1, "category_id": 2, "score": 0.5, "bbox": [0, 0, 1, 1]}
    (path,) = server_files([entry], Path("image_info_test-dev2017.json"), tmp_path / "paper_table5 giant")
    assert path == "bbox/detections_test-dev2017_papertable5giant_results.zip"


def test_other_classes_and_missing_files_are_refused(run, tmp_path, capsys) -> None:
    output, root = run
    command = ["evaluate", str(output), "--submission", str(tmp_path / "submission")]
    write_info(root, lambda content: content["categories"][0].update(name="oval"))
    assert main(command) == 2
    assert "the test images now have oval" in capsys.readouterr().err
    write_info(root, lambda content: content["categories"][-1].update(id=400))
    assert main(command) == 2
    assert "the server would take one for another" in capsys.readouterr().err
    (root / INFO).unlink()
    assert main(command) == 2
    assert f"{INFO}: there is no such annotation file" in capsys.readouterr().err
    write_info(root, lambda content: None)
    (tmp_path / "file").write_text("")
    assert main(["evaluate", str(output), "--submission", str(tmp_path / "file")]) == 2
    assert "cannot be written: " in capsys.readouterr().err
