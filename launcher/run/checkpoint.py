"""Write checkpoints of the heads and nothing else, so that a kill at any moment leaves a complete one behind.

Under checkpoints/step_00000100/:

- state.json: step, epoch, seed, fingerprint of the backbone, versions, sha256 of each file and of itself
- HEAD/head.safetensors: parameters and buffers, in the head's own names
- HEAD/optimizer.safetensors: exp_avg.NAME and exp_avg_sq.NAME of each parameter
- HEAD/ema.safetensors: where running averages are kept, those of each parameter

A folder is written under another name, synced to disk and renamed; only then does `latest` move. Reading one executes
nothing in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from permafrost._files import new_beside, replacing, sync
from permafrost.launcher.engines.base import HeadState
from permafrost.launcher.errors import CheckpointError
from permafrost.launcher.files import write_atomically
from permafrost.launcher.provenance import versions
from permafrost.launcher.run.folder import RunFolder

FORMAT = 1
STATE_FILE, HEAD_FILE, OPTIMIZER_FILE = "state.json", "head.safetensors", "optimizer.safetensors"
EMA_FILE = "ema.safetensors"


_LEFTOVER = re.compile(r"\.step_\d{8,}\.[0-9a-f]{12}\.(partial|removed)")


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, cut off or changed since it was written."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over."""


@dataclass
class TrainingState:
    """Content of state.json beside the checksums.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the training set done, rounded down.
        seed: of the run.
        global_batch: images per step.
        backbone: name and fingerprint of the frozen backbone that the heads were trained on.
        data: fingerprint of the training set.
        classes: of the data set, in the order of the heads' labels.
        category_ids: the data set's own numbers of those classes.
        stopped: step at which a head stopped because its loss was not finite, by name; it is not in this checkpoint.
        loop: the loop's own counters, so that a resumed run logs and decides as an uninterrupted one.
        versions: of the packages that wrote it.
    """

    step: int
    epoch: int
    seed: int
    global_batch: int
    backbone: dict[str, str]
    data: str
    classes: list[str]
    category_ids: list[int] = field(default_factory=list)
    stopped: dict[str, int] = field(default_factory=dict)
    loop: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)


@dataclass
class Checkpoint:
    """A verified checkpoint in memory."""

    path: Path
    state: TrainingState
    heads: dict[str, HeadState]

    def require_backbone(self, *, name: str, fingerprint: str) -> None:
        """Refuse to continue on another frozen backbone: the heads would read features they have never seen.

        Raises:
            CheckpointError: naming both.
        """
        saved = self.state.backbone
        if saved["fingerprint"] != fingerprint:
            raise CheckpointError(
                f"{self.path} was trained on the backbone {saved['name']} with fingerprint {saved['fingerprint']}, but "
                f"this one is {name} with fingerprint {fingerprint}: give the weights file of that run "
                "(backbone.weights), or train anew with another --output"
            )

    def require_data(self, fingerprint: str) -> None:
        """Refuse to continue on a training set that has changed: the stream of samples would be another one.

        Raises:
            CheckpointError: saying so.
        """
        if self.state.data != fingerprint:
            raise CheckpointError(
                f"{self.path} was trained on other training annotations or images (fingerprint {self.state.data}, now "
                f"{fingerprint}): restore the files of that run, or train anew with another --output"
            )

    def require_fit(self, heads: Mapping[str, nn.Module]) -> None:
        """Check every saved head's names and shapes against the built one.

        Raises:
            CheckpointError: naming the file and the tensors that differ.
        """
        for name, state in self.heads.items():
            if name not in heads:
                raise CheckpointError(f"{self.path} holds a head {name!r}, but the recipe has only {', '.join(heads)}")
            try:
                state.require_fit(*tensor_shapes(heads[name]))
            except CheckpointError as error:
                raise CheckpointError(f"{self.path / name}: {error}") from None


def tensor_shapes(head: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return the shapes of a head's parameters and of its saved buffers, by name. To be read before an engine partitions them."""
    parameters = {name: tuple(parameter.shape) for name, parameter in head.named_parameters()}
    buffers = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items() if name not in parameters}
    return parameters, buffers


def is_finite(state: HeadState) -> bool:
    """Return whether a head can be continued: no NaN or infinity in its parameters or moments."""
    parts = (state.parameters, state.exp_avg, state.exp_avg_sq, state.weights)
    return all(bool(tensor.isfinite().all()) for part in parts for tensor in part.values())


def save_checkpoint(
    run: RunFolder, heads: Mapping[str, HeadState], state: TrainingState, *, keep: int, protect: Collection[int] = ()
) -> Path:
    """Write one checkpoint, move `latest` to it, and delete those that are no longer wanted. Main rank only.

    Args:
        run: the run folder.
        heads: the exported state of every head that still trains.
        state: what belongs to it.
        keep: how many of the newest checkpoints stay.
        protect: steps whose checkpoints stay whatever their age: the best of each head. So does the last one of a
            stopped head.

    Returns:
        the folder of the checkpoint.

    Raises:
        CheckpointError: a tensor is not finite; nothing was written.
        OSError: the disk is full or gone. What was there before is untouched, the unfinished folder is removed.
    """
    for name, head in heads.items():
        if not is_finite(head):
            raise CheckpointError(f"head {name!r} is not finite at step {state.step}: not saved")
    target = run.checkpoint_folder(state.step)
    _remove_leftovers(run.checkpoints)
    try:
        with replacing(target, folder=True, durable=True) as partial:
            _write_folder(partial, heads, state)
            if target.exists():
                # Only a damaged one that a resumed run passed over can be in the way.
                target.replace(new_beside(target, "removed", folder=True))
        write_atomically(run.latest, target.name + "\n")
    except SafetensorError as error:
        raise OSError(f"cannot write {target}: {error}") from error
    _prune(run, state, keep=keep, protect=protect)
    return target


def load_newest(run: RunFolder) -> tuple[Checkpoint | None, list[str]]:
    """Load the newest checkpoint whose every file is as it was written.

    Returns:
        the checkpoint (None when the folder has none at all) and what was wrong with newer ones, in words.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    problems: list[str] = []
    folders = run.checkpoint_folders
    for folder in folders:
        try:
            return read_checkpoint(folder), problems
        except DamagedCheckpoint as error:
            problems.append(str(error))
    if folders:
        raise CheckpointError(
            f"none of the {len(folders)} checkpoint(s) in {run.checkpoints} is valid: {'; '.join(problems)}. "
            "Restore one from a backup, or start anew with another --output"
        )
    return None, problems


def read_checkpoint(folder: Path, heads: Collection[str] | None = None) -> Checkpoint:
    """Read a checkpoint, verifying every byte.

    Args:
        folder: checkpoints/step_...
        heads: which heads to read; None reads all that are in it.

    Raises:
        DamagedCheckpoint: a file is missing or not what was written.
        CheckpointError: another format, or a head that is not in it.
    """
    state, files = _read_state(folder)
    names = sorted({name.split("/")[0] for name in files})
    if heads is not None:
        missing = [name for name in heads if name not in names]
        if missing:
            raise CheckpointError(f"{folder} has no head {', '.join(missing)}: it holds {', '.join(names) or 'none'}")
        names = list(heads)
    return Checkpoint(folder, state, {name: _read_head(folder, name, files) for name in names})


def load_head(path: str | os.PathLike[str], head: str | None = None, which: str = "best") -> Checkpoint:
    """Load one trained head for evaluation or prediction.

    Args:
        path: a run folder, or one checkpoint folder (step_...).
        head: its name; None when there is only one.
        which: in a run folder, "best" (by the head's metric; the newest if nothing was evaluated yet) or "latest". A
            damaged one is passed over with a warning.

    Returns:
        a checkpoint whose `heads` holds that head only.

    Raises:
        CheckpointError: nothing there, nothing valid, or no such head.
    """
    if which not in ("best", "latest"):
        raise CheckpointError(f"checkpoint is {which!r}: give best or latest")
    path = Path(path)
    if (path / STATE_FILE).exists():
        return read_checkpoint(path, [_choose_head(path, head)])
    run = RunFolder(path)
    folders = run.checkpoint_folders
    if not folders:
        raise CheckpointError(
            f"{path} holds no checkpoint: give the folder of a run that was trained, or one of its checkpoints/step_*"
        )
    problems = []
    for folder in _preferred(run, folders, head, which):
        try:
            chosen = _choose_head(folder, head)
            if chosen in _read_state(folder)[0].stopped:
                continue
            checkpoint = read_checkpoint(folder, [chosen])
        except DamagedCheckpoint as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"{'; '.join(problems)}; {folder} is used instead", CheckpointWarning, stacklevel=2)
        return checkpoint
    raise CheckpointError(f"no checkpoint in {run.checkpoints} is valid: {'; '.join(problems)}")


def _preferred(run: RunFolder, folders: Sequence[Path], head: str | None, which: str) -> list[Path]:
    best = run.read_best()
    entry = best.get(head) if head is not None else next(iter(best.values())) if len(best) == 1 else None
    if which == "latest" or entry is None:
        return list(folders)
    first = run.checkpoint_folder(entry["step"])
    return [folder for folder in folders if folder == first] + [folder for folder in folders if folder != first]


def _choose_head(folder: Path, head: str | None) -> str:
    state, files = _read_state(folder)
    names = sorted({name.split("/")[0] for name in files} | set(state.stopped))
    if head is None:
        if len(names) != 1:
            raise CheckpointError(f"{folder} holds the heads {', '.join(names)}: choose one (--head)")
        return names[0]
    if head not in names:
        raise CheckpointError(f"{folder} has no head {head!r}: it holds {', '.join(names)}")
    return head


def _write_folder(folder: Path, heads: Mapping[str, HeadState], state: TrainingState) -> None:
    files = {}
    for name, head in heads.items():
        (folder / name).mkdir()
        moments = {f"exp_avg.{key}": tensor for key, tensor in head.exp_avg.items()}
        moments |= {f"exp_avg_sq.{key}": tensor for key, tensor in head.exp_avg_sq.items()}
        note = {"permafrost_head": name, "backbone_fingerprint": state.backbone["fingerprint"]}
        contents = {HEAD_FILE: {**head.parameters, **head.buffers}, OPTIMIZER_FILE: moments}
        contents |= {} if head.ema is None else {EMA_FILE: head.ema}
        for file_name, tensors in contents.items():
            path = folder / name / file_name
            safetensors.torch.save_file(
                {key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=note
            )
            # safetensors writes for the owner only; whoever may enter the folder may read what is in it.
            path.chmod(stat.S_IMODE(folder.stat().st_mode) & 0o666)
            sync(path)
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            files[f"{name}/{file_name}"] = {"sha256": sha256, "bytes": path.stat().st_size}
        sync(folder / name)
    content = {
        "format": FORMAT,
        **asdict(state),
        "heads": {
            name: {"optimizer_step": head.step, "buffers": sorted(head.buffers), "has_ema": head.ema is not None}
            for name, head in heads.items()
        },
        "files": files,
    }
    write_atomically(folder / STATE_FILE, json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n")


def _read_state(folder: Path) -> tuple[TrainingState, dict[str, dict[str, Any]]]:
    """Read state.json, verified by its own checksum; the second value describes each file and the head it belongs to."""
    path = folder / STATE_FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        raise DamagedCheckpoint(f"{path} does not have the checksum it was written with")
    if content.get("format") != FORMAT:
        found = content.get("format")
        raise CheckpointError(
            f"{path} has format {found}, this permafrost reads format {FORMAT}: use the version that wrote it"
        )
    try:
        state = TrainingState(**{entry.name: content[entry.name] for entry in fields(TrainingState)})
        described = {
            name: {**entry, **content["heads"][name.split("/")[0]]} for name, entry in content["files"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} does not have the expected structure: {error!r}") from None
    expected = {
        f"{name}/{file}"
        for name, entry in content["heads"].items()
        if name.isidentifier()
        for file in (HEAD_FILE, OPTIMIZER_FILE, *([EMA_FILE] if entry.get("has_ema") else []))
    }
    if set(described) != expected:
        raise DamagedCheckpoint(f"{path} lists {', '.join(sorted(described))}: expected {', '.join(sorted(expected))}")
    return state, described


def _read_head(folder: Path, name: str, files: Mapping[str, Mapping[str, Any]]) -> HeadState:
    tensors = _read_tensors(folder / name / HEAD_FILE, files[f"{name}/{HEAD_FILE}"])
    moments = _read_tensors(folder / name / OPTIMIZER_FILE, files[f"{name}/{OPTIMIZER_FILE}"])
    entry = files[f"{name}/{HEAD_FILE}"]
    buffers = {key: tensors.pop(key) for key in entry["buffers"]}
    split: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for key, tensor in moments.items():
        kind, _, parameter = key.partition(".")
        split[kind][parameter] = tensor
    averages = f"{name}/{EMA_FILE}"
    ema = _read_tensors(folder / averages, files[averages]) if averages in files else None
    return HeadState(tensors, buffers, split["exp_avg"], split["exp_avg_sq"], entry["optimizer_step"], ema)


def _read_tensors(path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from None
    if len(data) != entry["bytes"]:
        raise DamagedCheckpoint(f"{path} has {len(data)} bytes, {entry['bytes']} were written")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise DamagedCheckpoint(f"{path} does not have the checksum it was written with")
    return safetensors.torch.load(data)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _prune(run: RunFolder, state: TrainingState, *, keep: int, protect: Collection[int]) -> None:
    # What lies after this step is what a resumed run passed over as damaged; it is replaced when its step comes.
    folders = [folder for folder in run.checkpoint_folders if int(folder.name[5:]) <= state.step]
    wanted = set(folders[:keep]) | {run.checkpoint_folder(step) for step in protect}
    for name in state.stopped:
        wanted |= set([folder for folder in folders if (folder / name / HEAD_FILE).exists()][:1])
    for folder in folders:
        if folder not in wanted:
            # Renamed first: a kill in the middle must not leave half a folder under a valid name.
            folder.replace(new_beside(folder, "removed", folder=True))
    _remove_leftovers(run.checkpoints)


def _remove_leftovers(checkpoints: Path) -> None:
    """Remove what this run's processes were writing or removing when they were killed; the run folder is locked by this one.

    The names are such as `replacing` and `new_beside` alone give, and links are left where they are.
    """
    for leftover in checkpoints.iterdir():
        if _LEFTOVER.fullmatch(leftover.name) and leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
