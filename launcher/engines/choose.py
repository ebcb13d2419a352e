"""Choose an engine for a head and build it: the one file that knows both engines."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING

from permafrost.launcher.engines.accelerate import AccelerateEngine
from permafrost.launcher.engines.base import Engine, is_true, require_trainable
from permafrost.launcher.engines.deepspeed import DeepSpeedEngine
from permafrost.launcher.errors import LaunchError
from permafrost.launcher.ranks.division import micro_batch_size

if TYPE_CHECKING:
    from permafrost.heads.base import Head
    from permafrost.launcher.experiment import EngineConfig, OptimizerConfig
    from permafrost.launcher.ranks.process_group import ProcessGroup


def choose_engine(config: EngineConfig, environ: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Return "accelerate" or "deepspeed", and the reason in words.

    Raises:
        LaunchError: the recipe and Accelerate's launcher ask for different engines.
    """
    environ = os.environ if environ is None else environ
    launcher_wants_deepspeed = (
        is_true(environ.get("ACCELERATE_USE_DEEPSPEED"))
        or environ.get("ACCELERATE_DISTRIBUTED_TYPE", "").upper() == "DEEPSPEED"
    )
    if config.kind == "accelerate":
        if config.deepspeed_config is not None:
            raise LaunchError(
                f"engine.kind is 'accelerate' but engine.deepspeed_config is {config.deepspeed_config!r}: set kind to "
                "'deepspeed' or 'auto', or leave deepspeed_config out"
            )
        if launcher_wants_deepspeed:
            raise LaunchError(
                "engine.kind is 'accelerate' but Accelerate's configuration says distributed_type: DEEPSPEED. Set "
                "kind to 'auto' or 'deepspeed', or change the configuration given to accelerate launch"
            )
        return "accelerate", "the recipe says engine.kind = 'accelerate'"
    if config.kind == "deepspeed":
        return "deepspeed", "the recipe says engine.kind = 'deepspeed'"
    if config.deepspeed_config is not None:
        return "deepspeed", f"engine.deepspeed_config is {config.deepspeed_config!r}"
    if launcher_wants_deepspeed:
        return "deepspeed", "Accelerate's distributed_type is DEEPSPEED"
    return "accelerate", "nothing asks for DeepSpeed"


def build_engine(
    head: Head,
    *,
    optimizer: OptimizerConfig,
    engine: EngineConfig,
    group: ProcessGroup,
    global_batch: int,
    environ: MutableMapping[str, str] | None = None,
) -> Engine:
    """Build the engine that `choose_engine` picks, around a head that is moved to the process group's device.

    Args:
        head: with the same values on every rank (built from the run's seed, or about to get an imported state).
        optimizer: AdamW's numbers; the learning rate arrives with each step.
        engine: the recipe's engine section.
        group: this process among the others.
        global_batch: images per optimizer step over all ranks and micro-batches.
        environ: what to read the launcher's wishes from; None is os.environ.

    Raises:
        LaunchError: the pieces contradict each other.
    """
    environ = os.environ if environ is None else environ
    kind, _ = choose_engine(engine, environ)
    size = micro_batch_size(global_batch=global_batch, world_size=group.world_size, accumulation=engine.accumulation)
    require_trainable(head)
    if kind == "accelerate":
        return AccelerateEngine(head, optimizer=optimizer, engine=engine, group=group, environ=environ)
    return DeepSpeedEngine(head, optimizer=optimizer, engine=engine, group=group, micro_batch=size, environ=environ)
