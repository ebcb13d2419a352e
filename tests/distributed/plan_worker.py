"""Measures what a real training step holds and sends: the measurements that `permafrost plan` is compared with.

Bytes held are those of the engines' own tensors, bytes sent those given to torch.distributed, the peak torch's own
report of every allocation and release of the CPU's allocator.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from common import arguments, save_result
from torch import Tensor

from permafrost.data.build import train_set
from permafrost.data.stream.loader import collate
from permafrost.data.types import Batch, SampleKey
from permafrost.launcher.engines.choose import build_engine
from permafrost.launcher.ranks.exit import run_and_leave
from permafrost.launcher.ranks.process_group import join_process_group
from permafrost.launcher.recipes.overrides import parse_experiment
from permafrost.launcher.run.offload import ActivationOffload
from permafrost.launcher.run.parts import build_backbone, join_heads
from permafrost.launcher.train import head_losses

SENT: defaultdict[str, float] = defaultdict(float)
SMALLEST = 1 << 10
"""Bytes; shorter messages (norms, counts, sizes) are no payload."""


def count_collectives() -> None:
    """Note what every rank would send in a ring, of each collective that Python calls."""
    depth = 0

    def wrap(name: str, kind: str, place: int, keyword: str, factor) -> None:
        original = getattr(dist, name)

        @functools.wraps(original)
        def counted(*args, **kwargs) -> Any:
            nonlocal depth
            tensor = args[place] if len(args) > place else kwargs[keyword]
            num_bytes = factor(dist.get_world_size(kwargs.get("group"))) * tensor.nbytes
            # One may be written in terms of another.
            if depth == 0 and num_bytes >= SMALLEST:
                SENT[kind] += num_bytes
            depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                depth -= 1

        setattr(dist, name, counted)

    wrap("all_reduce", "all-reduce", 0, "tensor", lambda n: 2 * (n - 1) / n)
    wrap("all_gather", "all-gather", 1, "tensor", lambda n: n - 1)
    wrap("all_gather_into_tensor", "all-gather", 1, "input_tensor", lambda n: n - 1)
    wrap("reduce_scatter_tensor", "reduce-scatter", 0, "output", lambda n: n - 1)
    wrap("broadcast", "broadcast", 0, "tensor", lambda n: 1)


def watch_buckets(model: torch.nn.Module) -> dict[str, int]:
    """DDP reduces in C++, unless it is given a hook: this one does the same, and notes the buckets, which are there for
    good."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    buckets: dict[str, int] = defaultdict(int)

    # Without annotations: DDP compares them with types, and here they are strings.
    def hook(state, bucket):  # noqa: ANN202
        buckets["total"] += bucket.buffer().nbytes
        return allreduce_hook(dist.group.WORLD, bucket)

    model.register_comm_hook(None, hook)
    return buckets


def unique_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Count the bytes of the storages of some tensors, each once."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors if one is not None}
    return sum(storages.values())


def states_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def held(engine, kind: str, *, gradients: bool) -> dict[str, int]:
    """Bytes of an engine's own tensors: between steps, or with `gradients` before a step."""
    if kind == "accelerate":
        parameters = list(engine.head.parameters())
        if gradients:
            return {"gradients": unique_bytes(parameter.grad for parameter in parameters)}
        return {
            "head weights": unique_bytes(parameters),
            "optimizer": unique_bytes(states_of(engine._optimizer.optimizer)),
        }
    zero = engine._engine.optimizer
    if kind == "zero3":
        buckets = [bucket.buffer for bucket in zero.ipg_buckets.values()]
        if gradients:
            return {"gradients": unique_bytes([zero.grad_partitions_flat_buffer, *buckets])}
        whole = [parameter.data for parameter in engine.head.parameters()]
        return {
            "head weights": unique_bytes([zero.lp_param_buffer, *whole]),
            "optimizer": unique_bytes(states_of(zero.optimizer)),
        }
    if gradients:
        return {"gradients": unique_bytes(one for group in zero.averaged_gradients.values() for one in group)}
    return {
        "head weights": unique_bytes(zero.bit16_groups_flat),
        "optimizer": unique_bytes([*zero.single_partition_of_fp32_groups, *states_of(zero.optimizer)]),
    }


def allocator_peak(events) -> int:
    """Most bytes that were allocated and not released since the profile began."""
    live = peak = 0
    memory = [event for event in events if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def forward_and_backward(group, backbone, engine, batches, offload) -> list:
    """A step as train_steps takes it, up to the optimizer; the feature maps, which stay until it is done."""
    with torch.no_grad():
        features = [offload.forward(backbone, batch.images) for batch in batches]
    head_losses(engine, features, batches, group, offload)
    return features


def measure(group, recipe: str, kind: str, fields: list[str]) -> dict:
    """Three steps of a recipe's head under one kind of engine: the third is measured."""
    engine_fields = [] if kind == "accelerate" else ["--engine.kind", "deepspeed", "--engine.zero-stage", kind[-1]]
    experiment = parse_experiment(recipe, [*fields, *engine_fields])
    training = train_set(experiment.data)
    built = build_backbone(experiment, group, experiment.mesh.tensor)
    backbone, heads = join_heads(experiment, built, training.classes)
    (head,) = heads.values()
    frozen = built if experiment.backbone.frozen else torch.nn.Module()
    del built
    (config,) = experiment.heads.values()
    engine = build_engine(
        head,
        optimizer=config.optimizer,
        engine=experiment.engine,
        group=group,
        global_batch=experiment.loop.global_batch,
    )
    engine.train()
    buckets = watch_buckets(engine._model) if kind == "accelerate" and group.world_size > 1 else {}
    accumulation = experiment.engine.accumulation
    size = experiment.loop.global_batch // (group.world_size * accumulation)
    keys = iter(range(10**6))

    def next_batches() -> list[Batch]:
        return [
            collate([training[SampleKey(0, 0, next(keys) % len(training))] for _ in range(size)])
            for _ in range(accumulation)
        ]

    offload = ActivationOffload(experiment.engine.offload, group.device)
    for _ in range(2):
        features = forward_and_backward(group, backbone, engine, next_batches(), offload)
        del features
        engine.step(1e-4)
    resident = {**held(engine, kind, gradients=False)}
    resident["frozen weights"] = unique_bytes([*frozen.parameters(), *frozen.buffers(), *constants(frozen)])
    always = sum(resident.values())
    if kind == "zero3":
        always += held(engine, kind, gradients=True)["gradients"]
    SENT.clear()
    buckets.clear()
    batches = next_batches()
    targets = [target for batch in batches for target in batch.targets]
    always += unique_bytes([*(batch.images for batch in batches), *(target.masks for target in targets)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        features = forward_and_backward(group, backbone, engine, batches, offload)
        before_step = held(engine, kind, gradients=True)
        engine.step(1e-4)
    before_step["gradients"] += buckets.get("total", 0)
    always += buckets.get("total", 0)
    del features
    own = {**resident, **before_step, "peak": always + allocator_peak(profile.profiler.kineto_results.events())}
    everyone = group.gather_objects(own) or [own]
    # A plan is of the rank that holds most.
    return {"sent": dict(SENT), "held": {name: max(one[name] for one in everyone) for name in own}}


def constants(backbone) -> Iterator[Tensor]:
    for module in backbone.modules():
        for kept in (getattr(module, "folded", None) or {}).values():
            # The scale of a Swin V1 is a number.
            yield from (one for one in kept if isinstance(one, Tensor))


def main() -> None:
    options = arguments()
    count_collectives()
    group = join_process_group("cpu")
    results = {
        name: measure(group, options["recipe"], kind, fields) for name, (kind, fields) in options["measure"].items()
    }
    save_result(group, options["result"], results)
    group.close()


if __name__ == "__main__":
    run_and_leave(main)
