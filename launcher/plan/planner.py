"""Plan memory, traffic and time of a recipe's step on GPUs that need not be here: `permafrost plan`.

One row is one layout: a tensor degree, an engine and the recipe's micro-batches. All numbers are of one rank; ranks are
alike. What a row is made of is found out in backbone.py (the frozen network, on the meta device), head.py (heads,
run on made-up images) and engines.py (what engines hold and send).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from permafrost.data.build import target_type
from permafrost.launcher.engines.base import parameter_groups, resolve_precision
from permafrost.launcher.engines.choose import choose_engine
from permafrost.launcher.engines.deepspeed_json import merge_settings, read_settings
from permafrost.launcher.errors import RecipeError
from permafrost.launcher.experiment import EngineConfig, Experiment, OffloadMode
from permafrost.launcher.plan.backbone import BackbonePlan, degrees_of, plan_backbone, settle_windows, spec_of
from permafrost.launcher.plan.batches import PlannedData
from permafrost.launcher.plan.engines import EngineMemory, EnginePlan, Stage
from permafrost.launcher.plan.fine_tune import TrainedPlan, build_trained, join_plans, plan_trained
from permafrost.launcher.plan.head import HeadPlan, HeadRun, plan_head
from permafrost.launcher.ranks.division import micro_batch_size
from permafrost.launcher.ranks.process_group import ProcessGroup
from permafrost.launcher.run.fine_tune import FineTuned
from permafrost.launcher.run.parts import build_heads
from permafrost.model.precision import choose_dtype

STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
RESERVED = 0.08
"""Share of a GPU's memory that is left for CUDA's context, its libraries' workspaces and the allocator's gaps."""
NODE_BANDWIDTH = 300e9
"""Bytes a second that a rank sends to others of its node: NVLink of an H100 (450e9 each way), two thirds of it."""
NETWORK_BANDWIDTH = 40e9
"""The same to other nodes: 400 Gb/s per GPU, four fifths of it."""


@dataclass(frozen=True)
class Machines:
    """Machines that the recipe is to run on.

    Attributes:
        gpus: on each node.
        nodes: how many.
        memory: bytes of each GPU; None: unknown, then nothing is judged.
        tflops: what a GPU really computes in a second, 10^12.
        device_type: "cuda", or "cpu" for the numbers of a run on CPUs.
    """

    gpus: int = 1
    nodes: int = 1
    memory: int | None = None
    tflops: float = 400.0
    device_type: str = "cuda"

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.gpus * self.nodes

    @property
    def usable(self) -> float:
        """Return the bytes that a plan may fill."""
        return float("inf") if self.memory is None else self.memory * (1 - RESERVED)


@dataclass(frozen=True)
class Layout:
    """Choices about the way a recipe runs."""

    tensor: int
    stage: Stage
    accumulation: int
    offload: OffloadMode = "off"
    offload_optimizer: bool = False

    @property
    def engine(self) -> str:
        """Return the engine in words."""
        name = f"ZeRO {self.stage}" if self.stage else "accelerate"
        return name + (", optimizer on the host" if self.offload_optimizer else "")


@dataclass(frozen=True)
class Row:
    """One layout's numbers, for one rank: bytes on the device, bytes sent and floating-point operations a step.

    Attributes:
        memory: by kind; `peak` is the most at any moment and not their sum, as not all are there at once.
        phase: when the peak is: "backbone", "head forward", "head backward" or "optimizer".
        host: bytes in host memory.
        sent: by who sends and collective.
        seconds: of a step, without overlap.
    """

    layout: Layout
    micro_batch: int
    memory: dict[str, int]
    phase: str
    host: int
    sent: dict[str, int]
    flops: int
    seconds: float

    @property
    def peak(self) -> int:
        """Return the most bytes on the device at any moment."""
        return self.memory["peak"]


@dataclass
class Planner:
    """Makes rows; what they share is found out once.

    Args:
        experiment: the recipe's.
        machines: what it is to run on.
        objects: in each image (see data.task.TaskDataConfig.objects_are); None: what the data can have, or is assumed.
        num_classes: K; None: what the data says, or is assumed.

    Raises:
        LaunchError: the global batch, or the recipe's tensor groups, do not divide over the ranks.
        RecipeError: plan cannot run the network.
    """

    experiment: Experiment
    machines: Machines
    objects: int | None = None
    num_classes: int | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.experiment.backbone.frozen and self.experiment.engine.offload != "off":
            raise RecipeError("backbone.frozen is False: plan can predict that only with engine.offload 'off'")
        self.micro_batch(self.own)
        ProcessGroup(0, self.machines.world_size, 0, torch.device("cpu")).require_mesh(self.own.tensor)
        self._describe_data()
        self._network, notes = settle_windows(self.experiment.backbone)
        self.notes += notes
        if self._crosses_nodes(self.own.tensor):
            self.notes.append(
                f"mesh.tensor {self.own.tensor} with {self.machines.gpus} GPUs a node: tensor groups have ranks on several nodes, "
                f"and their traffic is counted at {NETWORK_BANDWIDTH / 1e9:g} GB/s; a degree that divides "
                f"{self.machines.gpus} stays in a node"
            )
        if self.experiment.backbone.compile:
            self.notes.append(
                "backbone.compile is planned as if it were off: a compiled forward holds less at its peak"
            )
        if self.experiment.backbone.cuda_graph:
            self.notes.append(
                "backbone.cuda_graph is planned as if it were off: each size of images keeps its memory for good"
            )
        if self.experiment.backbone.fp8:
            self.notes.append("backbone.fp8 is planned as if it were off: linear layers then have half the bytes")
        for choice, plain in (("attention", "sdpa"), ("residual_norm", "torch")):
            value = getattr(self.experiment.backbone, choice)
            if value not in ("auto", plain):
                self.notes.append(
                    f"backbone.{choice} {value!r} is planned as {plain!r}: a kernel holds less at its peak, the reference more"
                )
        self._trained_backbones: dict[int, TrainedPlan] = {}
        self._backbones: dict[tuple[int, int], BackbonePlan] = {}
        self._heads: dict[tuple[str, int, OffloadMode], HeadPlan] = {}

    def _describe_data(self) -> None:
        data, extent = self.experiment.data, self.experiment.data.extent()
        self.num_classes = self.num_classes or extent.num_classes
        if self.num_classes is None:
            self.num_classes = data.many_classes
            self.notes.append(f"{self.num_classes} classes are assumed; --classes N says otherwise")
        self.objects = self.objects or extent.objects
        if self.objects is None:
            self.objects = data.many_objects
            self.notes.append(
                f"{self.objects} {data.objects_are} in every image are assumed, a crowded one: memory grows with them; "
                "--objects N says otherwise"
            )
        maps = None if extent.num_frames is None else extent.num_frames // self.experiment.backbone.patch_frames
        self.data = PlannedData(target_type(data), self.num_classes, self.objects, extent.num_frames, maps)
        self._side = extent.side

    @cached_property
    def own(self) -> Layout:
        """Return the layout that the recipe itself says."""
        engine = self.experiment.engine
        stage: Stage = 0
        offload_optimizer = False
        # Of this environment's launcher nothing is taken: the recipe will run elsewhere.
        if choose_engine(engine, {})[0] == "deepspeed":
            section = self._zero_section(engine)
            stage = section["stage"]
            offload_optimizer = (section.get("offload_optimizer") or {}).get("device", "none") == "cpu"
        return Layout(self.experiment.mesh.tensor, stage, engine.accumulation, engine.offload, offload_optimizer)

    @property
    def degrees(self) -> list[int]:
        """Return the tensor degrees that divide both the network's heads and a node's GPUs; of a network that is trained only 1."""
        if not self.experiment.backbone.frozen:
            return [1]
        degrees = degrees_of(self.experiment.backbone)
        return [degree for degree in degrees if self.machines.gpus % degree == 0]

    def micro_batch(self, layout: Layout) -> int:
        """Return how many images one forward on one rank takes.

        Raises:
            LaunchError: the global batch does not divide.
        """
        return micro_batch_size(
            global_batch=self.experiment.loop.global_batch,
            world_size=self.machines.world_size,
            accumulation=layout.accumulation,
        )

    def table(self) -> list[Row]:
        """Return a row for every tensor degree and engine, the rest as the recipe says; its own layout among them."""
        layouts = [
            replace(self.own, tensor=tensor, stage=stage, offload_optimizer=self.own.offload_optimizer and stage > 0)
            for tensor in self.degrees
            for stage in STAGES
        ]
        if self.own not in layouts:
            layouts.insert(0, self.own)
        return [self.row(layout) for layout in layouts]

    def _memory(self, engine: EnginePlan, name: str, groups: Sequence[Sequence[int]]) -> EngineMemory:
        memory = engine.memory(groups)
        return memory if self.experiment.heads[name].ema_decay is None else engine.with_average(memory)

    def row(self, layout: Layout) -> Row:
        """Return one layout's numbers."""
        micro_batch, accumulation = self.micro_batch(layout), layout.accumulation
        backbone = self._backbone(layout.tensor, micro_batch)
        engine = self._engine(layout)
        heads = [
            (self._head(name, micro_batch, layout.offload), self._memory(engine, name, groups), engine.sent(groups))
            for name, groups in self._groups.items()
        ]
        memories = [memory for _, memory, _ in heads]
        batch = accumulation * self.data.num_bytes(micro_batch, self._side)
        # All micro-batches pass the backbone before the first head.
        maps = backbone.map_bytes * accumulation if layout.offload == "off" else 0
        resident = backbone.frozen_bytes + sum(memory.resident for memory in memories)
        peaks = {"backbone": resident + batch + max(0, maps - backbone.map_bytes) + backbone.peak_bytes}
        waiting = 0
        for head, memory, _ in heads:
            forward, backward = _head_peaks(head, memory, accumulation)
            for phase, own in (("head forward", forward), ("head backward", backward)):
                peaks[phase] = max(peaks.get(phase, 0), resident + batch + maps + waiting + own)
            # A head's gradients wait until every head has had its backward.
            waiting += memory.gradients - memory.resident_gradients
        peaks["optimizer"] = resident + batch + maps + waiting + max(memory.stepping for memory in memories)
        phase = max(peaks, key=lambda name: peaks[name])

        sent: dict[str, int] = {}
        for name, num_bytes in backbone.sent.items():
            sent[f"tensor {name}"] = num_bytes * accumulation
        for _, _, own_sent in heads:
            for name, num_bytes in own_sent.items():
                sent[f"heads {name}"] = sent.get(f"heads {name}", 0) + num_bytes
        counting = accumulation if accumulation > 1 else 0
        flops = accumulation * backbone.flops + sum(
            accumulation * head.flops + counting * head.forward_flops for head, _, _ in heads
        )
        return Row(
            layout=layout,
            micro_batch=micro_batch,
            memory={
                "frozen weights": backbone.frozen_bytes,
                "head weights": sum(memory.weights for memory in memories),
                "gradients": sum(memory.gradients for memory in memories),
                "optimizer": sum(memory.optimizer for memory in memories),
                "feature maps": maps,
                "head activations": max(head.saved_bytes for head, _, _ in heads),
                "backbone transient": backbone.peak_bytes,
                "batch": batch,
                "peak": peaks[phase],
            },
            phase=phase,
            host=sum(memory.host for memory in memories) + max(head.host_bytes for head, _, _ in heads) * accumulation,
            sent=sent,
            flops=flops,
            seconds=flops / (self.machines.tflops * 1e12) + self._seconds_sending(sent, layout.tensor),
        )

    def fits(self, row: Row) -> bool:
        """Return whether a row's peak leaves the share that is reserved."""
        return row.peak <= self.machines.usable

    @cached_property
    def _groups(self) -> dict[str, list[list[int]]]:
        """Return the elements of every parameter of each head, by AdamW's parameter groups."""
        groups = {}
        for name, run in self._runs.items():
            module = run.head
            if not self.experiment.backbone.frozen:
                factor = self.experiment.backbone.learning_rate_factor
                module = FineTuned(build_trained(self._network), run.head, learning_rate_factor=factor)
            split = parameter_groups(module, self.experiment.heads[name].optimizer)
            groups[name] = [[one.numel() for one in group.parameters.values()] for group in split]
        return groups

    @cached_property
    def _runs(self) -> dict[str, HeadRun]:
        experiment, spec = self.experiment, spec_of(self.experiment.backbone)
        heads = build_heads(experiment, spec, [str(index) for index in range(self.data.num_classes)])
        return {
            name: HeadRun(
                head=head.train(),
                spec=spec,
                map_dtype=self._dtype,
                precision=resolve_precision(experiment.engine.precision, self.machines.device_type),
                data=self.data,
                offload="off",
                device_type=self.machines.device_type,
            )
            for name, head in heads.items()
        }

    @property
    def _dtype(self) -> torch.dtype:
        return choose_dtype(self.experiment.backbone, torch.device(self.machines.device_type))[0]

    def _trained(self, micro_batch: int) -> TrainedPlan:
        if micro_batch not in self._trained_backbones:
            self._trained_backbones[micro_batch] = plan_trained(
                self._network,
                batch=math.prod(self.data.lead(micro_batch)),
                size=(self._side, self._side),
                precision=resolve_precision(self.experiment.engine.precision, self.machines.device_type),
                device_type=self.machines.device_type,
            )
        return self._trained_backbones[micro_batch]

    def _backbone(self, tensor: int, micro_batch: int) -> BackbonePlan:
        key = (tensor, micro_batch)
        if not self.experiment.backbone.frozen:
            # All of it is the head's.
            return BackbonePlan(sum(self._trained(micro_batch).numels), 0, 0, 0, 0)
        if key not in self._backbones:
            self._backbones[key] = plan_backbone(
                self._network,
                dtype=self._dtype,
                tensor=tensor,
                images=self.data.image_shape(micro_batch, self._side),
            )
        return self._backbones[key]

    def _head(self, name: str, micro_batch: int, offload: OffloadMode) -> HeadPlan:
        key = (name, micro_batch, offload)
        if key not in self._heads:
            run, is_frozen = replace(self._runs[name], offload=offload), self.experiment.backbone.frozen
            if not is_frozen:
                run = replace(run, map_dtype=self._trained(micro_batch).map_dtype, trains_features=True)
            found = plan_head(run, batch=micro_batch, side=self._side)
            self._heads[key] = found if is_frozen else join_plans(self._trained(micro_batch), found)
            note = f"heads were run on {'fewer clips' if self.data.maps else 'smaller images'} and extrapolated"
            if self._heads[key].is_extrapolated and note not in self.notes:
                self.notes.append(note)
        return self._heads[key]

    def _engine(self, layout: Layout) -> EnginePlan:
        section: dict[str, Any] = {}
        if layout.stage:
            own = self.experiment.engine
            # The recipe's own JSON for its own stage; the shipped ones for the others.
            config = own if layout.stage == self.own.stage else EngineConfig(kind="deepspeed", zero_stage=layout.stage)
            section = dict(self._zero_section(config))
            section["offload_optimizer"] = {"device": "cpu" if layout.offload_optimizer else "none"}
        return EnginePlan(
            stage=layout.stage,
            num_ranks=self.machines.world_size,
            accumulation=layout.accumulation,
            zero=section,
            is_fused=self.machines.device_type == "cuda",
        )

    def _zero_section(self, config: EngineConfig) -> dict[str, Any]:
        settings, source = read_settings(config, {})
        merged = merge_settings(
            settings,
            source,
            micro_batch=1,
            accumulation=1,
            world_size=1,
            clip_norm=None,
            precision="float32",
            zero_stage=config.zero_stage,
        )
        return merged["zero_optimization"]

    def _crosses_nodes(self, tensor: int) -> bool:
        """Return whether some group of so many consecutive ranks has members on two nodes."""
        return self.machines.nodes > 1 and self.machines.gpus % tensor != 0

    def _seconds_sending(self, sent: dict[str, int], tensor: int) -> float:
        between = NODE_BANDWIDTH if self.machines.nodes == 1 else NETWORK_BANDWIDTH
        in_group = NETWORK_BANDWIDTH if self._crosses_nodes(tensor) else NODE_BANDWIDTH
        return sum(num_bytes / (in_group if name.startswith("tensor") else between) for name, num_bytes in sent.items())


def _head_peaks(head: HeadPlan, memory: EngineMemory, accumulation: int) -> tuple[int, int]:
    """Return the most bytes that a head's forward and backward hold besides what is resident and the feature maps."""
    piled = memory.gradients - memory.resident_gradients
    # From the second micro-batch on the first one's gradients are there.
    before = piled if accumulation > 1 else 0
    forward = memory.gathered + before + head.forward_peak
    own, held = 0, before
    for peak, numel in zip(head.backward_peaks, (*head.numels, 0), strict=True):
        own = max(own, held + peak)
        if memory.keeps_gradients and accumulation == 1:
            held += 4 * numel
    own = max(own, held, memory.reducing + before)
    return forward, memory.gathered + memory.bucket + own
