"""Read out and put back the state that DeepSpeed keeps to itself: a ZeRO engine's full weights and moments; drop its gradients.

DeepSpeed's own checkpoints hold a partition per rank and belong to one stage and one number of ranks. The functions
here exchange full tensors by parameter, so that a run continues under another stage, another number of processes, or
another engine. Everything in this project that leans on DeepSpeed's private names is in this file (written against
0.19, ZeRO 1 to 3, torch's AdamW).

Vocabulary: under ZeRO 1 and 2 each parameter group is one flat tensor that is cut into a partition per rank, and a
parameter's `_hp_mapping` says which of its elements lie in this rank's partition. Under ZeRO 3 every parameter is cut
by itself, padded to a multiple of the ranks; partitions of several parameters lie in one flat tensor per sub-group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from permafrost.launcher.engines.adamw import MOMENTS, adamw_state, single_step

if TYPE_CHECKING:
    import deepspeed

    from permafrost.launcher.engines.base import HeadState


def skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its CPU communication op.

    It serves inference only, takes a C++ compiler, ninja and about a minute at first use, and training never calls it.
    Where DeepSpeed's table of ops has another shape one day, the op is built as DeepSpeed has it.
    """
    import deepspeed.ops

    table = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(table, dict):
        table["deepspeed_shm_comm"] = False


def parameter_shapes(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[int, ...]]:
    """Return full shapes by name; under ZeRO 3 a parameter itself is empty between steps."""
    return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in parameters.items()}


def export_zero(
    engine: deepspeed.DeepSpeedEngine, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], int]:
    """Return (weights, {"exp_avg", "exp_avg_sq"}, step): full float32 CPU tensors on every rank. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    states = engine.optimizer.optimizer.state
    flats = flat_partitions(engine)
    # A flat tensor gets its state in its group's first step; the linking below may leave an empty entry before that.
    has_moments = all(states.get(flat) for flat in flats)
    if has_moments:
        _link(engine)
    weights = export_weights(parameters)
    moments: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS}
    for name, parameter in parameters.items():
        for key in MOMENTS:
            if has_moments:
                full = safe_get_full_optimizer_state(parameter, key)
                moments[key][name] = full.detach().to("cpu", copy=True)
            else:
                moments[key][name] = torch.zeros_like(weights[name])
    step = single_step([states[flat]["step"].item() for flat in flats]) if has_moments else 0
    return weights, moments, step


def export_weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return full float32 CPU tensors on every rank. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: safe_get_full_fp32_param(parameter).detach().to("cpu", copy=True)
        for name, parameter in parameters.items()
    }


@torch.no_grad()
def import_weights(
    engine: deepspeed.DeepSpeedEngine, parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]
) -> None:
    """Put full weights back, and leave moments as they are. Collective: every rank passes the same ones."""
    set_part = _set_partition if _is_stage3(engine) else _set_fragment
    for name, parameter in parameters.items():
        set_part(parameter, {"weight": weights[name]})


@torch.no_grad()
def import_zero(engine: deepspeed.DeepSpeedEngine, parameters: Mapping[str, nn.Parameter], state: HeadState) -> None:
    """Put full weights, moments and the step back into the partitions. Collective: every rank passes the same state."""
    zero = engine.optimizer
    group_of = _groups_of_flats(engine)
    for flat in flat_partitions(engine):
        # AdamW makes this itself in its first step; made here, the moments have a place before any step.
        zero.optimizer.state[flat] = adamw_state(flat, group_of[flat], state.step)
    _link(engine)
    for name, parameter in parameters.items():
        values = {"weight": state.parameters[name], **{key: getattr(state, key)[name] for key in MOMENTS}}
        if _is_stage3(engine):
            _set_partition(parameter, values)
        else:
            _set_fragment(parameter, values)
    engine.global_steps = state.step


def drop_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Forget what was accumulated and reduced since the last step, as DeepSpeed does itself over an overflow."""
    zero = engine.optimizer
    zero.zero_grad(set_to_none=True)
    if _is_stage3(engine):
        zero.averaged_gradients = {}
        offloads = zero.offload_optimizer
    else:
        # Offloaded gradients: the next micro-batch overwrites rather than adds.
        zero.micro_step_id = -1
        for key in zero.averaged_gradients:
            zero.averaged_gradients[key] = None
        for key in zero.all_grad_tensors:
            zero.all_grad_tensors[key] = None
        offloads = zero.cpu_offload
    if offloads:
        zero.reset_cpu_buffers()


def _is_stage3(engine: deepspeed.DeepSpeedEngine) -> bool:
    return engine.zero_optimization_stage() == 3


def flat_partitions(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """Return this rank's flat float32 tensors: what the inner AdamW holds as its parameters."""
    zero = engine.optimizer
    return list(zero.fp32_partitioned_groups_flat if _is_stage3(engine) else zero.single_partition_of_fp32_groups)


def _groups_of_flats(engine: deepspeed.DeepSpeedEngine) -> dict[Tensor, dict[str, Any]]:
    """Return the parameter group (decay or not) that each flat tensor is stepped with."""
    zero = engine.optimizer
    groups = zero.optimizer.param_groups
    flats = flat_partitions(engine)
    if _is_stage3(engine):
        return {flat: groups[zero.sub_group_to_group_id[index]] for index, flat in enumerate(flats)}
    return dict(zip(flats, groups))


def _link(engine: deepspeed.DeepSpeedEngine) -> None:
    """Point every parameter of ZeRO 1 and 2 at its part of the moments.

    DeepSpeed does so once, after the first group's first step, when the second group has no moments yet: with two
    groups it leaves the second one's parameters without any.
    """
    if _is_stage3(engine):
        return
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def _set_fragment(parameter: nn.Parameter, values: Mapping[str, Tensor]) -> None:
    """Set, under ZeRO 1 and 2, the model's own copy and this rank's elements of the master weights and moments."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    parameter.data.copy_(values["weight"])
    safe_set_full_fp32_param(parameter, values["weight"])
    for key in values.keys() & set(MOMENTS):
        safe_set_full_optimizer_state(parameter, values[key], key)


def _set_partition(parameter: nn.Parameter, values: Mapping[str, Tensor]) -> None:
    """Set, under ZeRO 3, this rank's slice of the padded values, then the model's own copy.

    DeepSpeed's `safe_set_full_*` do not pad, and fail where the elements do not divide by the ranks.
    """
    from deepspeed import comm, zero
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    # DeepSpeed has given it attributes that its type does not know.
    known: Any = parameter
    size, group = known.ds_tensor.numel(), known.ds_process_group
    rank, num_ranks = comm.get_rank(group), comm.get_world_size(group)

    def local(value: Tensor) -> Tensor:
        padded = value.new_zeros(size * num_ranks)
        padded[: value.numel()] = value.flatten()
        return padded.narrow(0, rank * size, size)

    safe_set_local_fp32_param(parameter, local(values["weight"]))
    for key in values.keys() & set(MOMENTS):
        safe_set_local_optimizer_state(parameter, local(values[key]), key)
    # The model computes with a copy of its own where the optimizer is offloaded, and keeps small parameters whole.
    with zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(values["weight"])
