"""A run folder: everything one training wrote, and what decides whether a command may go on in it.

- recipe.json: the resolved Experiment
- provenance.jsonl: one line per start: versions, git commit, command, world, batch, learning rates, where it resumed
- heartbeats/: one small file per rank, see ranks/heartbeat.py
- metrics.jsonl, tensorboard/: one line, or point, per logged step
- evaluations.jsonl: one line per evaluation; final.json: the last one, once the run has ended
- checkpoints/step_00000100/; latest and best say which is the newest, and which the best of each head
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from permafrost.launcher.errors import RunFolderError
from permafrost.launcher.experiment import Experiment
from permafrost.launcher.files import append_json_line, read_json_lines, write_atomically
from permafrost.launcher.provenance import surroundings
from permafrost.launcher.recipes.serialise import MISSING, differing_fields, experiment_from_json, to_json

RECIPE_FORMAT = 1
RESUME_CHOICES = ("auto", "must", "never")

SMALL_FILES = 2**16
"""Bytes that must be free at a start, for what it writes besides checkpoints."""

FREE_FIELDS = (
    "output",
    "loop.log_every",
    "loop.image_every",
    "loop.checkpoint_every",
    "loop.keep_checkpoints",
    "loop.num_workers",
    "loop.worker_timeout",
    "loop.process_group_timeout",
    "loop.evaluation_batch",
    # How the same global batch is spread over processes, and which engine steps it, changes rounding only: a run can
    # move to another machine. Precision is not among them.
    "engine.kind",
    "engine.zero_stage",
    "engine.deepspeed_config",
    "engine.accumulation",
    "engine.offload",
    "backbone.checkpoint_activations",
    "mesh.tensor",
)
"""Fields in which a resumed run may differ from the one in the folder, since they do not change what is learned."""


class RunFolder:
    """Paths and small files of one run; checkpoint.py and monitor.py write the heavy ones.

    Only the main rank writes. Every file that is replaced is replaced atomically.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.json"
        self.provenance = self.path / "provenance.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.final = self.path / "final.json"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.heartbeats = self.path / "heartbeats"
        self.latest = self.path / "latest"
        self.best = self.path / "best"
        self._lock: int | None = None
        self._is_new = False
        self._experiment: Experiment | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @staticmethod
    def of(experiment: Experiment) -> RunFolder:
        """Return the folder this experiment writes: its `output`, else runs/<name>."""
        return RunFolder(experiment.output or Path("runs") / experiment.name)

    @property
    def holds_run(self) -> bool:
        """Return whether a training has started here before."""
        return self.recipe.exists()

    @property
    def checkpoint_folders(self) -> list[Path]:
        """Return the complete checkpoints, newest first. Folders still being written have other names."""
        if not self.checkpoints.is_dir():
            return []
        found = [path for path in self.checkpoints.iterdir() if path.is_dir() and path.name.startswith("step_")]
        return sorted(
            (path for path in found if path.name[5:].isdecimal()), key=lambda path: int(path.name[5:]), reverse=True
        )

    def checkpoint_folder(self, step: int) -> Path:
        """Return where the checkpoint after `step` steps lies."""
        return self.checkpoints / f"step_{step:08d}"

    def prepare(self, experiment: Experiment, resume: str = "auto") -> Literal["new", "resume"]:
        """Decide whether this experiment may run here, and make the folder ready. Nothing heavy has happened yet.

        Args:
            experiment: what is about to be trained.
            resume: auto goes on where the folder's run stands or starts one; must refuses a folder without a
                checkpoint; never refuses a folder that holds a run.

        Returns:
            "resume" when a run is here already, "new" after writing recipe.json.

        Raises:
            RunFolderError: saying what is in the folder, what was expected and what to do. The folder is left as it
                was.
        """
        if resume not in RESUME_CHOICES:
            raise RunFolderError(f"--resume is {resume!r}: give {', '.join(RESUME_CHOICES)}")
        if resume == "never" and self.holds_run:
            raise RunFolderError(
                f"{self} already holds a run ({self._progress()}) and --resume is never: give another --output, remove "
                "the folder, or leave --resume out to continue that run"
            )
        if resume == "must" and not self.checkpoint_folders:
            found = "a run without any checkpoint" if self.holds_run else "no run"
            raise RunFolderError(
                f"--resume is must but {self} holds {found}: check --output, or leave --resume out to start one"
            )
        if self.holds_run:
            self._require_same_recipe(experiment)
        elif self.checkpoint_folders:
            raise RunFolderError(
                f"{self} holds checkpoints but no recipe.json: give another --output, or restore that file"
            )
        self._require_writable()
        self._acquire_lock()
        if self.holds_run:
            return "resume"
        content = {"format": RECIPE_FORMAT, "experiment": to_json(experiment)}
        write_atomically(self.recipe, json.dumps(content, indent=2) + "\n")
        self._is_new = True
        return "new"

    def require_place(self) -> None:
        """Refuse a path that can never become a run folder, without making anything: it takes no time.

        Raises:
            RunFolderError: it lies under a file, or in a folder or on a file system that cannot be written.
        """
        place = Path(os.path.abspath(self.path))
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise RunFolderError(f"cannot write to the run folder {self}: {place} is no folder; give another --output")
        if not os.access(place, os.W_OK | os.X_OK):
            raise RunFolderError(f"cannot write to the run folder {self}: {place} is read-only; give another --output")

    def withdraw(self) -> None:
        """Undo a `prepare` that returned "new", unless something was trained since.

        The user mends the command and gives it again; being another recipe, it would be refused. Main rank only.
        """
        if not self._is_new or self.metrics.exists() or self.checkpoint_folders:
            return
        self.recipe.unlink(missing_ok=True)
        # What is empty now was made by `prepare`; what is not stays.
        with contextlib.suppress(OSError):
            shutil.rmtree(self.heartbeats, ignore_errors=True)
            self.checkpoints.rmdir()
            (self.path / ".lock").unlink(missing_ok=True)
            self.path.rmdir()

    def experiment(self) -> Experiment:
        """Return the Experiment this run was started with; it is read once.

        Raises:
            RunFolderError: there is none, or it cannot be read.
        """
        if self._experiment is None:
            content = self._recipe_json()
            try:
                self._experiment = experiment_from_json(content)
            except ValueError as error:
                raise RunFolderError(f"{self.recipe}: {error}") from None
        return self._experiment

    def record_start(self, facts: dict[str, Any]) -> None:
        """Append one line to provenance.jsonl: the surroundings of this start and what the loop chose."""
        append_json_line(self.provenance, {**surroundings(), **facts})

    def record_evaluation(
        self, step: int, metrics: dict[str, dict[str, float]], best: dict[str, dict[str, Any]]
    ) -> None:
        """Append one evaluation and replace `best`.

        Args:
            step: steps trained when it was evaluated.
            metrics: of each head.
            best: of each head, the step and value of its best checkpoint so far.
        """
        append_json_line(self.evaluations, {"step": step, "metrics": metrics})
        write_atomically(self.best, json.dumps(best, indent=2) + "\n")

    def read_evaluations(self) -> list[dict[str, Any]]:
        """Return every evaluation of this run, oldest first; a line that a kill left unfinished is passed over."""
        return read_json_lines(self.evaluations)

    def has_evaluation(self, step: int) -> bool:
        """Return whether the heads were scored after this many steps."""
        return any(entry.get("step") == step for entry in self.read_evaluations())

    def read_best(self) -> dict[str, dict[str, Any]]:
        """Return, for each evaluated head, {"step", "metric", "value"}; empty before the first or when the file is damaged."""
        try:
            found = json.loads(self.best.read_text())
        except (OSError, ValueError):
            return {}
        sound = isinstance(found, dict) and all(
            isinstance(e, dict) and isinstance(e.get("step"), int) for e in found.values()
        )
        return found if sound else {}

    def rewind(self, step: int) -> None:
        """Forget the evaluations after `step`, which a resumed run makes again.

        metrics.jsonl and TensorBoard are the monitor's.
        """
        if self.evaluations.exists():
            kept = [line for line in self.read_evaluations() if line.get("step", 0) <= step]
            write_atomically(self.evaluations, "".join(json.dumps(line) + "\n" for line in kept))
        self.final.unlink(missing_ok=True)

    def write_final(self, content: dict[str, Any]) -> None:
        """Write final.json, which says that the run has ended; `content` is its step, metrics and stopped heads."""
        write_atomically(self.final, json.dumps(content, indent=2) + "\n")

    def read_final(self) -> dict[str, Any] | None:
        """Return what `write_final` wrote; None while the run has not ended."""
        try:
            return json.loads(self.final.read_text())
        except (OSError, ValueError):
            return None

    def evidence(self, head: str) -> Path:
        """Return the path of nonfinite_<head>.json: the samples and losses at which a head stopped."""
        return self.path / f"nonfinite_{head}.json"

    def write_replaced(self, reasons: dict[str, str]) -> None:
        """Write replaced_images.json: every training image that could not be read, with the reason."""
        write_atomically(self.path / "replaced_images.json", json.dumps(reasons, indent=2) + "\n")

    def write_train_images(self, image_ids: list[int]) -> None:
        """Write train_images.json: the ids of the images that are trained on."""
        write_atomically(self.path / "train_images.json", json.dumps(image_ids) + "\n")

    def close(self) -> None:
        """Let another process train here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _recipe_json(self) -> Any:
        if not self.holds_run:
            where = "no such folder" if not self.path.exists() else "it has no recipe.json"
            raise RunFolderError(
                f"{self} holds no run ({where}): give the folder that `permafrost train` printed as its run folder"
            )
        try:
            content = json.loads(self.recipe.read_text())
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{self.recipe} cannot be read: {error}") from None
        if not isinstance(content, dict) or content.get("format") != RECIPE_FORMAT:
            raise RunFolderError(
                f"{self.recipe} is not a recipe of format {RECIPE_FORMAT}: it was written by another version of "
                "permafrost"
            )
        return content.get("experiment")

    def _require_same_recipe(self, experiment: Experiment) -> None:
        # Decoding and encoding fills in defaults of fields that did not exist yet when the run was started.
        differences = differing_fields(to_json(self.experiment()), to_json(experiment))
        differences = [entry for entry in differences if entry[0] not in FREE_FIELDS]
        if differences:
            lines = "".join(
                f"\n  {name}: the run has {_shown(found)}, now {_shown(now)}" for name, found, now in differences
            )
            raise RunFolderError(
                f"{self} holds the run of another recipe ({self._progress()}):{lines}\n"
                "give another --output, put these fields back to continue that run, or remove the folder"
            )

    def _require_writable(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path, prefix=".writable_") as probe:
                probe.write(bytes(SMALL_FILES))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise RunFolderError(
                f"cannot write to the run folder {self}: {error.strerror or error}; give another --output"
            ) from None

    def _acquire_lock(self) -> None:
        if self._lock is not None:
            return
        # A record lock: data workers do not inherit it, so it ends with this process even when that is killed.
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise RunFolderError(
                f"another process is training in {self}: wait for it, or give another --output"
            ) from None
        except OSError:
            os.close(lock)  # a file system without locks: nothing to hold, and no reason to refuse
            return
        self._lock = lock

    def _progress(self) -> str:
        folders = self.checkpoint_folders
        return f"{len(folders)} checkpoint(s), the newest {folders[0].name}" if folders else "no checkpoint yet"


def _shown(value: Any) -> str:
    return value if value is MISSING else json.dumps(value)
