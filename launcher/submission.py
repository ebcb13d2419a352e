"""Results on a test set whose annotations are not public, as COCO's evaluation server takes them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from permafrost.launcher.build import main_first
from permafrost.launcher.errors import CheckpointError, RecipeError, RunFolderError
from permafrost.launcher.evaluate import evaluate_heads
from permafrost.launcher.mesh import init_world
from permafrost.launcher.trained import load_trained

PREFIX = "image_info_"
"""Before a test set's name in its annotation file's: image_info_test-dev2017.json."""
KINDS = {"bbox": "bbox", "segm": "segmentation"}
"""What the server scores, and the field it reads of each entry."""
_COMMON = ("image_id", "category_id", "score")


def write_submission(
    run: str | os.PathLike[str],
    image_info: str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    which: str = "best",
    device: str = "auto",
    num_workers: int | None = None,
    evaluation: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """`permafrost evaluate RUN --image-info FILE --images FOLDER`: detections for COCO's server, nothing scored.

    For a test set of the name TEST (image_info_TEST.json) and a head HEAD, RUN/TEST/HEAD/bbox and .../segm each get a
    detections_TEST_NAME_results.zip with a .json of that name inside, as the server wants them; NAME is the recipe's.

    Args:
        run: the run folder.
        image_info: a JSON of COCO's with `images` and `categories`; annotations are not looked at.
        images: the folder of the images.
        which: "best" (of each head, by its metric) or "latest".
        device: as for training.
        num_workers: data workers; None takes the recipe's.
        evaluation: fields of the recipe's `data.evaluation` that are other ones here.
        say: prints a line.

    Returns:
        the zip files.

    Raises:
        RunFolderError: the folder holds no run.
        CheckpointError: no valid checkpoint, or one of other classes.
        RecipeError: the run is not of a detector.
        DataError: the JSON or the images cannot be used.
    """
    from permafrost.data.coco import CocoDetection
    from permafrost.data.config import CocoDataConfig

    world = init_world(device)
    say = say if world.is_main else _silent
    try:
        trained = load_trained(run, world, which=which)
        data = trained.experiment.data
        if not isinstance(data, CocoDataConfig):
            raise RecipeError(
                f"{trained.folder} was trained on a {type(data).__name__}: only detectors have such results"
            )
        given = CocoDataConfig(
            root=os.sep,
            val_annotations=str(Path(image_info).expanduser().absolute()),
            val_images=str(Path(images).expanduser().absolute()),
            image_size=data.image_size,
            evaluation=dataclasses.replace(data.evaluation, **(evaluation or {})),
        )
        dataset = main_first(world, lambda: CocoDetection.from_config(given, train=False, labelled=False))
        if (dataset.classes, dataset.category_ids) != (trained.classes, trained.category_ids):
            raise CheckpointError(
                f"{trained.folder} was trained on {len(trained.classes)} classes with the ids {trained.category_ids}, {image_info} "
                f"has {len(dataset.classes)} with {dataset.category_ids}, or other names: the server would take one for another"
            )
        for name, path in trained.checkpoints.items():
            say(f"head {name}: {path}")
        say(f"{len(dataset.records)} test images, {dataset.num_views} view(s) of each, on {world.device}")
        loop = trained.experiment.loop
        loop = loop if num_workers is None else dataclasses.replace(loop, num_workers=num_workers)
        folder = trained.folder.path
        evaluate_heads(trained.heads, trained.backbone, dataset, world, loop, results_folder=folder, say=say)
        if not world.is_main:
            return []
        test = Path(image_info).stem.removeprefix(PREFIX)
        written = []
        for name in trained.heads:
            # What evaluate_heads wrote has boxes and masks together.
            together = folder / f"results_{name}.json"
            results = json.loads(together.read_text())
            together.unlink()
            written += write_zips(results, folder / test / name, test, trained.experiment.name)
        for path in written:
            say(f"written: {path}")
        return written
    finally:
        world.close()


def write_zips(results: list[dict[str, Any]], folder: Path, test: str, algorithm: str) -> list[Path]:
    """One zip for each kind that the entries have, in a folder of that kind.

    Args:
        results: entries of COCO's results format with boxes and, or not, masks.
        folder: gets the folders bbox and segm.
        test: name of the test set, such as test-dev2017.
        algorithm: what the results are called by on the server; what is no letter, digit, dot or hyphen in it is taken out.

    Raises:
        RunFolderError: they cannot be written.
    """
    # The server takes the name apart at the underscores.
    stem = f"detections_{test}_{re.sub('[^A-Za-z0-9.-]', '', algorithm)}_results"
    written = []
    for kind, field in KINDS.items():
        if results and field not in results[0]:
            continue
        content = json.dumps([{**{key: entry[key] for key in _COMMON}, field: entry[field]} for entry in results])
        path = folder / kind / f"{stem}.zip"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(f"{stem}.json", content)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written: {error.strerror or error}") from None
        written.append(path)
    return written


def _silent(text: str) -> None:
    pass
