"""The configuration of a pretraining run. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from permafrost._checks import Checks
from permafrost._configuration import Configuration
from permafrost.launcher.errors import RecipeError

CHECKS = Checks(RecipeError)


@dataclass
class PretrainExperiment(Configuration):
    """Supervised classification of the built-in `glyphs` world: stage (i) of the pipeline, the making of B."""

    name: str
    backbone: str = "swinv2_nano"
    """A size from the SwinV2 table."""
    window_size: int = 8
    image_size: int = 128
    """Side of the pictures in pixels; the window of a stage is never larger than its map."""
    num_train_images: int = 60_000
    num_val_images: int = 3_000
    world_seed: int = 0
    num_steps: int = 9_000
    batch_size: int = 32
    seed: int = 0
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    """Of matrices only: not of norms, biases, logit scales and the position bias MLP."""
    clip_norm: float = 2.0
    label_smoothing: float = 0.1
    dense_weight: float = 1.0
    """Weight of the read-outs that ask for figure and class place by place; 0 trains on the picture's label alone."""
    curriculum: float = 0.4
    """Share of the run over which the highest difficulty drawn rises to 1; 0 draws all from the start."""
    first_difficulty: float = 0.25
    """The highest difficulty drawn at the first step."""
    drop_path_rate: float = 0.02
    ema_decay: float = 0.999
    """Decay per step of the running average of the weights, which is what gets evaluated and, if better, shipped."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast of the compute; bfloat16 pays on CUDA and on CPUs with AMX."""
    compile: bool = False
    """Compile the stages with torch.compile: a third faster, after a minute or two; needs a C++ compiler on a CPU."""
    num_threads: int = 0
    """CPU threads of torch; 0 leaves its own choice."""
    log_every: int = 50
    evaluate_every: int = 1_000
    checkpoint_every: int = 250
    output: str | None = None
    """The run folder; None is runs/<name>."""

    def __post_init__(self) -> None:
        CHECKS.counts("", self, "window_size", "num_train_images", "num_val_images", "num_steps", "batch_size")
        CHECKS.counts("", self, "log_every", "evaluate_every", "checkpoint_every")
        CHECKS.positive("", self, "learning_rate", "clip_norm")
        CHECKS.not_negative("", self, "dense_weight")
        for name in ("label_smoothing", "drop_path_rate", "ema_decay", "curriculum", "first_difficulty"):
            value = getattr(self, name)
            CHECKS.require(0 <= value < 1, name, value, "it must be at least 0 and below 1")
        fits = self.image_size >= 32 and self.image_size % 32 == 0
        remedy = "it must be a multiple of 32, the stride of the last map"
        CHECKS.require(fits, "image_size", self.image_size, remedy)
        if self.batch_size > self.num_train_images:
            raise RecipeError(
                f"batch_size {self.batch_size} is above num_train_images {self.num_train_images}: lower it"
            )
        is_part = 0 <= self.warmup_steps <= self.num_steps
        remedy = f"it must lie between 0 and num_steps {self.num_steps}"
        CHECKS.require(is_part, "warmup_steps", self.warmup_steps, remedy)

    @property
    def windows(self) -> tuple[int, ...]:
        """Return the window that each of the four stages really has at `image_size`: none is larger than its map."""
        return tuple(min(self.window_size, self.image_size // stride) for stride in (4, 8, 16, 32))

    @property
    def run_folder(self) -> str:
        """Return the folder that the run writes to."""
        return self.output or f"runs/{self.name}"
