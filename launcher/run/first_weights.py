"""Heads that start from another run's head, or from a released one: what is taken over, and what begins anew.

A tensor is taken where one of its name and shape is there and means the same: what belongs to classes (found by building the
head for one class more and looking which shapes change) only if the classes are the same ones in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from permafrost.heads.build import build_head
from permafrost.heads.released import FILES, KNOWN, read_released
from permafrost.launcher.errors import CheckpointError
from permafrost.launcher.files import write_atomically
from permafrost.launcher.run.checkpoint import HEAD_FILE, load_head
from permafrost.launcher.run.fine_tune import FineTuned
from permafrost.model.weights.formats import choose_state_dict
from permafrost.model.weights.safe_pickle import read_pickle

if TYPE_CHECKING:
    from permafrost.heads.base import Head
    from permafrost.launcher.experiment import Experiment, HeadExperiment
    from permafrost.launcher.ranks.process_group import ProcessGroup
    from permafrost.launcher.run.parts import TrainingParts
    from permafrost.launcher.run.session import Session
    from permafrost.model.spec import FeatureSpec

REPORT = "init_head.json"
_OWN = "head."
"""Before a head's names in the checkpoint of a run that trained its backbone, too."""


@dataclass
class Source:
    """Source of a head's first weights.

    Attributes:
        path: of the checkpoint.
        tensors: by a head's own names.
        classes: in the order of the labels.
        fingerprint: of the backbone that they were trained on; None where it is not known.
        notes: what was done to them.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    classes: list[str]
    fingerprint: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Start:
    """Account of what a head took from its source.

    Attributes:
        path: of the checkpoint.
        taken: names.
        fresh: of each tensor that was initialised anew, why.
        unused: names in the source that this head has not.
        notes: what else is worth knowing.
    """

    path: str
    taken: list[str]
    fresh: dict[str, str]
    unused: list[str]
    notes: list[str]

    def lines(self, name: str) -> list[str]:
        """Return what a person reads of it: every tensor that was initialised anew."""
        found = [
            f"head {name}: {len(self.taken)} of {len(self.taken) + len(self.fresh)} tensors start from {self.path}"
        ]
        found += [f"  {note}" for note in self.notes]
        found += [f"  initialised anew: {tensor} ({reason})" for tensor, reason in self.fresh.items()]
        if self.unused:
            found.append(f"  {len(self.unused)} tensors there have no place here ({REPORT} lists them)")
        return found


def start_heads(experiment: Experiment, parts: TrainingParts, group: ProcessGroup) -> dict[str, Start]:
    """Give heads the weights that `init` names, in place, before any engine has them. Collective.

    Returns:
        of each such head, what it took.

    Raises:
        CheckpointError: there is no such head, or nothing of it fits.
        WeightsError, HeadError: a file that cannot be read, or is not one that is known.
    """
    return {
        name: group.on_all(lambda: _start(experiment, name, config, parts))  # noqa: B023 - called at once
        for name, config in experiment.heads.items()
        if config.init is not None
    }


def _start(experiment: Experiment, name: str, config: HeadExperiment, parts: TrainingParts) -> Start:
    assert config.init is not None
    source = read_source(config.init, name)
    head = parts.heads[name]
    own = head.head if isinstance(head, FineTuned) else head
    classes = list(parts.train_set.classes)
    start = take_over(own, source, classes, class_tensors(config, parts.backbone.spec, classes))
    if source.fingerprint is not None and source.fingerprint != parts.backbone.fingerprint:
        start.notes.append("it was trained on another backbone, whose features it knows; here they differ")
    return start


def read_source(path: str, head: str) -> Source:
    """Return another run's head, or that of a released network.

    Args:
        path: a run folder, one of its checkpoint folders, or a PyTorch file.
        head: the name there, if there is one of that name; else the only one is taken.

    Raises:
        CheckpointError: nothing there.
        WeightsError, HeadError: a file that cannot be read, or holds no head that is known.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return _read_released(place)
    if not place.is_dir():
        raise CheckpointError(f"heads.*.init is {path!r}: there is no such run folder, checkpoint folder or file")
    checkpoint = load_head(place, head if head in _heads_in(place) else None)
    ((_, state),) = checkpoint.heads.items()
    tensors = state.weights | state.buffers
    notes = []
    if any(name.startswith("backbone.") for name in tensors):
        # That run trained its backbone along: this one has its own.
        tensors = {name.removeprefix(_OWN): tensor for name, tensor in tensors.items() if name.startswith(_OWN)}
        notes.append("its backbone was trained with it and is not taken along")
    fingerprint = None if notes else checkpoint.state.backbone["fingerprint"]
    return Source(checkpoint.path, tensors, checkpoint.state.classes, fingerprint, notes)


def _heads_in(folder: Path) -> set[str]:
    """Return the names of the heads in a checkpoint folder, or in any of a run folder's."""
    return {file.parent.name for pattern in ("*", "checkpoints/*/*") for file in folder.glob(f"{pattern}/{HEAD_FILE}")}


def _read_released(path: Path) -> Source:
    loaded, _ = read_pickle(path)
    tensors, _ = choose_state_dict(loaded, path=path, weights_key=None)
    released = read_released(tensors, checkpoint=loaded, file=path.name)
    if released is None:
        raise CheckpointError(
            f"heads.*.init is {path}, which holds neither a run's head nor {KNOWN}: give a run folder, {FILES}"
        )
    return Source(path, released.tensors, released.classes, None, released.notes)


def class_tensors(config: HeadExperiment, spec: FeatureSpec, classes: Sequence[str]) -> set[str]:
    """Return the names of the tensors whose rows belong to classes: those with another shape when there is one class more."""
    shapes = []
    for names in (list(classes), [*classes, "one more"]):
        with torch.device("meta"):
            state = build_head(config.model, spec=spec, classes=names).state_dict()
        shapes.append({name: tensor.shape for name, tensor in state.items()})
    return {name for name, shape in shapes[0].items() if shapes[1].get(name) != shape}


def take_over(head: Head, source: Source, classes: Sequence[str], of_classes: set[str]) -> Start:
    """Copy into a head, in place, what of the source fits.

    Args:
        head: on any device.
        source: what to take from.
        classes: the head's own, in the order of the labels.
        of_classes: names of the tensors whose rows belong to classes.

    Raises:
        CheckpointError: nothing fits.
    """
    same_classes = list(classes) == list(source.classes)
    taken, fresh = [], {}
    state = head.state_dict()
    for name, tensor in state.items():
        given = source.tensors.get(name)
        if given is None:
            fresh[name] = f"{_shape(tensor)}: not there"
        elif given.shape != tensor.shape:
            fresh[name] = f"{_shape(tensor)}: there it is {_shape(given)}"
        elif name in of_classes and not same_classes:
            fresh[name] = f"{_shape(tensor)}: there it is of other classes"
        else:
            taken.append(name)
    if not taken:
        raise CheckpointError(
            f"heads.*.init is {source.path}: none of its {len(source.tensors)} tensors fits this head, for example "
            + "; ".join(f"{name} {reason}" for name, reason in list(fresh.items())[:3])
        )
    with torch.no_grad():
        for name in taken:
            if not bool(source.tensors[name].isfinite().all()):
                raise CheckpointError(
                    f"heads.*.init is {source.path}: its {name} is not finite; take another checkpoint"
                )
            state[name].copy_(source.tensors[name])
    notes = list(source.notes)
    if not same_classes:
        notes.append(f"{len(source.classes)} classes there, {len(classes)} here, and not the same in the same order")
    return Start(str(source.path), taken, fresh, sorted(source.tensors.keys() - state.keys()), notes)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def announce_starts(session: Session, starts: Mapping[str, Start]) -> None:
    """Print what every head took and what not, and keep it in the run folder. Main rank only."""
    if not starts or not session.group.is_main:
        return
    for name, start in starts.items():
        for line in start.lines(name):
            session.monitor.say(line)
    content = json.dumps({name: asdict(start) for name, start in starts.items()}, indent=2) + "\n"
    session.attempt(REPORT, lambda: write_atomically(session.run.path / REPORT, content))
