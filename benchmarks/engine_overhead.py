"""Measures what an engine costs: a step of the quickstart's head under DeepSpeedEngine and AccelerateEngine against a bare PyTorch loop.

    python benchmarks/engine_overhead.py [--steps 40] [--recipe quickstart]

One process, one head, the same features and targets for all: the bare loop is forward, backward, clipping by norm and torch's
AdamW in two groups, and nothing else. Contestants take a step each in turn, every round in another order, so that whatever
else the machine does hits all alike; the first rounds are not counted. Losses must agree before a time is believed. Rows are
appended to benchmarks/results/engine_overhead.csv: median and quartiles in ms, and against the bare loop's step of the same
round the median ratio and the median of the extra milliseconds; and the process's CPU time, which other work on the machine
disturbs less. About three minutes on one quiet core.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from records import append, processor

RESULTS = Path(__file__).parent / "results" / "engine_overhead.csv"
CONTESTANTS = ("bare", "accelerate", "zero1", "zero2", "zero3")
WARM_UP = 4
LEARNING_RATE = 1e-4
SAME_LOSS = 1e-3


def contestants(recipe: str) -> tuple[dict[str, Callable[[], float]], int]:
    """Return what takes a step and returns its loss, by name; and the number of images of a step."""
    from permafrost.data.detection.types import DetectionTarget
    from permafrost.heads.base import world_mean_counts
    from permafrost.launcher.engines.base import parameter_groups
    from permafrost.launcher.engines.choose import build_engine
    from permafrost.launcher.experiment import EngineConfig
    from permafrost.launcher.plan.batches import PlannedData
    from permafrost.launcher.ranks.process_group import join_process_group
    from permafrost.launcher.recipes.overrides import parse_experiment
    from permafrost.launcher.run.parts import build_heads
    from permafrost.model import build_backbone

    experiment = parse_experiment(recipe, [])
    ((name, config),) = experiment.heads.items()
    group = join_process_group("auto")
    images, side = experiment.loop.global_batch, experiment.data.image_size
    classes = [str(index) for index in range(8)]
    batch = PlannedData(DetectionTarget, num_classes=len(classes), objects=8).batch(images, side).to(group.device)
    batch.images.random_(0, 256)
    backbone = build_backbone(experiment.backbone, group.device)
    features = backbone(batch.images)

    def new_head() -> torch.nn.Module:
        return build_heads(experiment, backbone.spec, classes)[name]

    def engine_step(kind: str) -> Callable[[], float]:
        fields = {"kind": "accelerate"} if kind == "accelerate" else {"kind": "deepspeed", "zero_stage": int(kind[-1])}
        engine = build_engine(
            new_head(),
            optimizer=config.optimizer,
            engine=EngineConfig(precision="float32", **fields),
            group=group,
            global_batch=images,
            environ={},
        )
        engine.train()

        def step() -> float:
            total = torch.stack(list(engine(features, batch, world_mean_counts).values())).sum()
            engine.backward(total)
            engine.step(LEARNING_RATE)
            return total.item()

        return step

    bare = new_head().to(group.device).train()
    optimizer = torch.optim.AdamW(
        [
            {"params": list(group.parameters.values()), "weight_decay": config.optimizer.weight_decay * group.decayed}
            for group in parameter_groups(bare, config.optimizer)
        ],
        lr=LEARNING_RATE,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=group.device.type == "cuda",
        foreach=False,
    )

    def bare_step() -> float:
        total = torch.stack(list(bare(features, batch, world_mean_counts).values())).sum()
        optimizer.zero_grad()
        total.backward()
        if config.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(bare.parameters(), config.optimizer.clip_norm, foreach=False)
        optimizer.step()
        return total.item()

    # DeepSpeed sets a launcher's variables for a world of one; Accelerate's engine is built before.
    steps = {"bare": bare_step, **{kind: engine_step(kind) for kind in CONTESTANTS[1:]}}
    return steps, images


def device_name() -> str:
    """The processor's or the GPU's own name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--note", default="", help="what else the machine did, for the row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps, images = contestants(arguments.recipe)
    times: dict[str, list[float]] = {name: [] for name in steps}
    cpu_times: dict[str, list[float]] = {name: [] for name in steps}
    orders = random.Random(0)
    for number in range(WARM_UP + arguments.steps):
        losses = {}
        for name in orders.sample(list(steps), len(steps)):
            start, cpu_start = time.perf_counter(), time.process_time()
            losses[name] = steps[name]()
            if number >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
                cpu_times[name].append(1e3 * (time.process_time() - cpu_start))
        if number < WARM_UP:
            different = {name: loss for name, loss in losses.items() if abs(loss / losses["bare"] - 1) > SAME_LOSS}
            assert not different, (
                f"step {number + 1}: the bare loop's loss is {losses['bare']}, others' are {different}"
            )
    bare, cpu_bare = (statistics.median(found["bare"]) for found in (times, cpu_times))
    rows = []
    for name, own in times.items():
        low, median, high = statistics.quantiles(own, n=4)
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "processor": device_name(),
                "cores": len(os.sched_getaffinity(0)),
                "torch": torch.__version__,
                "recipe": arguments.recipe,
                "images": images,
                "engine": name,
                "median_ms": round(median, 2),
                "low_ms": round(low, 2),
                "high_ms": round(high, 2),
                "times_bare": round(median / bare, 4),
                "median_of_ratios": round(statistics.median(a / b for a, b in zip(own, times["bare"])), 4),
                "extra_ms": round(statistics.median(a - b for a, b in zip(own, times["bare"])), 2),
                "cpu_ms": round(statistics.median(cpu_times[name]), 2),
                "cpu_times_bare": round(statistics.median(cpu_times[name]) / cpu_bare, 4),
                "steps": len(own),
                "load": round(os.getloadavg()[0], 1),
                "note": arguments.note,
            }
        )
        print(rows[-1], flush=True)
    append(RESULTS, list(rows[0]), rows)


if __name__ == "__main__":
    main()
