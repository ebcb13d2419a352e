"""The 3 B SwinV2 held for real: written once, loaded, run, and a head trained on top of it, with the memory of each.

    python benchmarks/giant.py FOLDER [--name swinv2_giant] [--side 192] [--steps 2]

Random weights (seed 0) are drawn tensor by tensor and written to FOLDER as sharded safetensors in bfloat16 (6 GB), unless they
are there. Then, in a process of its own: loading them as a frozen bfloat16 backbone, one forward of one image, and
training steps of the Mask R-CNN head of `coco:swinv2_base_fpn` on it (single process, float32 head, AdamW). Anonymous
memory is sampled; pages of mapped files, which the system can drop, are not part of it. Appends a row to
benchmarks/results/giant.csv.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from records import append, processor

RESULTS = Path(__file__).parent / "results" / "giant.csv"
GIB = 2**30


def write(name: str, folder: Path) -> None:
    """Draws the weights and writes them, about two shards in memory at a time."""
    from permafrost.model.swin.load import resident_dtype
    from permafrost.model.swin.v2 import SwinV2
    from permafrost.model.swin.weights import draw_weights
    from permafrost.model.weights.header import encode_header
    from permafrost.model.weights.shards import save_sharded
    from permafrost.model.weights.tensor_map import Entry, Tensors

    with torch.device("meta"):
        network = SwinV2(name)
    drawn = draw_weights(network, seed=0)

    def entry(key: str, tensor: torch.Tensor) -> Entry:
        def read() -> torch.Tensor:
            # The draw goes by sorted names, and so does the writer.
            found, value = next(drawn)
            assert found == key, (found, key)
            return value

        return Entry(tuple(tensor.shape), torch.float32, read)

    header = {
        "name": name,
        "window_size": network.window_size,
        "pretrained_window_size": network.pretrained_window_size,
        "extra_norm_interval": network.extra_norm_interval,
    }
    save_sharded(
        Tensors({key: entry(key, tensor) for key, tensor in network.state_dict().items()}),
        folder,
        header=encode_header(header),
        architecture={"name": name},
        in_fingerprint=lambda key: True,
        dtype=lambda key: resident_dtype(key, torch.bfloat16),
    )


def anonymous_bytes() -> int:
    """Resident anonymous memory of this process."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@contextmanager
def measured(report: dict[str, float], name: str):
    """Adds seconds and the peak of anonymous memory (GiB, above what was there at the start of the process's work)."""
    peak, stop = [anonymous_bytes()], threading.Event()

    def sample() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.monotonic()
    try:
        yield
    finally:
        report[f"{name}_s"] = round(time.monotonic() - start, 1)
        stop.set()
        sampler.join()
        report[f"{name}_peak_gib"] = round((max(peak[0], anonymous_bytes()) - report["base"]) / GIB, 3)


def run(name: str, folder: Path, side: int, steps: int) -> dict[str, object]:
    """Loads, computes and trains; returns a row."""
    from permafrost.configs.coco import swinv2_base_fpn
    from permafrost.data.detection.types import DetectionTarget
    from permafrost.heads.base import world_mean_counts
    from permafrost.heads.build import build_head
    from permafrost.launcher.engines.choose import build_engine
    from permafrost.launcher.experiment import EngineConfig
    from permafrost.launcher.plan.batches import PlannedData
    from permafrost.launcher.ranks.process_group import join_process_group
    from permafrost.model import load_backbone

    report: dict[str, float] = {"base": anonymous_bytes()}
    with measured(report, "load"):
        backbone = load_backbone(name, weights=folder, dtype=torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in backbone.parameters())
    batch = PlannedData(DetectionTarget, num_classes=80, objects=5).batch(1, side)
    batch.images.random_(0, 256, generator=torch.Generator().manual_seed(0))
    with measured(report, "forward"):
        maps = backbone(batch.images)
    finite = all(bool(one.isfinite().all()) for one in maps)
    del maps

    detection = swinv2_base_fpn().heads["detection"]
    torch.manual_seed(0)
    head = build_head(detection.model, spec=backbone.spec, classes=[str(index) for index in range(80)])
    group = join_process_group("cpu")
    engine = build_engine(
        head, optimizer=detection.optimizer, engine=EngineConfig(kind="accelerate"), group=group, global_batch=1
    )
    engine.train()
    losses = []
    with measured(report, "steps"):
        for _ in range(steps):
            total = torch.stack(list(engine(backbone(batch.images), batch, world_mean_counts).values())).sum()
            engine.backward(total)
            engine.step(1e-4)
            losses.append(round(total.item(), 4))
    base = report.pop("base")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "name": name,
        "side": side,
        "steps": steps,
        "parameters_m": round(sum(parameter.numel() for parameter in backbone.parameters()) / 1e6, 1),
        "weights_gib": round(weights / GIB, 3),
        "process_base_gib": round(base / GIB, 3),
        **report,
        "finite": finite,
        "losses": " ".join(map(str, losses)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="swinv2_giant")
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run(arguments.name, arguments.folder, arguments.side, arguments.steps)))
        return
    if not arguments.folder.exists():
        start = time.monotonic()
        write(arguments.name, arguments.folder)
        print(f"wrote {arguments.folder} in {time.monotonic() - start:.0f} s", flush=True)
    # A fresh process: what writing left behind would count.
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    print(json.dumps(row, indent=1))
    append(RESULTS, list(row), [row])


if __name__ == "__main__":
    main()
