"""The Experiment, which holds everything a run is made of as plain values. A recipe is a function that returns one.

No torch in here: `permafrost --help`, override parsing and the checks in `__post_init__` stay fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from permafrost._checks import Checks
from permafrost._configuration import Configuration
from permafrost.data.task import TaskDataConfig
from permafrost.heads.config import HeadConfig
from permafrost.heads.detection.config import MaskRCNNConfig
from permafrost.heads.errors import HeadError
from permafrost.launcher.errors import RecipeError
from permafrost.model.config import NOT_SPLIT, BackboneConfig
from permafrost.model.errors import BackboneError
from permafrost.model.split.degree import check_tensor_degree

CHECKS = Checks(RecipeError)
OffloadMode = Literal["off", "features", "all"]


@dataclass
class OptimizerConfig(Configuration):
    """AdamW over one head's parameters.

    `learning_rate` belongs to `reference_batch` images; another global batch scales it by `batch_scaling`.
    """

    learning_rate: float = 1e-4
    reference_batch: int = 16
    batch_scaling: Literal["linear", "sqrt", "none"] = "linear"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    no_decay: tuple[str, ...] = ("norm", "bias")
    """Parameters whose name has one of these parts, or that have one dimension, are not decayed."""
    clip_norm: float | None = None
    """Largest global gradient norm of this head; None clips nothing."""

    def __post_init__(self) -> None:
        CHECKS.positive("optimizer.", self, "learning_rate")
        remedy = "it must be at least 1 image"
        CHECKS.require(self.reference_batch >= 1, "optimizer.reference_batch", self.reference_batch, remedy)
        clips = self.clip_norm is None or self.clip_norm > 0
        CHECKS.require(clips, "optimizer.clip_norm", self.clip_norm, "use None to clip nothing")

    def scaled_learning_rate(self, global_batch: int) -> float:
        """Return the learning rate for a global batch of this many images."""
        ratio = global_batch / self.reference_batch
        return self.learning_rate * {"linear": ratio, "sqrt": ratio**0.5, "none": 1.0}[self.batch_scaling]


@dataclass
class ScheduleConfig(Configuration):
    """Learning rate over the run: linear warm-up, then steps, a cosine or a power of what is left."""

    kind: Literal["multistep", "cosine", "poly", "constant"] = "multistep"
    warmup_steps: int = 500
    warmup_factor: float = 0.001
    milestones: tuple[float, ...] = (0.75, 0.9167)
    """Fractions of the run at which the rate is multiplied by `decay` (27 and 33 of 36 epochs)."""
    decay: float = 0.1
    final_factor: float = 0.0
    """Where the cosine ends, as a share of the full rate."""
    power: float = 0.9
    """Of poly: the full rate is multiplied by (1 - step / num_steps) to this power."""

    def __post_init__(self) -> None:
        rise = list(self.milestones) == sorted(self.milestones) and all(0 < m < 1 for m in self.milestones)
        remedy = "give rising fractions of the run between 0 and 1"
        CHECKS.require(rise, "schedule.milestones", self.milestones, remedy)
        CHECKS.not_negative("schedule.", self, "warmup_steps")
        CHECKS.positive("schedule.", self, "power")
        for name in ("warmup_factor", "decay", "final_factor"):
            value, remedy = getattr(self, name), "give a share of the full rate between 0 and 1"
            CHECKS.require(0 <= value <= 1, f"schedule.{name}", value, remedy)

    def factor(self, step: int, num_steps: int) -> float:
        """Return what the full rate is multiplied by at 0-based `step` of `num_steps`."""
        import math

        if step < self.warmup_steps:
            return self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps
        if self.kind == "multistep":
            return self.decay ** sum(step >= m * num_steps for m in self.milestones)
        if self.kind == "cosine":
            progress = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
            return self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        if self.kind == "poly":
            return (1 - step / num_steps) ** self.power
        return 1.0


@dataclass
class HeadExperiment(Configuration):
    """One head of the run, with what trains it."""

    model: HeadConfig = field(default_factory=MaskRCNNConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    metric: str | None = None
    """The evaluator's value that decides which checkpoint is `best`; None is the data's own (bbox/AP of detection)."""
    init: str | None = None
    """Where its first weights come from: another run's folder, or the file of a released Mask R-CNN or Cascade of the Swin
    papers, or of Mask2Former's model zoo. What does not fit is initialised anew, and listed. None: all of it is."""
    ema_decay: float | None = None
    """Keep a running average of its weights with this decay (0.999, say); it is what is evaluated, and used afterwards. None: no
    average."""

    def __post_init__(self) -> None:
        remedy = "give a number between 0 and 1 such as 0.999, or None to average nothing"
        CHECKS.require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay, remedy)


@dataclass
class EngineConfig(Configuration):
    """Choice of the engine that steps the heads. The recipe's global batch is the one source of truth for batch sizes."""

    kind: Literal["auto", "accelerate", "deepspeed"] = "auto"
    """auto: DeepSpeed if `deepspeed_config` is given or Accelerate's distributed_type is DEEPSPEED, else Accelerate."""
    zero_stage: Literal[1, 2, 3] | None = None
    """DeepSpeed's ZeRO stage; None is what `deepspeed_config` or Accelerate's configuration says, else 2."""
    deepspeed_config: str | None = None
    """Path of a DeepSpeed JSON, or zero1, zero2, zero3 for the ones in configs/deepspeed; it may set what the recipe
    does not."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast of the head's compute (parameters stay float32): auto is bfloat16 on CUDA, float32 on a CPU."""
    accumulation: int = 1
    """Micro-batches per step on each rank."""
    offload: OffloadMode = "off"
    """What leaves for host memory between a head's forward and its backward: off; features, the backbone's maps; all,
    whatever the head saves."""

    def __post_init__(self) -> None:
        CHECKS.require(
            self.accumulation >= 1, "engine.accumulation", self.accumulation, "it must be at least 1 micro-batch"
        )


@dataclass
class MeshConfig(Configuration):
    """Division of the work among processes: world = data x tensor. Heads are data-parallel over all of them either way."""

    tensor: int = 1
    """Processes that share one backbone, its stages 3 and 4 split over them; 1: each has all of it. Consecutive ranks
    form a group. It is for networks that do not fit into one device's memory, or for latency."""

    def __post_init__(self) -> None:
        CHECKS.require(self.tensor >= 1, "mesh.tensor", self.tensor, "it counts processes and is at least 1")


@dataclass
class LoopConfig(Configuration):
    """Length of the run, its intervals and its seed."""

    num_steps: int = 90_000
    global_batch: int = 16
    """Images per optimizer step, over all ranks and micro-batches."""
    seed: int = 0
    num_workers: int = 4
    worker_timeout: float = 300.0
    """Seconds after which a silent data worker is an error; 0 waits for ever."""
    process_group_timeout: float = 1800.0
    """Seconds that a rank waits for another one before it gives up and the run ends. What one rank does while the others
    wait for it (an evaluation's last part, a checkpoint) may take longer."""
    log_every: int = 50
    checkpoint_every: int = 5_000
    evaluate_every: int | None = None
    """Steps between evaluations; None evaluates at the end only."""
    image_every: int = 5_000
    """Steps between pictures of predicted against true boxes and masks in TensorBoard; 0 draws none, not even an evaluation's
    (precision over recall, confusion matrix)."""
    evaluation_batch: int = 1
    """Images per rank and forward in evaluation."""
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        CHECKS.counts("loop.", self, "num_steps", "global_batch", "log_every", "checkpoint_every", "evaluation_batch")
        CHECKS.counts("loop.", self, "keep_checkpoints")
        CHECKS.not_negative("loop.", self, "seed", "num_workers", "worker_timeout", "image_every")
        limit = self.process_group_timeout
        CHECKS.require(limit > 0, "loop.process_group_timeout", limit, "it must be above 0 seconds")
        is_due = self.evaluate_every is None or self.evaluate_every >= 1
        remedy = "it must be at least 1, or None for the end only"
        CHECKS.require(is_due, "loop.evaluate_every", self.evaluate_every, remedy)


@dataclass
class Experiment(Configuration):
    """A complete run: one frozen backbone, one data set, one or several heads on the same frozen forward."""

    name: str
    backbone: BackboneConfig
    data: TaskDataConfig
    heads: dict[str, HeadExperiment]
    loop: LoopConfig = field(default_factory=LoopConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    output: str | None = None
    """The run folder; None is runs/<name>."""

    def __post_init__(self) -> None:
        if not self.heads:
            raise RecipeError("heads is empty: name at least one head to train")
        for name in self.heads:
            if not name.isidentifier():
                raise RecipeError(f"heads: {name!r} is not a valid name; use letters, digits and underscores")
        share, rest = divmod(self.loop.global_batch, self.engine.accumulation)
        if rest or not share:
            raise RecipeError(
                f"loop.global_batch {self.loop.global_batch} does not divide into engine.accumulation "
                f"{self.engine.accumulation} micro-batches: change either"
            )
        if not self.backbone.frozen:
            self._check_fine_tuning()
        self._check_heads()
        for name, reason in NOT_SPLIT.items():
            if getattr(self.backbone, name) and self.mesh.tensor > 1:
                raise RecipeError(f"backbone.{name} is True and mesh.tensor is {self.mesh.tensor}: {reason}")
        try:
            check_tensor_degree(self.backbone.name, self.mesh.tensor)
        except BackboneError as error:
            raise RecipeError(f"mesh.tensor is {self.mesh.tensor}: {error}") from None

    def _check_heads(self) -> None:
        for name, head in self.heads.items():
            if head.model.task != self.data.task:
                raise RecipeError(
                    f"heads.{name}.model is a {type(head.model).__name__}, for {head.model.task}, but data is a "
                    f"{type(self.data).__name__}, for {self.data.task}: choose a head and data of the same task"
                )
            try:
                head.model.check_data(self.data)
            except HeadError as error:
                raise RecipeError(f"heads.{name}.model.{error}") from None

    def _check_fine_tuning(self) -> None:
        if len(self.heads) > 1:
            raise RecipeError(
                f"backbone.frozen is False but there are {len(self.heads)} heads ({', '.join(self.heads)}): a backbone that "
                "learns follows one head. Train one run per head, or freeze the backbone"
            )
        if self.mesh.tensor > 1:
            raise RecipeError(
                f"mesh.tensor is {self.mesh.tensor} but backbone.frozen is False: only a frozen backbone is split over tensor "
                "groups. Set mesh.tensor to 1; ZeRO 3 shards what is large (engine.kind deepspeed, engine.zero_stage 3)"
            )
        if self.engine.offload == "features":
            raise RecipeError(
                "engine.offload is 'features' but backbone.frozen is False: the backbone's backward needs more than its maps. "
                "Choose 'all' or 'off', or backbone.checkpoint_activations"
            )
