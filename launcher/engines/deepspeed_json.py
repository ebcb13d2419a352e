"""Merge a DeepSpeed JSON and the recipe into the configuration that DeepSpeed gets. Imports no torch.

The recipe owns batch sizes, accumulation, clipping, the optimizer and the precision; the JSON owns the rest of ZeRO. A
JSON that says something else about what the recipe owns is refused, never merged in silence.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.launcher.errors import LaunchError

if TYPE_CHECKING:
    from permafrost.launcher.experiment import EngineConfig

SHIPPED = ("zero1", "zero2", "zero3")
"""Names of the files in configs/deepspeed."""

PASSED_ON = {
    "aio",
    "comms_logger",
    "communication_data_type",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "timers",
    "torch_autocast",
    "wall_clock_breakdown",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}
"""Sections a JSON may have besides the recipe's. Others are refused: DeepSpeed ignores what it does not know."""

RECIPE_SECTIONS = {
    "optimizer": "the head's optimizer (heads.<name>.optimizer)",
    "scheduler": "the head's schedule (heads.<name>.schedule)",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",
    "amp": "engine.precision",
}
"""Sections whose subject the recipe owns, and where."""

ZERO_UNSUPPORTED = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "zenflow": None,
}
"""ZeRO's variants whose partitions the exchange of states does not know, with the value that switches each off."""


def read_settings(engine: EngineConfig, environ: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Return (the JSON's content, where it came from): the recipe's file, else Accelerate's, else the stage's shipped one.

    Raises:
        LaunchError: the file is missing or malformed, or recipe and Accelerate name different stages.
    """
    launcher = _settings_of_accelerate(environ)
    named = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    launcher_file = None if named.lower() in ("", "none") else named
    if engine.deepspeed_config is not None:
        settings, source = load_json(engine.deepspeed_config), f"engine.deepspeed_config {engine.deepspeed_config}"
    elif launcher_file is not None:
        settings, source = load_json(launcher_file), f"Accelerate's deepspeed_config_file {launcher_file}"
    else:
        stage = engine.zero_stage or launcher.get("zero_optimization", {}).get("stage", 2)
        name = f"zero{stage}"
        if name not in SHIPPED:
            raise LaunchError(f"Accelerate's zero_stage is {stage}: give 1, 2 or 3")
        settings, source = load_json(name), f"configs/deepspeed/{name}.json"
    _add_wishes(settings, launcher, source)
    return settings, source


def _add_wishes(settings: dict[str, Any], wishes: Mapping[str, Any], source: str, prefix: str = "") -> None:
    """Complete settings with what Accelerate asks for, section by section; what they say already must agree."""
    for key, wish in wishes.items():
        found = settings.setdefault(key, copy.deepcopy(wish))
        if isinstance(wish, dict) and isinstance(found, dict):
            _add_wishes(found, wish, source, f"{prefix}{key}.")
        elif found not in (wish, "auto"):
            raise LaunchError(
                f"Accelerate's configuration asks for {prefix}{key} {wish} but {source} says {found}: set it in only one of "
                "the two"
            )
        else:
            settings[key] = wish


def load_json(name: str) -> dict[str, Any]:
    """Load the object in a JSON file: a path, or zero1, zero2, zero3.

    Raises:
        LaunchError: it is not there or is not a JSON object.
    """
    try:
        if name in SHIPPED:
            # By name: the launcher never imports configs.
            text = (resources.files("permafrost.configs") / "deepspeed" / f"{name}.json").read_text(encoding="utf-8")
        else:
            text = Path(name).read_text(encoding="utf-8")
        settings = json.loads(text)
    except OSError as error:
        raise LaunchError(
            f"the DeepSpeed JSON {name} cannot be read ({error.strerror}): give a path, or one of {', '.join(SHIPPED)}"
        ) from None
    except ValueError as error:
        raise LaunchError(f"the DeepSpeed JSON {name} is malformed: {error}") from None
    if not isinstance(settings, dict):
        raise LaunchError(f"the DeepSpeed JSON {name} holds a {type(settings).__name__}: expected an object")
    return settings


def merge_settings(
    settings: Mapping[str, Any],
    source: str,
    *,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    clip_norm: float | None,
    precision: str,
    zero_stage: int | None,
) -> dict[str, Any]:
    """Return the configuration for deepspeed.initialize.

    Args:
        settings: a JSON's content; it is not changed. The value "auto" counts as not given.
        source: where it came from, for messages.
        micro_batch: images of one forward on one rank.
        accumulation: micro-batches per step on each rank.
        world_size: number of ranks.
        clip_norm: the head's, None for no clipping.
        precision: "float32" or "bfloat16".
        zero_stage: the recipe's, None where it leaves it to the JSON.

    Raises:
        LaunchError: the JSON contradicts the recipe or asks for what is not supported; names both values.
    """
    merged = {key: copy.deepcopy(value) for key, value in settings.items() if value != "auto"}
    owned = {
        "train_batch_size": (micro_batch * accumulation * world_size, "loop.global_batch"),
        "train_micro_batch_size_per_gpu": (
            micro_batch,
            f"loop.global_batch over {world_size} process(es) and {accumulation} micro-batch(es)",
        ),
        "gradient_accumulation_steps": (accumulation, "engine.accumulation"),
        "gradient_clipping": (clip_norm or 0.0, "the head's optimizer.clip_norm"),
    }
    for key, (value, owner) in owned.items():
        if merged.setdefault(key, value) != value:
            raise LaunchError(
                f"{source} sets {key} to {merged[key]} but the recipe says {value} ({owner}): take {key} out of the "
                "JSON, or change the recipe"
            )
    for key, owner in RECIPE_SECTIONS.items():
        section = merged.pop(key, None)
        if section is None or (isinstance(section, dict) and section.get("enabled") is False):
            continue
        raise LaunchError(f"{source} has a section {key!r}, which the recipe owns: take it out and set {owner}")
    unknown = sorted(set(merged) - set(owned) - PASSED_ON)
    if unknown:
        raise LaunchError(
            f"{source} sets {', '.join(unknown)}, which is not passed on to DeepSpeed: take it out (passed on are "
            f"{', '.join(sorted(PASSED_ON))})"
        )
    merged["zero_optimization"] = _zero_section(merged.get("zero_optimization", {}), source, zero_stage)
    _set_autocast(merged, source, precision)
    # The recipe's AdamW is torch's; with the optimizer offloaded DeepSpeed would insist on its own.
    merged.setdefault("zero_force_ds_cpu_optimizer", False)
    # Its throughput lines synchronise the device at each micro-batch; the monitor measures throughput.
    merged.setdefault("timers", {"throughput": {"enabled": False, "synchronized": False}})
    merged.setdefault("steps_per_print", 2**31)
    return merged


def _zero_section(section: Any, source: str, zero_stage: int | None) -> dict[str, Any]:
    if not isinstance(section, dict):
        raise LaunchError(f"{source}: zero_optimization is {section!r}: expected an object")
    section = {key: value for key, value in section.items() if value != "auto"}
    stage = section.setdefault("stage", zero_stage or 2)
    if stage not in (1, 2, 3):
        raise LaunchError(
            f"{source} sets zero_optimization.stage to {stage}: give 1, 2 or 3 (without ZeRO, use engine.kind "
            "'accelerate')"
        )
    if zero_stage is not None and stage != zero_stage:
        raise LaunchError(
            f"{source} sets zero_optimization.stage to {stage} but engine.zero_stage is {zero_stage}: leave one of "
            "them out"
        )
    for key, off in ZERO_UNSUPPORTED.items():
        if section.get(key) not in (None, off):
            raise LaunchError(f"{source} sets zero_optimization.{key} to {section[key]}: heads are not trained with it")
    offload_parameters = (section.get("offload_param") or {}).get("device", "none")
    if offload_parameters != "none":
        raise LaunchError(
            f"{source} sets zero_optimization.offload_param.device to {offload_parameters}: only the optimizer can be "
            "offloaded (offload_optimizer)"
        )
    offload = section.get("offload_optimizer") or {}
    if offload.get("device", "none") not in ("none", "cpu"):
        raise LaunchError(
            f"{source} sets zero_optimization.offload_optimizer.device to {offload['device']}: give 'cpu' or 'none'"
        )
    if offload.get("ratio", 1.0) != 1.0 or offload.get("super_offload"):
        raise LaunchError(
            f"{source}: zero_optimization.offload_optimizer offloads all or nothing: take ratio and super_offload out"
        )
    return section


def _set_autocast(merged: dict[str, Any], source: str, precision: str) -> None:
    """Set torch_autocast, never the bf16 mode: that one turns every parameter of the head bfloat16."""
    section = merged.pop("torch_autocast", {})
    wanted = precision == "bfloat16"
    enabled = section.get("enabled", wanted)
    dtype = section.get("dtype", "bfloat16")
    if enabled != wanted or (enabled and dtype not in ("bfloat16", "bf16", "torch.bfloat16")):
        found = f"enabled {enabled}, dtype {dtype}"
        raise LaunchError(
            f"{source} sets torch_autocast ({found}) but the recipe's precision is {precision} (engine.precision): "
            "take it out"
        )
    if wanted:
        # No module's gradients travel in bfloat16 unless the JSON names it.
        modules = section.get("lower_precision_safe_modules", [])
        merged["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": modules}


def _settings_of_accelerate(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what Accelerate's DeepSpeed fields ask for, as a JSON would say it; its defaults ask for nothing."""
    settings: dict[str, Any] = {}
    zero: dict[str, Any] = {}
    stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    if stage.isdigit():
        zero["stage"] = int(stage)
    for name, key in (("OPTIMIZER", "offload_optimizer"), ("PARAM", "offload_param")):
        device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", "none").lower()
        if device not in ("", "none"):
            zero[key] = {"device": device}
    if zero:
        settings["zero_optimization"] = zero
    steps = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps.isdigit() and int(steps) != 1:
        settings["gradient_accumulation_steps"] = int(steps)
    clipping = environ.get("ACCELERATE_GRADIENT_CLIPPING", "none").lower()
    if clipping not in ("", "none", "auto"):
        settings["gradient_clipping"] = float(clipping)
    return settings
