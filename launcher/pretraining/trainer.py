"""Pretrain a SwinV2 with labels on the `glyphs` world: `permafrost pretrain RECIPE`.

One process, one device. A run folder holds recipe.json, metrics.jsonl, tensorboard/, checkpoints/last.pt (everything
that resuming needs), latest.safetensors (the averaged weights of the last checkpoint) and, at the end,
<backbone>_<recipe tail>.safetensors: bfloat16 under the official key names, with the command and the accuracy in its
header. Every random choice is a function of (seed, step), so a resumed run is the uninterrupted one.
"""

from __future__ import annotations

import copy
import json
import math
import re
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost._files import replacing
from permafrost.data.cache import cache_folder
from permafrost.data.worlds import glyphs
from permafrost.launcher.errors import CheckpointError, RunFolderError, TrainingStopped
from permafrost.launcher.machine import versions_of
from permafrost.launcher.pretraining.batches import DROP_PATH, difficulty_limit, generator, train_batches
from permafrost.launcher.pretraining.config import PretrainExperiment
from permafrost.launcher.pretraining.model import (
    MEAN,
    STD,
    Readouts,
    build_classifier,
    build_optimizer,
    forward_all,
    normalise,
)
from permafrost.model.swin.v2 import SwinV2Classifier
from permafrost.model.swin.weights import save_weights

# Fields that may differ between a run and its resumption: they do not change what is computed.
_FREE_FIELDS = {"num_threads", "log_every", "evaluate_every", "checkpoint_every", "output", "compile"}


def run(
    experiment: PretrainExperiment,
    *,
    resume: Literal["auto", "must", "never"] = "auto",
    device: str = "auto",
    command: str = "permafrost pretrain",
) -> dict[str, float]:
    """Train, evaluate, and write the weights.

    Args:
        experiment: the recipe.
        resume: "auto" continues what the run folder holds, "must" needs something there, "never" refuses it.
        device: "auto", "cpu" or "cuda".
        command: what to record as the command.

    Returns:
        the last evaluation: "val/accuracy" and "val/loss" of the shipped weights, and the like for both candidates.

    Raises:
        RunFolderError: the folder and `resume` do not go together, or it belongs to another recipe.
        CheckpointError: the checkpoint cannot be read.
        TrainingStopped: the loss is not finite.
    """
    folder = Path(experiment.run_folder)
    checkpoint = _open_run_folder(folder, experiment, resume, command)
    if experiment.num_threads:
        torch.set_num_threads(experiment.num_threads)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)

    load = partial(glyphs.load_split, image_size=experiment.image_size, seed=experiment.world_seed)
    print(f"run folder {folder}; glyphs world in {cache_folder()} (rendered once)", flush=True)
    val = load("val", experiment.num_val_images)
    train = load("train", experiment.num_train_images)

    torch.manual_seed(experiment.seed)
    model = build_classifier(experiment, len(train.class_names)).to(place)
    readouts = Readouts(model.spec, len(train.class_names)).to(place)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = build_optimizer((model, readouts), experiment)
    first_step = _restore(checkpoint, model, readouts, average, optimizer) if checkpoint else 0
    if experiment.compile:
        # Stage by stage, in place: parameter names stay, and the drawing of drop path stays outside the graphs.
        for stage in model.layers:
            stage.compile(dynamic=False)
    print(
        f"{experiment.backbone}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"windows {experiment.windows}; "
        f"{len(train.labels)} training and {len(val.labels)} validation images of {experiment.image_size} px, "
        f"{len(train.class_names)} classes; {place}, {experiment.precision}, compile {experiment.compile}, "
        f"{torch.get_num_threads()} threads; steps {first_step} to {experiment.num_steps}",
        flush=True,
    )

    with _Log(folder, first_step) as log:
        _train(experiment, model, readouts, average, optimizer, train, val, first_step, place, command, log)
        return _finish(experiment, model, average, val, place, command, log)


def _train(experiment, model, readouts, average, optimizer, train, val, first_step, place, command, log) -> None:
    """Run the loop: a step, the running average, and now and then a log line, an evaluation, a checkpoint."""
    folder = Path(experiment.run_folder)
    batches = train_batches(train, experiment, first_step)
    accuracy = 0.0
    meter, since = _Meter(), time.monotonic()
    for step, images, coverage, labels in batches:
        batch = (images.to(place), coverage.to(place), labels.to(place))
        loss, correct = train_step(model, readouts, optimizer, batch, experiment, step)
        update_average(average, model, experiment.ema_decay, step)
        if not math.isfinite(loss):
            raise TrainingStopped(f"{folder}: the loss is {loss} at step {step + 1}; lower learning_rate")
        meter.add(loss, correct, len(labels))

        done = step + 1
        if done % experiment.log_every == 0 or done == experiment.num_steps:
            seconds, since = time.monotonic() - since, time.monotonic()
            values = {"train/loss": meter.loss, "train/accuracy": meter.accuracy}
            values["train/learning_rate"] = learning_rate(experiment, step)
            values["train/difficulty_limit"] = difficulty_limit(experiment, step)
            values["train/images_per_second"] = meter.num_images / seconds
            remaining = (experiment.num_steps - done) * seconds / meter.num_steps
            log.write(done, values, f"{remaining / 60:.0f} min left of {experiment.num_steps} steps")
            meter = _Meter()
        if done % experiment.evaluate_every == 0 and done < experiment.num_steps:
            scores = evaluate(average, val, experiment, place)
            accuracy = scores["accuracy"]
            log.write(done, {f"val/{name}": value for name, value in scores.items()})
        if done % experiment.checkpoint_every == 0 or done == experiment.num_steps:
            save_checkpoint(folder, experiment, model, readouts, average, optimizer, done)
            notes = {"accuracy": f"{accuracy:.4f}", "step": str(done), "num_steps": str(experiment.num_steps)}
            export(average, folder / "latest.safetensors", experiment, command, notes, torch.float32)


def _finish(experiment, model, average, val, place, command, log) -> dict[str, float]:
    """Compare the trained and the averaged weights, as they will be stored; ship the better one."""
    candidates = {"trained": model, "average": average}
    scores = {}
    for name, source in candidates.items():
        rounded = copy.deepcopy(average)
        rounded.load_state_dict({key: value.to(torch.bfloat16).float() for key, value in source.state_dict().items()})
        scores[name] = evaluate(rounded, val, experiment, place)
    best = max(scores, key=lambda name: scores[name]["accuracy"])
    results = {f"val/{key}": value for key, value in scores[best].items()}
    results |= {f"val/{key}_of_{name}": value for name, both in scores.items() for key, value in both.items()}
    log.write(experiment.num_steps, results)
    path = Path(experiment.run_folder) / f"{experiment.backbone}_{experiment.name.split('_', 1)[-1]}.safetensors"
    notes = {"accuracy": f"{scores[best]['accuracy']:.4f}", "step": str(experiment.num_steps), "weights": best}
    export(candidates[best], path, experiment, command, notes, torch.bfloat16)
    print(f"validation accuracy {scores[best]['accuracy']:.4f} ({best} weights); wrote {path}", flush=True)
    return results


def learning_rate(experiment: PretrainExperiment, step: int) -> float:
    """Return the rate at a 0-based step: linear warm-up, then a half cosine to zero."""
    if step < experiment.warmup_steps:
        return experiment.learning_rate * (step + 1) / experiment.warmup_steps
    progress = (step - experiment.warmup_steps) / max(1, experiment.num_steps - experiment.warmup_steps)
    return experiment.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(
    model: SwinV2Classifier,
    readouts: Readouts,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor, Tensor],
    experiment: PretrainExperiment,
    step: int,
) -> tuple[float, int]:
    """Train one step.

    Args:
        model: the network.
        readouts: what is thrown away afterwards.
        optimizer: over both.
        batch: images (B, 3, S, S) in [0, 1], coverage (B, S, S), labels (B,).
        experiment: the recipe.
        step: 0-based.

    Returns:
        the image-level loss before the update and the number of correct answers.
    """
    images, coverage, labels = batch
    model.train()
    with _autocast(experiment, images.device):
        logits, places = forward_all(model, readouts, images, generator(experiment.seed, DROP_PATH, step))
    loss = F.cross_entropy(logits, labels, label_smoothing=experiment.label_smoothing)
    dense = readouts.loss(places, coverage, labels, experiment.label_smoothing)
    (loss + experiment.dense_weight * dense).backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, experiment.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(experiment, step)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), int((logits.argmax(1) == labels).sum())


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the running average towards the weights; young averages follow faster."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


@torch.no_grad()
def evaluate(
    model: nn.Module, split: glyphs.GlyphSplit, experiment: PretrainExperiment, device: torch.device
) -> dict[str, float]:
    """Return accuracy and cross-entropy over a split, without augmentation.

    The model must be in eval mode.
    """
    correct, loss = 0, 0.0
    for start in range(0, len(split.labels), experiment.batch_size):
        rows = slice(start, start + experiment.batch_size)
        images = torch.from_numpy(split.images[rows][..., :3].copy()).to(device).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(split.labels[rows]).to(device)
        with _autocast(experiment, device):
            logits = model(normalise(images))
        loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        correct += int((logits.argmax(1) == labels).sum())
    return {"accuracy": correct / len(split.labels), "loss": loss / len(split.labels)}


def save_checkpoint(
    folder: Path,
    experiment: PretrainExperiment,
    model: nn.Module,
    readouts: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    """Write checkpoints/last.pt atomically."""
    path = folder / "checkpoints" / "last.pt"
    path.parent.mkdir(exist_ok=True)
    state = {
        "step": step,
        "recipe": asdict(experiment),
        "model": model.state_dict(),
        "readouts": readouts.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with replacing(path, durable=True) as partial:
        torch.save(state, partial)


def export(
    model: SwinV2Classifier,
    path: Path,
    experiment: PretrainExperiment,
    command: str,
    notes: dict[str, str],
    dtype: torch.dtype,
) -> None:
    """Write weights under the official key names, with what is needed to load and to reproduce them in the header."""
    metadata = {
        "image_size": experiment.image_size,
        "mean": MEAN,
        "std": STD,
        # Where the run was written, and in how many parts, says nothing about the weights.
        "command": re.sub(r" --(output|resume)[= ]('[^']*'|\S+)", "", command),
        "recipe": asdict(experiment) | {"output": None},
        "torch": torch.__version__,
    }
    save_weights(model, path, metadata | notes, dtype)


def _open_run_folder(folder: Path, experiment: PretrainExperiment, resume: str, command: str) -> Path | None:
    """Create or check the run folder; returns the checkpoint to continue from, if there is one."""
    recipe_path, checkpoint = folder / "recipe.json", folder / "checkpoints" / "last.pt"
    if recipe_path.exists():
        if resume == "never":
            raise RunFolderError(f"{folder} already holds a run: choose another --output, or let it resume")
        theirs, ours = json.loads(recipe_path.read_text())["recipe"], asdict(experiment)
        differing = [key for key in ours if key not in _FREE_FIELDS and theirs.get(key) != ours[key]]
        if differing:
            listed = ", ".join(f"{key} was {theirs.get(key)!r}, is {ours[key]!r}" for key in differing)
            raise RunFolderError(f"{folder} belongs to another recipe ({listed}): choose another --output")
    if resume == "must" and not checkpoint.exists():
        raise RunFolderError(f"{folder} holds no checkpoint to resume: expected {checkpoint}")
    if not recipe_path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        record = {"recipe": asdict(experiment), "command": command, "versions": versions_of(("torch", "numpy"))}
        recipe_path.write_text(json.dumps(record, indent=2) + "\n")
    return checkpoint if checkpoint.exists() else None


def _restore(
    path: Path, model: nn.Module, readouts: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load a checkpoint into the objects; returns the number of steps done."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        readouts.load_state_dict(state["readouts"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({error}): delete it to start anew") from error
    return state["step"]


def _autocast(experiment: PretrainExperiment, device: torch.device):
    """Return an autocast to bfloat16 where the recipe asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=experiment.precision == "bfloat16")


class _Meter:
    """Sums over the steps since the last log line."""

    def __init__(self) -> None:
        self.num_steps = self.num_images = self.num_correct = 0
        self.total = 0.0

    def add(self, loss: float, correct: int, count: int) -> None:
        self.num_steps, self.total = self.num_steps + 1, self.total + loss
        self.num_images, self.num_correct = self.num_images + count, self.num_correct + correct

    @property
    def loss(self) -> float:
        return self.total / self.num_steps

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_images


class _Log:
    """metrics.jsonl, TensorBoard and plain lines."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        if path.exists():
            # What a run wrote past the checkpoint it resumes from will be written again.
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= first_step]
            path.write_text("".join(line + "\n" for line in lines))
        self.file = path.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float], remark: str = "") -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        listed = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"step {step}  {listed}  {remark}".rstrip(), flush=True)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        self.board.close()
