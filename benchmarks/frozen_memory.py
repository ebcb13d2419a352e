"""Peak memory of a training step with the backbone frozen, against full fine-tuning of the same recipe.

    python benchmarks/frozen_memory.py [--recipes quickstart coco:swinv2_base_fpn] [--repeats 3]

Each measurement is a process of its own on one CPU thread: it builds what `permafrost train` builds (backbone, head, engine)
with random weights, takes two steps of the recipe (the second with all of AdamW's state in place) and reports the most
anonymous resident memory that the kernel has seen since the process had only imported its modules. Batch and image size are
the command line's for coco (float32 on a CPU, so that it fits a small machine) and the recipe's own for the quickstart; the
images are made up, with the same objects both ways. Beside it stands what `permafrost plan --device cpu` predicts. Rows are
appended to benchmarks/results/frozen_memory.csv: medians over the repeats, which alternate between the ways.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from records import append, processor

RESULTS = Path(__file__).parent / "results" / "frozen_memory.csv"
GIB = 2**30
# (global batch, image side) where it is not the recipe's own.
SIZES = {"coco:swinv2_base_fpn": (1, 512)}
WAYS = {
    "frozen": [],
    "trained": ["--backbone.frozen", "False"],
    "trained, recomputed": ["--backbone.frozen", "False", "--backbone.checkpoint-activations", "True"],
}
NUM_STEPS = 2
NUM_OBJECTS = 8
FIELDS = (
    "date", "processor", "threads", "torch", "recipe", "backbone", "images", "side", "way", "trainable_m",
    "peak_gib", "lowest_gib", "highest_gib", "planned_gib", "times_frozen", "step_s", "repeats",
)  # fmt: skip


def anonymous_bytes() -> int:
    """Resident anonymous memory of this process."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def fields_of(recipe: str, way: str) -> list[str]:
    """The command line's fields of one measurement."""
    fields = ["--backbone.weights", "random", "--engine.kind", "accelerate", *WAYS[way]]
    if recipe in SIZES:
        batch, side = SIZES[recipe]
        fields += ["--loop.global-batch", str(batch), "--data.image-size", str(side)]
    return fields


def measure(recipe: str, way: str) -> dict[str, object]:
    """Two steps in this process."""
    import torch

    from permafrost.data.detection.types import DetectionTarget
    from permafrost.launcher.engines.choose import build_engine
    from permafrost.launcher.plan.batches import PlannedData
    from permafrost.launcher.plan.planner import Machines, Planner
    from permafrost.launcher.ranks.process_group import join_process_group
    from permafrost.launcher.recipes.overrides import parse_experiment
    from permafrost.launcher.run.offload import ActivationOffload
    from permafrost.launcher.run.parts import build_backbone, join_heads
    from permafrost.launcher.train import head_losses

    experiment = parse_experiment(recipe, fields_of(recipe, way))
    images, side = experiment.loop.global_batch, experiment.data.image_size
    group = join_process_group("cpu")
    # What is only imported, and the allocator's and AdamW's first use, are no part of a step.
    weight = torch.nn.Linear(8, 8)
    weight(torch.zeros(1, 8)).sum().backward()
    torch.optim.AdamW(weight.parameters()).step()
    base, peak, stop = anonymous_bytes(), [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    num_classes = 8 if recipe == "quickstart" else 80
    backbone, heads = join_heads(
        experiment, build_backbone(experiment, group, 1), [str(index) for index in range(num_classes)]
    )
    ((name, head),) = heads.items()
    trainable = sum(parameter.numel() for parameter in head.parameters())
    config = experiment.heads[name]
    engine = build_engine(
        head, optimizer=config.optimizer, engine=experiment.engine, group=group, global_batch=images, environ={}
    )
    engine.train()
    offload = ActivationOffload("off", group.device)
    for _ in range(NUM_STEPS):
        start = time.monotonic()
        batch = PlannedData(DetectionTarget, num_classes, NUM_OBJECTS).batch(images, side)
        batch.images.random_(0, 256, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = [offload.forward(backbone, batch.images)]
        losses = head_losses(engine, features, [batch], group, offload)
        assert all(bool(loss.isfinite()) for loss in losses.values())
        engine.step(1e-4)
        del features, losses, batch
    seconds = time.monotonic() - start
    stop.set()
    sampler.join()
    planner = Planner(experiment, Machines(device_type="cpu"), objects=NUM_OBJECTS, num_classes=num_classes)
    return {
        "backbone": experiment.backbone.name,
        "images": images,
        "side": side,
        "trainable_m": round(trainable / 1e6, 2),
        "peak_gib": (max(peak[0], anonymous_bytes()) - base) / GIB,
        "planned_gib": round(planner.row(planner.own).peak / GIB, 3),
        "step_s": seconds,
        "torch": torch.__version__,
    }


def in_a_fresh_process(recipe: str, way: str) -> dict[str, object]:
    """A measurement; glibc gives large blocks back at once, so that what is freed does not count."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, "--child", recipe, way]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ).stdout
    return json.loads(text.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["quickstart", "coco:swinv2_base_fpn"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return
    for recipe in arguments.recipes:
        found: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(arguments.repeats):
            for way in WAYS:
                found[way].append(in_a_fresh_process(recipe, way))
        frozen = statistics.median(one["peak_gib"] for one in found["frozen"])
        rows = []
        for way, measured in found.items():
            peaks = [one["peak_gib"] for one in measured]
            rows.append(
                {
                    "date": datetime.date.today().isoformat(),
                    "processor": processor(),
                    "threads": 1,
                    "recipe": recipe,
                    "way": way,
                    **measured[0],
                    "peak_gib": round(statistics.median(peaks), 3),
                    "lowest_gib": round(min(peaks), 3),
                    "highest_gib": round(max(peaks), 3),
                    "times_frozen": round(statistics.median(peaks) / frozen, 2),
                    "step_s": round(statistics.median(one["step_s"] for one in measured), 2),
                    "repeats": len(measured),
                }
            )
            print(rows[-1], flush=True)
        append(RESULTS, FIELDS, rows)


if __name__ == "__main__":
    main()
