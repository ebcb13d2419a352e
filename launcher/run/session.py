"""The state of one call of `train`, and how it is taken up from a checkpoint, saved, scored and ended.

The loop itself is in train.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from permafrost.launcher.engines.base import Engine, HeadState
from permafrost.launcher.engines.choose import build_engine
from permafrost.launcher.errors import CheckpointError, Interrupted, RecipeError, TrainingStopped
from permafrost.launcher.files import write_atomically
from permafrost.launcher.run.checkpoint import Checkpoint, TrainingState, is_finite, save_checkpoint
from permafrost.launcher.run.ema import Average
from permafrost.launcher.run.meters import CommunicationMeter, Stopwatch, Window
from permafrost.launcher.run.parts import TrainingParts
from permafrost.launcher.run.scoring import Metrics, evaluate_heads, metrics_table

if TYPE_CHECKING:
    from permafrost.data.stream.records import ReplacementTracker
    from permafrost.launcher.experiment import Experiment, HeadExperiment
    from permafrost.launcher.ranks.heartbeat import Heartbeat
    from permafrost.launcher.ranks.process_group import ProcessGroup
    from permafrost.launcher.ranks.signals import Interruption
    from permafrost.launcher.run.folder import RunFolder
    from permafrost.launcher.run.monitor import Monitor


MEASURE_EVERY = 20
"""Steps, at least, from one whose collectives are timed to the next."""


@dataclass
class Trainee:
    """One head with what trains it.

    Attributes:
        learning_rate: for the run's global batch, before the schedule.
        skipped: steps that were not taken because something was not finite.
        in_a_row: the last of them, without a good one in between.
        evidence: what this rank saw in those.
        average: of its weights, where the recipe asks for one.
    """

    name: str
    config: HeadExperiment
    engine: Engine
    learning_rate: float
    skipped: int = 0
    in_a_row: int = 0
    evidence: list[dict[str, Any]] = field(default_factory=list)
    average: Average | None = None

    def rate(self, step: int, num_steps: int) -> float:
        """Return the learning rate of 0-based `step`."""
        return self.learning_rate * self.config.schedule.factor(step, num_steps)


@dataclass
class Session:
    """Everything that one call of `train` holds.

    Attributes:
        trainees: heads that still train, by name.
        stopped: step at which a head stopped, by name.
        best: of each evaluated head, the step and value of its best checkpoint.
        metrics: of the last evaluation.
        communication: times collectives, in a step now and then.
        window: what was measured since the last log line.
        save_error: why the last checkpoint could not be written; None when it was.
        failed_saves: checkpoints that could not be written since this start. The main rank knows.
    """

    experiment: Experiment
    group: ProcessGroup
    run: RunFolder
    monitor: Monitor
    parts: TrainingParts
    tracker: ReplacementTracker
    stopwatch: Stopwatch
    communication: CommunicationMeter
    heartbeat: Heartbeat
    interruption: Interruption
    trainees: dict[str, Trainee] = field(default_factory=dict)
    stopped: dict[str, int] = field(default_factory=dict)
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    window: Window = field(default_factory=Window)
    save_error: str | None = None
    failed_saves: int = 0

    def attempt(self, what: str, write: Callable[[], object]) -> None:
        """Write a small file; a full disk is a warning, and training goes on."""
        try:
            write()
        except OSError as error:
            self.monitor.warn(f"{what} could not be written ({error}): training goes on")

    @property
    def engines(self) -> dict[str, Engine]:
        """Return the engines of the heads that still train, by name."""
        return {name: trainee.engine for name, trainee in self.trainees.items()}


def open_session(
    experiment: Experiment,
    group: ProcessGroup,
    run: RunFolder,
    monitor: Monitor,
    parts: TrainingParts,
    checkpoint: Checkpoint | None,
    heartbeat: Heartbeat,
    interruption: Interruption,
) -> Session:
    """Give every head its engine and, where there is a checkpoint, its state. Collective.

    Raises:
        CheckpointError: the checkpoint belongs to another backbone, other data or other heads.
        RecipeError: a head's metric is not one that the data set's evaluator gives.
    """
    require_metrics(experiment, parts)
    if checkpoint is not None:
        checkpoint.require_backbone(name=experiment.backbone.name, fingerprint=parts.backbone.fingerprint)
        checkpoint.require_data(parts.train_set.fingerprint)
        checkpoint.require_fit(parts.heads)
    session = Session(
        experiment,
        group,
        run,
        monitor,
        parts,
        parts.train_set.tracker(),
        Stopwatch(group.device),
        CommunicationMeter(group.world_size, group.device, max(MEASURE_EVERY, experiment.loop.log_every)),
        heartbeat,
        interruption,
    )
    global_batch = experiment.loop.global_batch
    stopped = checkpoint.state.stopped if checkpoint else {}
    for name, config in experiment.heads.items():
        if name in stopped:
            continue
        engine = build_engine(
            parts.heads[name],
            optimizer=config.optimizer,
            engine=experiment.engine,
            group=group,
            global_batch=global_batch,
        )
        if checkpoint is not None:
            engine.import_state(checkpoint.heads[name])
        engine.train(True)
        trainee = Trainee(name, config, engine, config.optimizer.scaled_learning_rate(global_batch))
        session.trainees[name] = trainee
        if config.ema_decay is not None:
            trainee.average = Average(engine, config.ema_decay)
            if checkpoint is not None and (averages := checkpoint.heads[name].ema) is not None:
                trainee.average.load(averages, checkpoint.heads[name].step)
    if checkpoint is not None:
        session.stopped = dict(stopped)
        session.window = Window(checkpoint.state.loop["window"])
        session.tracker.update(list(checkpoint.state.loop["replaced"].items()))
        for name, counters in checkpoint.state.loop["heads"].items():
            session.trainees[name].skipped, session.trainees[name].in_a_row = counters["skipped"], counters["in_a_row"]
    if group.is_main:
        run.rewind(checkpoint.state.step if checkpoint else 0)
        for entry in run.read_evaluations():
            update_best(session, entry["step"], entry["metrics"])
            if checkpoint is not None and entry["step"] == checkpoint.state.step:
                session.metrics = entry["metrics"]
    return session


def require_metrics(experiment: Experiment, parts: TrainingParts) -> None:
    """Find out now, not at the first evaluation, whether `best` can be decided.

    Raises:
        RecipeError: naming the field and the metrics there are.
    """
    known = parts.val_set.metric_names()
    for name, config in experiment.heads.items():
        if config.metric is not None and config.metric not in known:
            raise RecipeError(f"heads.{name}.metric is {config.metric!r}: the evaluation gives {', '.join(known)}")


def save(session: Session, step: int, epoch: float) -> None:
    """Write a checkpoint of the heads that still train.

    Collective. A full disk is a warning: training goes on, the last good one stays.
    """
    states = {name: engine.export_state() for name, engine in session.engines.items()}
    for name, trainee in session.trainees.items():
        if trainee.average is not None:
            states[name].ema = trainee.average.export()
    for name in [name for name, state in states.items() if not is_finite(state)]:
        # Every rank holds the full state, so all of them decide alike.
        del states[name]
        session.monitor.warn(f"head {name}: its weights or moments are no longer finite")
        stop_head(session, session.trainees[name], step)
    if states:
        session.group.on_main(lambda: _write_checkpoint(session, states, step, epoch))


def _write_checkpoint(session: Session, states: dict[str, HeadState], step: int, epoch: float) -> None:
    loop, backbone = session.experiment.loop, session.parts.backbone
    counters = {name: {"skipped": t.skipped, "in_a_row": t.in_a_row} for name, t in session.trainees.items()}
    state = TrainingState(
        step=step,
        epoch=int(epoch),
        seed=loop.seed,
        global_batch=loop.global_batch,
        backbone={"name": session.experiment.backbone.name, "fingerprint": backbone.fingerprint},
        data=session.parts.train_set.fingerprint,
        classes=list(session.parts.train_set.classes),
        category_ids=list(session.parts.train_set.category_ids),
        stopped=session.stopped,
        loop={"window": session.window.state(), "heads": counters, "replaced": session.tracker.reasons},
    )
    protect = [entry["step"] for entry in session.best.values()]
    try:
        save_checkpoint(session.run, states, state, keep=loop.keep_checkpoints, protect=protect)
        session.save_error = None
    except OSError as error:
        session.save_error = f"the checkpoint of step {step} could not be written: {error}"
        session.failed_saves += 1
        session.monitor.warn(f"{session.save_error}; training goes on")


def evaluate(session: Session, step: int) -> None:
    """Score the heads that still train and note which is at its best. Collective.

    Raises:
        Interrupted: a signal has come; this step is saved already.
    """

    def show(name: str, pictures: Mapping[str, Any]) -> None:
        for title, picture in pictures.items():
            session.monitor.image(step, f"{name}/{title}", picture)

    with ExitStack() as averages:
        for trainee in session.trainees.values():
            if trainee.average is not None:
                averages.enter_context(trainee.average.used())
        metrics = evaluate_heads(
            session.engines,
            session.parts.backbone,
            session.parts.val_set,
            session.group,
            session.experiment.loop,
            say=session.monitor.say,
            is_interrupted=lambda: session.interruption.received is not None,
            show=show if session.experiment.loop.image_every else None,
        )
    if metrics is None:
        end_interrupted(session, step)
    session.metrics = metrics
    if not session.group.is_main:
        return
    update_best(session, step, session.metrics)
    session.monitor.scalars(
        step, {f"{name}/{tag}": value for name, values in session.metrics.items() for tag, value in values.items()}
    )
    record = session.run.record_evaluation
    session.attempt(f"the evaluation of step {step}", lambda: record(step, session.metrics, session.best))
    for name, values in session.metrics.items():
        shown = session.parts.val_set.summary(values)
        mark = " (best so far)" if session.best.get(name, {}).get("step") == step else ""
        session.monitor.say(f"evaluated after step {step}: {name} {shown}{mark}")


def update_best(session: Session, step: int, metrics: Metrics) -> None:
    """Remember a head's checkpoint when its metric is above all before it. Main rank only."""
    if not session.run.checkpoint_folder(step).exists():
        return
    for name, values in metrics.items():
        metric = session.experiment.heads[name].metric or session.parts.val_set.headline
        # A size or class without any object has no AP: nothing to compare.
        value = values.get(metric)
        if value is not None and (name not in session.best or value > session.best[name]["value"]):
            session.best[name] = {"step": step, "metric": metric, "value": value}


def stop_head(session: Session, trainee: Trainee, step: int) -> None:
    """Give one head up: the others train on, its last good checkpoint stays, what it saw last is written down.

    Collective.
    """
    evidence = session.group.gather_objects(trainee.evidence)
    if session.group.is_main:
        path = session.run.evidence(trainee.name)
        session.monitor.warn(f"head {trainee.name} stops after step {step}; what it saw last is listed in {path}")
        content = {"head": trainee.name, "step": step, "ranks": evidence}
        session.attempt(path.name, lambda: write_atomically(path, json.dumps(content, indent=2) + "\n"))
    session.stopped[trainee.name] = step
    del session.trainees[trainee.name]


def end_interrupted(session: Session, step: int) -> NoReturn:
    """Leave the run as a signal has asked, its last step saved. Collective.

    Raises:
        Interrupted: saying where it goes on.
        CheckpointError: the checkpoint could not be written.
    """
    names = session.group.broadcast_object(session.group.gather_objects(session.interruption.received))
    who = ", ".join(f"{name} to rank {rank}" for rank, name in enumerate(names) if name is not None)
    error = session.group.broadcast_object(session.save_error)
    if error is not None:
        raise CheckpointError(f"ended by a signal ({who}), but {error}")
    raise Interrupted(f"saved after step {step} and ended by {who}: the same command goes on from there")


def finish(session: Session, step: int) -> dict[str, Any]:
    """Write final.json after `step` steps and print the table; every rank gets what was written. Collective.

    Raises:
        CheckpointError: the last checkpoint, or final.json, could not be written.
    """

    def write() -> dict[str, Any]:
        metrics = session.metrics if session.trainees else {}
        final = {"step": step, "metrics": metrics, "best": session.best, "stopped": session.stopped}
        if metrics:
            session.monitor.say(metrics_table(metrics, session.experiment.data.result_names))
        session.monitor.say(f"run folder: {session.run}")
        if session.save_error is not None:
            raise CheckpointError(f"{session.save_error}. Make room and run the same command again")
        try:
            session.run.write_final(final)
        except OSError as error:
            raise CheckpointError(
                f"{session.run.final} could not be written: {error}. Make room and run the same command again"
            ) from None
        return final

    return session.group.on_main(write)


def conclude(run: RunFolder, final: dict[str, Any]) -> Metrics:
    """Return the metrics of a run that has ended.

    Raises:
        TrainingStopped: not all of its heads have got through.
    """
    if final["stopped"]:
        heads = ", ".join(f"{name} (after step {step})" for name, step in final["stopped"].items())
        raise TrainingStopped(
            f"stopped by losses that were not finite: {heads}. {run}/nonfinite_<head>.json lists the samples; the last "
            "good checkpoint stays. A lower learning rate, a longer warm-up or optimizer.clip_norm usually helps; "
            "train anew with another --output"
        )
    return final["metrics"]
