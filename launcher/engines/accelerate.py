"""AccelerateEngine: it trains in one process, or under DDP, through Hugging Face Accelerate, which gets the head only."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor

from permafrost.launcher.engines.adamw import MOMENTS, adamw_state, build_adamw, set_learning_rate, single_step
from permafrost.launcher.engines.base import (
    HeadState,
    StepReport,
    autocast,
    export_buffers,
    import_buffers,
    is_true,
    persistent_buffers,
    resolve_precision,
)
from permafrost.launcher.errors import LaunchError
from permafrost.launcher.ranks.process_group import RANK_VARIABLES, RENDEZVOUS_VARIABLES, ProcessGroup

if TYPE_CHECKING:
    from permafrost.data.types import Batch
    from permafrost.heads.base import Head, LossCounts
    from permafrost.launcher.experiment import EngineConfig, OptimizerConfig

UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_TP": "tensor parallelism",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
"""What Accelerate's launcher can ask for and a head is not trained with."""


class AccelerateEngine:
    """Trains a head in one process or, of several, under DDP. engines.base.Engine says what each method does."""

    def __init__(
        self,
        head: Head,
        *,
        optimizer: OptimizerConfig,
        engine: EngineConfig,
        group: ProcessGroup,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Move the head to the process group's device and wrap it.

        Raises:
            LaunchError: Accelerate's launcher asks for something this engine does not do.
        """
        environ = os.environ if environ is None else environ
        self.head = head.to(group.device)
        self.precision = resolve_precision(engine.precision, group.device.type)
        check_accelerate_environment(environ, self.precision)
        self._group = group
        self._accumulation = engine.accumulation
        self._clip_norm = optimizer.clip_norm
        self._num_backward = 0
        self._parameters = dict(head.named_parameters())
        self._buffer_names = persistent_buffers(head)
        with _environment_of(group), warnings.catch_warnings():
            # It sets the number of CPU threads where OMP_NUM_THREADS is not set, and warns that it did.
            warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
            # Accelerate knows DDP's option by its older name only; torch 2.15 announces a new one.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            self._accelerator = Accelerator(
                cpu=group.device.type == "cpu",
                device_placement=False,
                # Autocast and the division by the number of micro-batches are done here: there they are process-wide.
                mixed_precision="no",
                dynamo_backend="no",
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
                # The head's graph is the same on every rank and step. Buffers are each rank's own, as under DeepSpeed.
                kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False, broadcast_buffers=False)],
            )
            self._model, self._optimizer = self._accelerator.prepare(
                head, build_adamw(head, optimizer, device_type=group.device.type)
            )
        how = f"DDP over {group.world_size} processes" if group.world_size > 1 else "single process"
        self.name = f"accelerate ({how}, {self.precision}, {self._accumulation} micro-batch(es) a step)"

    def __call__(self, features: Sequence[Tensor], batch: Batch, counts: LossCounts) -> Any:
        """Run the head; in evaluation the raw one: no collectives."""
        if not self.head.training:
            with torch.no_grad(), autocast(self.precision, self._group.device.type):
                return self.head(features, batch, counts)
        is_last = self._num_backward == self._accumulation - 1
        computes = autocast(self.precision, self._group.device.type)
        # DDP decides in the forward whether its backward will average gradients.
        with contextlib.nullcontext() if is_last else self._accelerator.no_sync(self._model), computes:
            return self._model(features, batch, counts)

    def train(self, mode: bool = True) -> None:
        self._model.train(mode)

    def backward(self, loss: Tensor) -> None:
        assert self._num_backward < self._accumulation, f"more than {self._accumulation} backward calls in one step"
        self._accelerator.backward(loss / self._accumulation)
        self._num_backward += 1

    def step(self, learning_rate: float) -> StepReport:
        assert self._num_backward == self._accumulation, f"{self._num_backward} backward calls of {self._accumulation}"
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        norm_tensor = torch.nn.utils.get_total_norm(gradients)
        norm = norm_tensor.item()
        if not math.isfinite(norm):
            self.skip_step()
            return StepReport(grad_norm=norm, skipped=True)
        if self._clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._clip_norm, norm_tensor)
        set_learning_rate(self._optimizer.param_groups, learning_rate)
        self._optimizer.step()
        self.skip_step()
        return StepReport(grad_norm=norm, skipped=False)

    def skip_step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._num_backward = 0

    def export_state(self) -> HeadState:
        states = self._optimizer.optimizer.state
        zero = {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in self._parameters.items() if p not in states}
        moments = {
            key: {
                name: zero[name].clone() if name in zero else states[parameter][key].detach().to("cpu", copy=True)
                for name, parameter in self._parameters.items()
            }
            for key in MOMENTS
        }
        return HeadState(
            parameters=self.export_parameters(),
            buffers=export_buffers(self.head, self._buffer_names, self._group),
            step=single_step([states[p]["step"].item() for p in self._parameters.values() if p in states]),
            **moments,
        )

    def masters(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._parameters.values()]

    def export_parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(parameters[name])

    @torch.no_grad()
    def import_state(self, state: HeadState) -> None:
        state.require_fit(
            {name: parameter.shape for name, parameter in self._parameters.items()},
            {name: self.head.get_buffer(name).shape for name in self._buffer_names},
        )
        self.skip_step()
        optimizer = self._optimizer.optimizer
        group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self._parameters.items():
            parameter.copy_(state.parameters[name])
            entry = adamw_state(parameter, group_of[parameter], state.step)
            for key in MOMENTS:
                entry[key].copy_(getattr(state, key)[name])
            optimizer.state[parameter] = entry
        import_buffers(self.head, self._buffer_names, state)


def check_accelerate_environment(environ: Mapping[str, str], precision: str) -> None:
    """Refuse what Accelerate's launcher asks for and a head is not trained with, rather than pass over it.

    Raises:
        LaunchError: naming the variable, and what to change.
    """
    for name, words in UNSUPPORTED.items():
        if is_true(environ.get(name)):
            raise LaunchError(
                f"{name} is {environ[name]!r}: heads are not trained with {words}; choose MULTI_GPU or DEEPSPEED in "
                "the configuration given to accelerate launch (configs/accelerate/single_node.yaml works)"
            )
    dynamo = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() not in ("", "no"):
        raise LaunchError(
            f"ACCELERATE_DYNAMO_BACKEND is {dynamo!r}: heads are not compiled; take dynamo_config out of the "
            "configuration"
        )
    mixed = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    wanted = {"bf16": "bfloat16", "no": precision, "": precision}.get(mixed, mixed)
    if wanted != precision:
        raise LaunchError(
            f"ACCELERATE_MIXED_PRECISION is {mixed!r} but the head's compute is in {precision} (engine.precision): "
            "change engine.precision, or set mixed_precision: 'no' in the configuration given to accelerate launch"
        )


@contextlib.contextmanager
def _environment_of(group: ProcessGroup) -> Iterator[None]:
    """Show Accelerate the launcher's variables as they should be, and undo what it writes into them.

    From the rank variables of a world of one, which torchrun and a DeepSpeed engine of an earlier run in this process
    set, it would build a process group and DDP. On a CPU it writes a guess (1) into LOCAL_WORLD_SIZE.
    """
    names = (*RANK_VARIABLES, *RENDEZVOUS_VARIABLES, "LOCAL_WORLD_SIZE")
    before = {name: os.environ[name] for name in names if name in os.environ}
    if group.world_size == 1:
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)
