"""Run a trained run on files of one's own, images or videos as its data has them: results are drawn and listed as JSON."""

from __future__ import annotations

import glob
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.data.errors import DataError
from permafrost.launcher.errors import CheckpointError, RunFolderError
from permafrost.launcher.files import write_atomically
from permafrost.launcher.run.folder import RunFolder

if TYPE_CHECKING:
    from permafrost.launcher.run.restore import TrainedRun

PREDICTIONS = "predictions.json"


@dataclass
class Predictions:
    """Outcome of `predict_run`.

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
    score_threshold: float | None = None,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> Predictions:
    """Run a head on files and draw what it says.

    An input that cannot be read is listed in what is returned, and the others go on. Inputs are only read: a picture
    whose name would fall on an input file gets another name. An image's `image_id` in the JSON is its position among
    all inputs found, in order, from 0.

    Args:
        run: a run folder.
        inputs: files, folders (searched with everything below them) and glob patterns.
        output: folder for <name>.png (<name>.mp4 of a video) of each input and predictions.json; made if it is missing,
            files of the same names are replaced.
        head: which head; None when the run has one.
        which: "best" or "latest" checkpoint of it.
        score_threshold: what has a lower score is neither drawn nor listed; None is the task's own.
        device: as for training.
        say: prints a line.

    Raises:
        RunFolderError: the folder holds no run, or the output cannot be written.
        CheckpointError: no such head, or no valid checkpoint of it.
    """
    trained_folder = RunFolder(run)
    data = trained_folder.experiment().data
    files, failures = find_inputs(inputs, data.input_suffixes, data.input_kind)
    done = Predictions(failures=failures)
    if not files:
        return done
    folder = _prepare_output(Path(output))

    # Only now: a mistyped name is answered without waiting for torch.
    from permafrost.launcher.ranks.process_group import join_process_group
    from permafrost.launcher.run.restore import load_trained

    group = join_process_group(device)
    try:
        trained = load_trained(trained_folder, group, heads=None if head is None else [head], which=which)
        if len(trained.heads) > 1:
            raise CheckpointError(f"{trained.folder} has the heads {', '.join(trained.heads)}: choose one with --head")
        ((name, path),) = trained.checkpoints.items()
        say(f"head {name}: {path}, on {group.device}")
        _predict_files(trained, files, folder, score_threshold, done, say)
    finally:
        group.close()
    if not done.pictures:
        return done
    target = folder / PREDICTIONS
    try:
        write_atomically(target, json.dumps(done.results) + "\n")
    except OSError as error:
        raise RunFolderError(f"{target} cannot be written: {error.strerror or error}") from None
    say(f"{len(done.pictures)} pictures and {PREDICTIONS} in {folder}")
    return done


def find_inputs(inputs: Sequence[str], suffixes: Set[str], kind: str) -> tuple[list[Path], dict[str, str]]:
    """Return the files that inputs stand for, in order, each once; and why an input stands for none, by the input.

    Args:
        inputs: as of `predict_run`.
        suffixes: which files of a folder are taken.
        kind: what they are, in a word.
    """
    found: dict[Path, Path] = {}
    failures: dict[str, str] = {}
    for given in inputs:
        files = _expand(given, suffixes, kind)
        if isinstance(files, str):
            failures[given] = files
            continue
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values()), failures


def _expand(given: str, suffixes: Set[str], kind: str) -> list[Path] | str:
    path = Path(given).expanduser()
    # What exists is meant literally, even with brackets in its name.
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
        return files or f"the folder holds no {kind} ({', '.join(sorted(suffixes))})"
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        return [match for match in matches if match.is_file()] or "no file matches this pattern"
    return "there is no such file or folder"


def picture_names(files: Sequence[Path], ending: str = ".png") -> list[str]:
    """Return a file name with this ending for each input, all different, even where the file system ignores case.

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
        unique.append(f"{candidate}{ending}")
    return unique


def _prepare_output(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunFolderError(
            f"--output {folder} is not a folder that can be written: {error.strerror or error}"
        ) from None
    return folder


def _predict_files(
    trained: TrainedRun,
    files: Sequence[Path],
    folder: Path,
    threshold: float | None,
    done: Predictions,
    say: Callable[[str], None],
) -> None:
    reader, inputs = trained.reader, {file.resolve() for file in files}
    for index, (file, name) in enumerate(zip(files, picture_names(files, reader.suffix))):
        target = folder / name
        while target.resolve() in inputs:
            target = target.with_stem(f"{target.stem}_predicted")
        try:
            ((result, source),) = trained.look([file], score_threshold=threshold, first=index)
        except DataError as error:
            done.failures[str(file)] = str(error).removeprefix(f"{file}: ")
            continue
        done.results += reader.entries(result, file)
        try:
            reader.write(source, result, target)
        except OSError as error:
            raise RunFolderError(f"{target} cannot be written: {error.strerror or error}") from None
        done.pictures[file] = target
        say(f"{file}: {reader.describe(result)} -> {target}")
