"""Build torch's AdamW as both engines use it: its groups, an explicit implementation, and its state as plain tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from permafrost.launcher.engines.base import parameter_groups

if TYPE_CHECKING:
    from permafrost.launcher.experiment import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
FACTOR = "learning_rate_factor"
"""Key of a parameter group: what its learning rate is multiplied by."""


def build_adamw(head: nn.Module, config: OptimizerConfig, *, device_type: str) -> torch.optim.AdamW:
    """Build AdamW over the head's parameters, in the groups of `parameter_groups`.

    The implementation is named rather than left to torch, whose default depends on the tensors it meets: the fused
    kernel where the parameters are on CUDA ("cuda"), the plain loop elsewhere. The learning rate arrives with each
    step.
    """
    groups = [
        {
            "params": list(group.parameters.values()),
            "weight_decay": config.weight_decay if group.decayed else 0.0,
            FACTOR: group.learning_rate_factor,
        }
        for group in parameter_groups(head, config)
    ]
    on_cuda = device_type == "cuda"
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=on_cuda,
        foreach=False,
    )


def set_learning_rate(param_groups: list[dict[str, Any]], learning_rate: float) -> None:
    """Give every group this learning rate, times its own factor."""
    for group in param_groups:
        group["lr"] = learning_rate * group[FACTOR]


def adamw_state(parameter: Tensor, group: dict[str, Any], step: int) -> dict[str, Tensor]:
    """Return the state torch's AdamW keeps for one parameter after `step` steps, with zero moments, for the caller to fill.

    The step lives where AdamW itself puts it: beside the parameter for its fused and capturable forms, else on the CPU.
    """
    beside = group["fused"] or group["capturable"]
    return {
        "step": torch.tensor(float(step), dtype=torch.float32, device=parameter.device if beside else "cpu"),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def single_step(steps: list[float]) -> int:
    """Return the one step count that all of an optimizer's states agree on; 0 when there is none."""
    if not steps:
        return 0
    assert len(set(steps)) == 1, (
        f"the optimizer's parameters have taken different numbers of steps: {sorted(set(steps))}"
    )
    return int(steps[0])
