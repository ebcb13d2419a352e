"""DeepSpeedEngine: it puts ZeRO 1, 2 or 3 around the head only.

DeepSpeed broadcasts every parameter it is given from rank 0, frozen ones included, so it never sees the backbone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from permafrost.launcher.engines.adamw import build_adamw, set_learning_rate
from permafrost.launcher.engines.base import (
    HeadState,
    StepReport,
    autocast,
    export_buffers,
    import_buffers,
    persistent_buffers,
    resolve_precision,
)
from permafrost.launcher.engines.deepspeed_json import merge_settings, read_settings
from permafrost.launcher.engines.zero_state import (
    drop_gradients,
    export_weights,
    export_zero,
    flat_partitions,
    import_weights,
    import_zero,
    parameter_shapes,
    skip_shared_memory_op,
)
from permafrost.launcher.errors import LaunchError
from permafrost.launcher.ranks.process_group import ProcessGroup, complete_single_process

if TYPE_CHECKING:
    from permafrost.data.types import Batch
    from permafrost.heads.base import Head, LossCounts
    from permafrost.launcher.experiment import EngineConfig, OptimizerConfig


class DeepSpeedEngine:
    """Trains a head under ZeRO. engines.base.Engine says what each method does."""

    def __init__(
        self,
        head: Head,
        *,
        optimizer: OptimizerConfig,
        engine: EngineConfig,
        group: ProcessGroup,
        micro_batch: int,
        environ: MutableMapping[str, str] | None = None,
    ) -> None:
        """Move the head to the process group's device and hand it to DeepSpeed.

        Args:
            micro_batch: images of one forward on one rank.
            environ: what to read Accelerate's wishes from; None is os.environ.

        Raises:
            LaunchError: the JSON contradicts the recipe, or DeepSpeed would compute elsewhere than the run.
        """
        self.precision = resolve_precision(engine.precision, group.device.type)
        settings, self.settings_source = read_settings(engine, os.environ if environ is None else environ)
        self.settings = merge_settings(
            settings,
            self.settings_source,
            micro_batch=micro_batch,
            accumulation=engine.accumulation,
            world_size=group.world_size,
            clip_norm=optimizer.clip_norm,
            precision=self.precision,
            zero_stage=engine.zero_stage,
        )
        deepspeed = start_deepspeed(group)
        self.head = head.to(group.device)
        self._group = group
        self._accumulation = engine.accumulation
        self._num_backward = 0
        self._parameters = dict(head.named_parameters())
        self._buffer_names = persistent_buffers(head)
        zero = self.settings["zero_optimization"]
        offloads = (zero.get("offload_optimizer") or {}).get("device", "none") == "cpu"
        self._stage: int = zero["stage"]
        self._engine, *_ = deepspeed.initialize(
            model=head,
            optimizer=build_adamw(head, optimizer, device_type="cpu" if offloads else group.device.type),
            config=self.settings,
        )
        self.name = (
            f"deepspeed (ZeRO {self._stage} over {group.world_size} process(es), {self.precision}, "
            f"{self._accumulation} micro-batch(es) a step{', optimizer on the CPU' if offloads else ''}; "
            f"{self.settings_source})"
        )

    def __call__(self, features: Sequence[Tensor], batch: Batch, counts: LossCounts) -> Any:
        """Run the head; in evaluation ZeRO 1 and 2 run the raw one, ZeRO 3 gathers its parameters, collectively."""
        if self.head.training:
            # Stage 1 reduces, and all stages hand over to the optimizer, in the last micro-batch's backward.
            self._engine.set_gradient_accumulation_boundary(self._num_backward == self._accumulation - 1)
            return self._engine(features, batch, counts)
        with torch.no_grad():
            if self._stage == 3:
                return self._engine(features, batch, counts)
            with autocast(self.precision, self._group.device.type):
                return self.head(features, batch, counts)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Run the backward; DeepSpeed divides by the number of micro-batches itself."""
        assert self._num_backward < self._accumulation, f"more than {self._accumulation} backward calls in one step"
        self._engine.backward(loss)
        self._num_backward += 1

    def step(self, learning_rate: float) -> StepReport:
        assert self._num_backward == self._accumulation, f"{self._num_backward} backward calls of {self._accumulation}"
        set_learning_rate(self._engine.optimizer.param_groups, learning_rate)
        self._engine.step()
        self._num_backward = 0
        norm = self._engine.get_global_grad_norm()
        return StepReport(grad_norm=None if norm is None else float(norm), skipped=not self._engine.was_step_applied())

    def skip_step(self) -> None:
        drop_gradients(self._engine)
        self._num_backward = 0

    def export_state(self) -> HeadState:
        parameters, moments, step = export_zero(self._engine, self._parameters)
        buffers = export_buffers(self.head, self._buffer_names, self._group)
        return HeadState(parameters=parameters, buffers=buffers, step=step, **moments)

    def masters(self) -> list[Tensor]:
        return [flat.detach() for flat in flat_partitions(self._engine)]

    def export_parameters(self) -> dict[str, Tensor]:
        return export_weights(self._parameters)

    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        import_weights(self._engine, self._parameters, parameters)

    def import_state(self, state: HeadState) -> None:
        state.require_fit(
            parameter_shapes(self._parameters),
            {name: self.head.get_buffer(name).shape for name in self._buffer_names},
        )
        self.skip_step()
        import_zero(self._engine, self._parameters, state)
        import_buffers(self.head, self._buffer_names, state)


def start_deepspeed(group: ProcessGroup) -> Any:
    """Import DeepSpeed for the process group's device, quietly, and join its communication to the process group.

    Returns:
        the module deepspeed.

    Raises:
        LaunchError: DeepSpeed would compute on another device than the run.
    """
    device = group.device
    if device.type == "cpu":
        # Else it takes a GPU where there is one, and warns where there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if device.type == "cuda" and device.index not in (None, group.local_rank):
        raise LaunchError(
            f"device is {device} but DeepSpeed takes device number LOCAL_RANK ({group.local_rank}): choose the GPU "
            f"with CUDA_VISIBLE_DEVICES={device.index} and --device cuda"
        )
    if group.world_size == 1:
        complete_single_process(os.environ)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().device_name()
    if found != device.type:
        raise LaunchError(
            f"DeepSpeed computes on {found} but the run's device is {device}: unset DS_ACCELERATOR, or set it to "
            f"{device.type}"
        )
    if device.type == "cpu":
        skip_shared_memory_op()
    # torch 2.14 renames these; DeepSpeed 0.19 calls them by the names that older ones know as well.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated", FutureWarning
    )
    # Explicit: on a CPU its own choice of a backend depends on what else is installed.
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)
    return deepspeed
