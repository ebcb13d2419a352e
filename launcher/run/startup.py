"""Announce a run at its start, printed and written into its folder: everything that was chosen, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from permafrost.launcher.engines.choose import choose_engine

if TYPE_CHECKING:
    from permafrost.launcher.run.checkpoint import Checkpoint
    from permafrost.launcher.run.parts import TrainingParts
    from permafrost.launcher.run.session import Session

SHORT = 12
"""Digits of a fingerprint that are printed; the run folder has all of them."""


OWN_LINE = ("name", "fingerprint", "num_parameters", "device", "mean", "std")


def count_parameters(parts: TrainingParts) -> dict[str, tuple[int, int]]:
    """Return (trainable, all) parameters of each head and of the backbone, by name; before engines partition them."""
    counts = {
        name: (
            sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
            sum(parameter.numel() for parameter in module.parameters()),
        )
        for name, module in parts.heads.items()
    }
    # One that is trained belongs to its head. Of a split one all of it is counted, not only this rank's part.
    return counts | {"backbone": (0, parts.backbone.num_parameters)}


def announce(
    session: Session, num_parameters: dict[str, tuple[int, int]], checkpoint: Checkpoint | None, problems: list[str]
) -> None:
    """Print the start-up lines and append them to provenance.jsonl and TensorBoard.

    Collective; the main rank prints and writes.
    """
    groups_across_nodes = session.group.groups_across_nodes(session.experiment.mesh.tensor)
    if not session.group.is_main:
        return
    facts = gather_facts(session, num_parameters, checkpoint, problems, groups_across_nodes)
    lines = facts["lines"]
    for line in lines:
        session.monitor.say(line)
    for note in facts["notes"]:
        session.monitor.say(f"note: {note}")
    if problems:
        assert checkpoint is not None
        session.monitor.warn(
            f"damaged checkpoint passed over: {'; '.join(problems)}; {checkpoint.path.name} is used instead"
        )
    session.monitor.text("start", "\n".join(f"    {line}" for line in lines), step=facts["start_step"])
    session.run.record_start(facts)
    selection = session.parts.train_set.selection
    if selection is not None:
        session.attempt("train_images.json", lambda: session.run.write_train_images(selection))


def gather_facts(
    session: Session,
    num_parameters: dict[str, tuple[int, int]],
    checkpoint: Checkpoint | None,
    problems: list[str],
    groups_across_nodes: int,
) -> dict[str, Any]:
    """Return everything that was chosen, as JSON values; `lines` is what a person reads of it."""
    experiment, group, parts = session.experiment, session.group, session.parts
    loop, accumulation = experiment.loop, experiment.engine.accumulation
    tensor = experiment.mesh.tensor
    micro_batch = loop.global_batch // (group.world_size * accumulation)
    backbone = {key: _plain(value) for key, value in parts.backbone.describe().items()}
    engine_kind, engine_reason = choose_engine(experiment.engine)
    start = checkpoint.state.step if checkpoint else 0
    fingerprint = parts.backbone.fingerprint
    # What has a line of its own, or says nothing, is left to the run folder.
    shown = {key: value for key, value in backbone.items() if key not in OWN_LINE and value not in (None, [], 0)}
    lines = [
        f"recipe       {experiment.name}",
        f"run folder   {session.run}",
        f"world        {group.describe()}",
        f"mesh         {group.world_size // tensor} data x {tensor} tensor: "
        + (f"ranks {tensor} by {tensor} share a backbone" if tensor > 1 else "every rank has all of the backbone"),
        f"engine       {engine_kind}: {engine_reason}",
        f"backbone     {experiment.backbone.name}, {_number(num_parameters['backbone'][1])} parameters, "
        + ("frozen, " if experiment.backbone.frozen else "trained with its head, from the weights with ")
        + f"fingerprint {fingerprint[:SHORT]}",
        *(f"             {key}: {value}" for key, value in shown.items()),
        f"data         {parts.train_set.extent} for training and {parts.val_set.extent} for validation, "
        f"{len(parts.train_set.classes)} classes",
        f"batch        {loop.global_batch} = {micro_batch} images x {group.world_size} rank(s) x {accumulation} "
        "micro-batch(es)",
        *([f"offload      {experiment.engine.offload}"] if experiment.engine.offload != "off" else []),
        f"steps        {loop.num_steps:,} = {loop.num_steps * loop.global_batch / len(parts.train_set):.1f} epochs",
    ]
    for name, trainee in session.trainees.items():
        trainable, total = num_parameters[name]
        optimizer = trainee.config.optimizer
        lines += [
            f"head         {name}: {_number(trainable)} trainable of {_number(total)} parameters; "
            f"{trainee.engine.name}",
            f"             learning rate {trainee.learning_rate:.4g} = {optimizer.learning_rate:.4g} at "
            f"{optimizer.reference_batch} images, scaled to {loop.global_batch} ({optimizer.batch_scaling})"
            + (
                ""
                if experiment.backbone.frozen
                else f"; the backbone's {experiment.backbone.learning_rate_factor:g} of it"
            ),
        ]
    lines += [f"head         {name}: stopped after step {step}" for name, step in session.stopped.items()]
    lines.append(
        f"start        step {start}" + (f", resumed from {checkpoint.path}" if checkpoint else ", from scratch")
    )
    notes = [*parts.train_set.notes, *parts.val_set.notes]
    if groups_across_nodes:
        notes.append(
            f"{groups_across_nodes} of {group.world_size // tensor} tensor groups have ranks on several nodes: every block of "
            "the split stages waits for the network between them twice. Start a multiple of mesh.tensor "
            f"({tensor}) processes on each node, or choose a smaller one"
        )
    if group.device.type == "cuda" and group.world_size == 1 and torch.cuda.device_count() > 1:
        notes.append(f"1 of {torch.cuda.device_count()} GPUs is used; `permafrost launch RECIPE ...` uses all")
    return {
        "recipe": experiment.name,
        "start_step": start,
        "resumed_from": str(checkpoint.path) if checkpoint else None,
        "damaged_checkpoints": problems,
        "device": str(group.device),
        "world_size": group.world_size,
        "mesh": {"data": group.world_size // tensor, "tensor": tensor},
        "tensor_groups_across_nodes": groups_across_nodes,
        "global_batch": loop.global_batch,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "engine": {"kind": engine_kind, "reason": engine_reason},
        "engines": {name: trainee.engine.name for name, trainee in session.trainees.items()},
        "learning_rates": {name: trainee.learning_rate for name, trainee in session.trainees.items()},
        "backbone": backbone,
        "parameters": {name: {"trainable": own, "all": total} for name, (own, total) in num_parameters.items()},
        "num_samples": {"train": len(parts.train_set), "val": len(parts.val_set)},
        "data_fingerprints": {"train": parts.train_set.fingerprint, "val": parts.val_set.fingerprint},
        "classes": list(parts.train_set.classes),
        "notes": notes,
        "lines": lines,
    }


def _number(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 100_000 else f"{count:,}"


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
