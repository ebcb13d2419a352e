"""Run the training loop: one frozen forward, then each head's losses, backward and step; now and then a checkpoint.

    python -m permafrost.launcher.train RECIPE --field value ...

is `permafrost train RECIPE ...` for launchers that start modules: torchrun, deepspeed, accelerate launch, srun.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from permafrost.data.stream.loader import WorkerError, train_loader
from permafrost.data.stream.sampler import GlobalStream
from permafrost.heads.base import world_mean_counts
from permafrost.launcher.errors import USER_ERRORS
from permafrost.launcher.plan.out_of_memory import memory_explained
from permafrost.launcher.ranks.agreement import require_same_program
from permafrost.launcher.ranks.division import micro_batch_size
from permafrost.launcher.ranks.loss_counts import RecordedCounts
from permafrost.launcher.ranks.lost_ranks import among_ranks
from permafrost.launcher.ranks.process_group import join_process_group
from permafrost.launcher.ranks.signals import Interruption
from permafrost.launcher.run.checkpoint import load_newest
from permafrost.launcher.run.first_weights import announce_starts, start_heads
from permafrost.launcher.run.folder import RunFolder
from permafrost.launcher.run.meters import memory_peaks
from permafrost.launcher.run.monitor import Monitor
from permafrost.launcher.run.offload import ActivationOffload, KeptFeatures
from permafrost.launcher.run.parts import build_parts
from permafrost.launcher.run.pictures import Pictures
from permafrost.launcher.run.scoring import Metrics, metrics_table
from permafrost.launcher.run.session import (
    Session,
    Trainee,
    conclude,
    end_interrupted,
    evaluate,
    finish,
    open_session,
    save,
    stop_head,
)
from permafrost.launcher.run.startup import announce, count_parameters

if TYPE_CHECKING:
    from permafrost.data.types import Batch
    from permafrost.launcher.engines.base import Engine
    from permafrost.launcher.experiment import Experiment, LoopConfig
    from permafrost.launcher.ranks.heartbeat import Heartbeat
    from permafrost.launcher.ranks.process_group import ProcessGroup

PATIENCE = 3
"""Steps in a row with a loss or gradient that is not finite, after which a head stops."""


def train(experiment: Experiment, *, resume: str = "auto", device: str = "auto") -> Metrics:
    """Train an experiment's heads, from its run folder's newest checkpoint where there is one.

    Args:
        experiment: what to train; its run folder is `output`, else runs/<name>.
        resume: auto, must or never; see RunFolder.prepare.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        the final evaluation: of each head, the evaluator's values.

    Raises:
        Interrupted: by SIGTERM or SIGUSR1, after saving.
        RankLost: another rank died, stopped or hung.
        TrainingStopped: at the end, when a head's losses were not finite; the others have trained on.
        ValueError: one of launcher.errors.USER_ERRORS, for what a user can mend.
    """
    loop, accumulation = experiment.loop, experiment.engine.accumulation
    group = join_process_group(device, timeout=loop.process_group_timeout)
    run = RunFolder.of(experiment)
    try:
        require_same_program(experiment, group)
        group.require_mesh(experiment.mesh.tensor)
        micro_batch_size(global_batch=loop.global_batch, world_size=group.world_size, accumulation=accumulation)
        group.on_main(lambda: run.prepare(experiment, resume))
        if final := group.on_main(run.read_final):
            if group.is_main:
                table = metrics_table(final["metrics"], experiment.data.result_names)
                print(f"{run} has ended after {final['step']} steps\n{table}")
            return conclude(run, final)
        with (
            Interruption().catch() as interruption,
            among_ranks(group, run.heartbeats, loop.process_group_timeout) as heartbeat,
            memory_explained(experiment, group),
        ):
            final = start_and_train(experiment, group, run, heartbeat, interruption)
        return conclude(run, final)
    except USER_ERRORS:
        if group.is_main:
            run.withdraw()
        raise
    finally:
        run.close()
        group.close()


def start_and_train(
    experiment: Experiment, group: ProcessGroup, run: RunFolder, heartbeat: Heartbeat, interruption: Interruption
) -> dict[str, Any]:
    """Build everything, go on where the newest checkpoint stands, train to the end. Returns what final.json says."""
    loop = experiment.loop
    parts = build_parts(experiment, group)
    group.limit_collectives(loop.process_group_timeout)
    num_parameters = count_parameters(parts)
    checkpoint, problems = group.on_main(lambda: load_newest(run))
    start = checkpoint.state.step if checkpoint else 0
    starts = start_heads(experiment, parts, group) if checkpoint is None else {}
    with Monitor(
        run, num_steps=loop.num_steps, is_main=group.is_main, start_step=start, log_every=loop.log_every
    ) as monitor:
        session = open_session(experiment, group, run, monitor, parts, checkpoint, heartbeat, interruption)
        # Engines have made groups of their own.
        group.limit_collectives(loop.process_group_timeout)
        announce(session, num_parameters, checkpoint, problems)
        announce_starts(session, starts)
        del checkpoint
        done = train_steps(session, start)
        return finish(session, done)


def train_steps(session: Session, start: int) -> int:
    """Run the loop from step `start` to the last, or until no head is left; return the steps done."""
    experiment, group, parts, stopwatch = session.experiment, session.group, session.parts, session.stopwatch
    enter = session.heartbeat.enter
    loop, accumulation = experiment.loop, experiment.engine.accumulation
    stream = GlobalStream(len(parts.train_set), loop.seed)
    make_loader = functools.partial(
        train_loader,
        parts.train_set,
        stream,
        global_batch=loop.global_batch,
        rank=group.rank,
        world_size=group.world_size,
        accumulation=accumulation,
        num_steps=loop.num_steps,
        timeout=loop.worker_timeout,
    )
    offload = ActivationOffload(experiment.engine.offload, group.device)
    batches = iter(make_loader(start_step=start, num_workers=loop.num_workers))
    pictures = Pictures(parts.val_set, group.device)
    if start and evaluation_due(loop, start) and not group.on_main(lambda: session.run.has_evaluation(start)):
        # The run ended between the checkpoint and its evaluation.
        enter("evaluate", start)
        evaluate(session, start)
    stopwatch.take(loop.global_batch)
    for step in range(start, loop.num_steps):
        enter("data", step + 1)
        with stopwatch.host("data_wait"):
            try:
                # `accumulation` batches of images (B, 3, H, W) uint8, or of clips (B, T, 3, H, W).
                micro_batches = [next(batches).to(group.device) for _ in range(accumulation)]
            except WorkerError:
                if not session.interruption.wait(1.0):
                    raise
                # The signal went to all processes of the job. The other ranks wait for this step: it is loaded here.
                batches = iter(make_loader(start_step=step, num_workers=0))
                micro_batches = [next(batches).to(group.device) for _ in range(accumulation)]
        with session.communication.step():
            enter("backbone")
            with stopwatch.device("backbone"), torch.no_grad():
                # Of each micro-batch the maps (B, C_i, H / s_i, W / s_i), computed once for all heads.
                features = [offload.forward(parts.backbone, batch.images) for batch in micro_batches]
            enter("heads")
            with stopwatch.device("heads"):
                # By head and name, () float32 on the device; the gradients lie in the head's engine until `step_head`.
                losses = {
                    name: head_losses(engine, features, micro_batches, group, offload)
                    for name, engine in session.engines.items()
                }
                enter("step")
                # Every rank gets the same numbers, so all skip a step, stop a head or end the run together.
                means, interrupted = mean_over_ranks(losses, group, session.interruption)
                for trainee in list(session.trainees.values()):
                    step_head(session, trainee, step, means[trainee.name], micro_batches)
        # The maps would stay in memory beside the next step's.
        del features, losses
        track_replaced(session, micro_batches)
        done = step + 1
        stopwatch.count_step()
        session.monitor.progress(done, shown_losses(session))
        if done % loop.log_every == 0 or done == loop.num_steps:
            log(session, done, stream, offload)
        with stopwatch.paused():
            # First what can be lost, then what takes long: an evaluation that dies costs no step.
            if interrupted or done % loop.checkpoint_every == 0 or evaluation_due(loop, done):
                enter("checkpoint")
                save(session, done, stream.epoch(done, loop.global_batch))
            if not session.trainees:
                return done
            if interrupted:
                end_interrupted(session, done)
            if evaluation_due(loop, done):
                enter("evaluate")
                evaluate(session, done)
            if loop.image_every and done % loop.image_every == 0:
                for name, sheet in pictures.draw(session.engines, parts.backbone).items():
                    session.monitor.image(done, f"{name}/predicted_and_true", sheet)
    return loop.num_steps


def head_losses(
    engine: Engine,
    features: Sequence[KeptFeatures],
    micro_batches: Sequence[Batch],
    group: ProcessGroup,
    offload: ActivationOffload,
) -> dict[str, Tensor]:
    """Run forward and backward of one head over a step's micro-batches.

    Returns:
        each named loss, averaged over the micro-batches, without a graph.
    """
    counts = world_mean_counts
    if len(micro_batches) > 1:
        # The denominators belong to the whole step, so all of it is counted before the first backward.
        counts = RecordedCounts(group, len(micro_batches))
        with torch.no_grad(), buffers_restored(engine.head):
            for kept, batch in zip(features, micro_batches):
                engine(kept.take(), batch, counts.record)
        counts.fix()
    means: dict[str, Tensor] = {}
    for kept, batch in zip(features, micro_batches):
        maps = kept.take()
        with offload.saving(engine.head, kept, maps):
            losses = engine(maps, batch, counts)
        del maps
        # One backward a micro-batch, which frees its graph before the next forward.
        engine.backward(torch.stack(list(losses.values())).sum())
        for name, loss in losses.items():
            means[name] = means.get(name, 0) + loss.detach() / len(micro_batches)
    return means


@contextmanager
def buffers_restored(module: nn.Module) -> Iterator[None]:
    """Undo what a forward does to buffers, such as the running statistics of a norm."""
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in module.named_buffers():
            buffer.copy_(kept[name])


def mean_over_ranks(
    losses: dict[str, dict[str, Tensor]], group: ProcessGroup, interruption: Interruption
) -> tuple[dict[str, dict[str, float]], bool]:
    """Return the losses of all heads as numbers that every rank agrees on, and whether any rank is asked to end.

    One wait for the device, one reduction.
    """
    flat = {f"{head}/{name}": loss for head, own in losses.items() for name, loss in own.items()}
    values = torch.stack([loss.float() for loss in flat.values()]).tolist()
    asked = {"interrupted": float(interruption.received is not None)}
    means = group.all_reduce_mean(dict(zip(flat, values)) | asked)
    by_head = {head: {name: means[f"{head}/{name}"] for name in own} for head, own in losses.items()}
    return by_head, means["interrupted"] > 0


def step_head(
    session: Session, trainee: Trainee, step: int, losses: dict[str, float], micro_batches: Sequence[Batch]
) -> None:
    """Take one optimizer step of one head.

    If something is not finite it is skipped; after the third in a row the head stops.
    """
    total = sum(losses.values())
    grad_norm, is_good = None, False
    if math.isfinite(total):
        report = trainee.engine.step(trainee.rate(step, session.experiment.loop.num_steps))
        grad_norm, is_good = report.grad_norm, not report.skipped
    else:
        trainee.engine.skip_step()
    if is_good:
        trainee.in_a_row, trainee.evidence = 0, []
        if trainee.average is not None:
            trainee.average.update()
        values = {"loss": total, **losses, **({} if grad_norm is None else {"grad_norm": grad_norm})}
        session.window.add({f"{trainee.name}/{name}": value for name, value in values.items()})
        return
    trainee.skipped += 1
    trainee.in_a_row += 1
    samples = [
        {"epoch": key.epoch, "index": key.index} | target.ids()
        for batch in micro_batches
        for key, target in zip(batch.keys, batch.targets)
    ]
    trainee.evidence.append({"step": step + 1, "losses": losses, "grad_norm": grad_norm, "samples": samples})
    what = "gradient" if math.isfinite(total) else "loss"
    session.monitor.warn(f"head {trainee.name}: the {what} of step {step + 1} is not finite; the step is skipped")
    if trainee.in_a_row >= PATIENCE:
        stop_head(session, trainee, step + 1)


def track_replaced(session: Session, micro_batches: Sequence[Batch]) -> None:
    """Count training images that could not be read, over all ranks; past the budget the run stops. Collective.

    Raises:
        DataError: too many.
    """
    replaced = [entry for batch in micro_batches for entry in batch.replaced]
    if not session.group.any_true(bool(replaced)):
        return
    gathered = session.group.gather_objects(replaced) or []
    new = session.group.on_main(lambda: session.tracker.update([entry for own in gathered for entry in own]))
    for path, reason in new:
        session.monitor.warn(f"{path}: {reason}; its neighbour is used instead")
    if new and session.group.is_main:
        session.attempt("replaced_images.json", lambda: session.run.write_replaced(session.tracker.reasons))


def shown_losses(session: Session) -> dict[str, float]:
    """Return what a progress line shows: each head's mean loss since the last log line."""
    means = session.window.means()
    names = {name: name if len(session.experiment.heads) > 1 else "loss" for name in session.trainees}
    return {shown: means[f"{name}/loss"] for name, shown in names.items() if f"{name}/loss" in means}


def log(session: Session, done: int, stream: GlobalStream, offload: ActivationOffload) -> None:
    """Record what was measured since the last log line, and begin a new window."""
    loop = session.experiment.loop
    values = session.window.take()
    for name, trainee in session.trainees.items():
        values[f"{name}/learning_rate"] = trainee.rate(done - 1, loop.num_steps)
        values[f"{name}/skipped_steps"] = trainee.skipped
    values |= {"data/epoch": stream.epoch(done, loop.global_batch), "data/replaced_images": session.tracker.count}
    values["checkpoints/failed"] = session.failed_saves
    values |= session.stopwatch.take(loop.global_batch) | session.communication.take()
    values |= memory_peaks(session.group.device)
    if offload.mode != "off":
        saved = offload.take_statistics()
        values["offload/share"] = saved.offloaded_bytes / max(1, saved.saved_bytes)
        values["memory/offload_gib"] = offload.buffers.held_bytes / 2**30
    session.monitor.scalars(done, values)


def evaluation_due(loop: LoopConfig, done: int) -> bool:
    """Return whether the heads are scored after `done` steps."""
    return done == loop.num_steps or (loop.evaluate_every is not None and done % loop.evaluate_every == 0)


if __name__ == "__main__":
    from permafrost.launcher.cli import main
    from permafrost.launcher.ranks.exit import run_and_leave

    run_and_leave(lambda: main(["train", *sys.argv[1:]]))
