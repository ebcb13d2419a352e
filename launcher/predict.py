"""A trained run on images of one's own: pictures of what was found, and a JSON in COCO's results format."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.launcher.errors import CheckpointError, RunFolderError

if TYPE_CHECKING:
    from permafrost.data.types import DetectionResult
    from permafrost.launcher.trained import TrainedRun

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))
"""Which files of a folder are taken for images. A file that is named itself may have any name."""
PREDICTIONS = "predictions.json"


@dataclass
class Predictions:
    """What `predict_run` did.

    Attributes:
        pictures: picture written, by the input file it shows.
        failures: why an input could not be used, by its name as given or found.
        results: content of predictions.json.
    """

    pictures: dict[Path, Path] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)


def predict_run(
    run: str | os.PathLike[str],
    inputs: Sequence[str],
    output: str | os.PathLike[str],
    *,
    head: str | None = None,
    which: str = "best",
    score_threshold: float = 0.5,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> Predictions:
    """Find and draw objects in images.

    An input that cannot be read is listed in what is returned, and the others go on. Inputs are only read: a picture
    whose name would fall on an input file gets another name. An image's `image_id` in the JSON is its position among
    all inputs found, in order, from 0.

    Args:
        run: a run folder.
        inputs: image files, folders (searched with everything below them) and glob patterns.
        output: folder for <name>.png of each image and predictions.json; made if it is missing, files of the same names
            are replaced.
        head: which head; None when the run has one.
        which: "best" or "latest" checkpoint of it.
        score_threshold: objects with a lower score are neither drawn nor listed.
        device: as for training.
        say: prints a line.

    Raises:
        RunFolderError: the folder holds no run, or the output cannot be written.
        CheckpointError: no such head, or no valid checkpoint of it.
    """
    files, failures = find_images(inputs)
    done = Predictions(failures=failures)
    if not files:
        return done
    folder = _prepare_output(Path(output))

    from permafrost.launcher.mesh import init_world
    from permafrost.launcher.trained import load_trained

    world = init_world(device)
    try:
        trained = load_trained(run, world, heads=None if head is None else [head], which=which)
        if len(trained.heads) > 1:
            raise CheckpointError(f"{trained.folder} has the heads {', '.join(trained.heads)}: say which with --head")
        ((name, path),) = trained.checkpoints.items()
        say(f"head {name}: {path}, on {world.device}")
        _predict_files(trained, files, folder, score_threshold, done, say)
    finally:
        world.close()
    if not done.pictures:
        return done
    target = folder / PREDICTIONS
    try:
        target.write_text(json.dumps(done.results) + "\n")
    except OSError as error:
        raise RunFolderError(f"{target} cannot be written: {error.strerror or error}") from None
    say(f"{len(done.pictures)} pictures and {PREDICTIONS} in {folder}")
    return done


def find_images(inputs: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """The files that inputs stand for, in order, each once; and why an input stands for none, by the input."""
    found: dict[Path, Path] = {}
    failures: dict[str, str] = {}
    for given in inputs:
        files = _expand(given)
        if isinstance(files, str):
            failures[given] = files
            continue
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values()), failures


def _expand(given: str) -> list[Path] | str:
    path = Path(given).expanduser()
    # What exists is meant literally, even with brackets in its name.
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        return files or f"the folder holds no image ({', '.join(sorted(SUFFIXES))})"
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        return [match for match in matches if match.is_file()] or "no file matches this pattern"
    return "there is no such file or folder"


def picture_names(files: Sequence[Path]) -> list[str]:
    """A file name ending in .png for each input, all different, even where the file system ignores case.

    The name is the input's; where several inputs share it, folders are put before it until they differ, then the suffix
    behind it, then a number.
    """

    def spelled(file: Path, depth: int, *, with_suffix: bool) -> str:
        folders = file.absolute().parts[1:-1][-depth:] if depth else []
        return "_".join([*folders, file.name.replace(".", "_") if with_suffix else file.stem])

    names = [file.stem for file in files]
    # A few folders tell most files apart; beyond, names would be unreadable.
    forms = [(1, False), (2, False), (3, False), (0, True), (3, True)]
    for depth, with_suffix in forms:
        clashes = {name for name, count in Counter(name.casefold() for name in names).items() if count > 1}
        if not clashes:
            break
        # Numbers of equal names grow together, so that siblings are named alike.
        longer = [spelled(file, depth, with_suffix=with_suffix) for file in files]
        names = [new if old.casefold() in clashes else old for old, new in zip(names, longer)]
    taken: set[str] = set()
    unique = []
    for name in names:
        candidate, number = name, 2
        while candidate.casefold() in taken:
            candidate, number = f"{name}_{number}", number + 1
        taken.add(candidate.casefold())
        unique.append(f"{candidate}.png")
    return unique


def _prepare_output(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".permafrost_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunFolderError(
            f"--output {folder} is not a folder that can be written: {error.strerror or error}"
        ) from None
    return folder


def _predict_files(
    trained: TrainedRun,
    files: Sequence[Path],
    folder: Path,
    score_threshold: float,
    done: Predictions,
    say: Callable[[str], None],
) -> None:
    from PIL import Image

    from permafrost.data.errors import DataError

    inputs = {file.resolve() for file in files}
    for image_id, (file, name) in enumerate(zip(files, picture_names(files))):
        target = folder / name
        while target.resolve() in inputs:
            target = target.with_stem(f"{target.stem}_predicted")
        try:
            result, image = predict_image(trained, file, image_id, score_threshold)
        except DataError as error:
            done.failures[str(file)] = str(error).removeprefix(f"{file}: ")
            continue
        done.results += results_json(result, trained, file)
        picture = draw_result(image, result, trained.classes)
        try:
            Image.fromarray(picture).save(target)
        except OSError as error:
            raise RunFolderError(f"{target} cannot be written: {error.strerror or error}") from None
        done.pictures[file] = target
        counts = Counter(trained.classes[label] for label in result.labels.tolist())
        found = ", ".join(f"{count} {label}" for label, count in counts.most_common()) or "nothing"
        say(f"{file}: {found} -> {target}")


def predict_image(
    trained: TrainedRun, file: Path, image_id: int, score_threshold: float
) -> tuple[DetectionResult, Any]:
    """One head on one image file.

    Returns:
        what was found from the threshold up, in pixels of the network's input and on the CPU; and the file's own image,
        (3, H, W) uint8.

    Raises:
        DataError: the file cannot be read.
    """
    import torch

    from permafrost.data.coco import inference_sample
    from permafrost.data.images import read_image
    from permafrost.data.transforms import FitTransform
    from permafrost.data.types import Batch, DetectionResult

    (runner,) = trained.heads.values()
    data = trained.experiment.data
    transform = FitTransform(data.image_size, data.evaluation)
    sample = inference_sample(file, data.image_size, image_id, transform)
    device = next(runner.head.parameters()).device
    batch = Batch(sample.image[None], [sample.target], [sample.key]).to(device)
    with torch.no_grad():
        found = runner(trained.backbone(batch.images), batch)[0].cpu()
    shown = found.scores >= score_threshold
    result = DetectionResult(
        image_id=found.image_id,
        boxes=found.boxes[shown],
        labels=found.labels[shown],
        scores=found.scores[shown],
        masks=None if found.masks is None else found.masks[shown],
        size=found.size,
        original_size=found.original_size,
    )
    return result, read_image(file)


def results_json(result: DetectionResult, trained: TrainedRun, file: Path) -> list[dict[str, Any]]:
    """Entries of COCO's results format in pixels of the file, with `file_name` besides, highest score first."""
    from permafrost.data.metrics.coco import CocoEvaluator

    height, width = result.original_size
    record = {"id": result.image_id, "file_name": str(file), "height": height, "width": width, "annotations": []}
    evaluator = CocoEvaluator([record], trained.classes, trained.category_ids)
    evaluator.update([result])
    return [{"image_id": entry["image_id"], "file_name": str(file), **entry} for entry in evaluator.results_json()]


def draw_result(image: Any, result: DetectionResult, classes: Sequence[str]) -> Any:
    """The file's own image (3, H, W) uint8 with the result drawn on it; (H', W', 3) uint8, small ones enlarged."""
    from permafrost.data.draw import draw_detections

    (height, width), (original_height, original_width) = result.size, result.original_size
    scale = result.boxes.new_tensor([original_width / width, original_height / height] * 2)
    return draw_detections(image, result.boxes * scale, result.labels, result.masks, result.scores, classes)
