"""Measures what pretraining is worth: a quickstart with its pretrained frozen backbone beside the same run on random frozen weights.

    python benchmarks/quickstart.py --seeds 0 1 2 [--kinds pretrained random] [--recipe quickstart_segmentation]

Every run is the plain command `permafrost train RECIPE` in a process of its own, with an empty cache folder (the
twin: `--backbone.weights random:SEED`, another draw for each seed), so what is measured is what a user gets: time from
the command to the first progress line and to the end, processor time and peak memory of the process and its data workers,
how many cores other processes kept busy meanwhile, and the metrics of the last step. Runs alternate between the two kinds.
Rows are appended to benchmarks/results/RECIPE.csv; a row that is there already is not measured again, so an interrupted
benchmark goes on.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from records import processor

RESULTS = Path(__file__).parent / "results"
FIELDS = (
    "date", "commit", "processor", "cores", "threads", "torch", "weights", "seed", "num_steps",
    "first_line_s", "total_s", "cpu_s", "others_cores", "sum_rss_gb", "sum_pss_gb",
)  # fmt: skip
"""Columns of every recipe; its metrics follow."""
METRICS = {
    "quickstart": ("detection", {"box_ap": "bbox/AP", "mask_ap": "segm/AP"}),
    "quickstart_segmentation": (
        "segmentation",
        {"miou": "semantic/mIoU", "pixel_accuracy": "semantic/pixel_accuracy"},
    ),
    "quickstart_video": ("video", {"top1": "video/top1", "top5": "video/top5"}),
}
"""Of every recipe the head, and its metrics: the column, and the name in final.json."""


def watch_memory(pid: int, peaks: dict[str, int], stop: threading.Event) -> None:
    """Keeps the largest sums, over a process and its children, of resident bytes and of proportional ones.

    A forked data worker shares most pages with its parent: resident bytes count them twice, proportional ones (PSS) once.
    """
    while not stop.wait(2.0):
        try:
            process = psutil.Process(pid)
            used = [member.memory_full_info() for member in (process, *process.children(recursive=True))]
        except psutil.Error:
            continue
        for kind in peaks:
            peaks[kind] = max(peaks[kind], sum(getattr(one, kind) for one in used))


def busy_seconds() -> float:
    """Processor time that all processes of the machine have used so far, those of low priority included."""
    times = psutil.cpu_times()
    # Linux counts processes of low priority apart.
    return times.user + getattr(times, "nice", 0.0) + times.system


def measure(recipe_name: str, weights: str | None, seed: int, extra: list[str]) -> dict[str, object]:
    """Runs a quickstart once.

    Args:
        recipe_name: one of METRICS.
        weights: None for the recipe's own, else what `--backbone.weights` is set to.
        seed: `--loop.seed`.
        extra: further overrides.

    Returns:
        One row of the results.
    """
    repository = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=repository, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "-m", "permafrost.launcher.cli", "train", recipe_name, *extra]
        command += ["--loop.seed", str(seed), "--output", str(output)]
        command += ["--backbone.weights", weights] if weights else []
        # An empty cache: the first run on a machine renders the world.
        environment = os.environ | {"PERMAFROST_CACHE": str(Path(folder) / "cache")}
        before, busy = resource.getrusage(resource.RUSAGE_CHILDREN), busy_seconds()
        start, first, peaks, stop = time.monotonic(), None, {"rss": 0, "pss": 0}, threading.Event()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        watcher = threading.Thread(target=watch_memory, args=(process.pid, peaks, stop))
        watcher.start()
        lines = []
        for line in process.stdout:
            lines.append(line)
            if first is None and line.lstrip().startswith("step "):
                first = time.monotonic() - start
        total = time.monotonic() - start
        stop.set()
        watcher.join()
        if process.wait() != 0:
            raise SystemExit("".join(lines[-40:]))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        others = busy_seconds() - busy - used
        recipe = json.loads((output / "recipe.json").read_text())
        head, metrics = METRICS[recipe_name]
        final = json.loads((output / "final.json").read_text())["metrics"][head]
    experiment = recipe.get("experiment", recipe)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "weights": weights.partition(":")[0] if weights else "pretrained",
        "seed": seed,
        "num_steps": experiment["loop"]["num_steps"],
        "first_line_s": round(first, 1),
        "total_s": round(total, 1),
        "cpu_s": round(used, 1),
        "others_cores": round(max(0.0, others) / total, 2),
        "sum_rss_gb": round(peaks["rss"] / 2**30, 2),
        "sum_pss_gb": round(peaks["pss"] / 2**30, 2),
        **{column: round(final[name], 4) for column, name in metrics.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=("pretrained", "random"), default=["pretrained", "random"])
    parser.add_argument("--recipe", choices=METRICS, default="quickstart")
    parser.add_argument("--results", type=Path, help="benchmarks/results/RECIPE.csv unless given")
    arguments, extra = parser.parse_known_args()
    results = arguments.results or RESULTS / f"{arguments.recipe}.csv"
    rows = list(csv.DictReader(results.open())) if results.exists() else []
    metrics = METRICS[arguments.recipe][1]
    done = {(row["weights"], int(row["seed"])) for row in rows}
    for seed in arguments.seeds:
        for kind, weights in (("pretrained", None), ("random", f"random:{seed}")):
            if kind not in arguments.kinds or (kind, seed) in done:
                continue
            row = measure(arguments.recipe, weights, seed, extra)
            print(row, flush=True)
            rows.append({name: str(value) for name, value in row.items()})
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("w", newline="") as file:
                writer = csv.DictWriter(file, (*FIELDS, *metrics), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    for weights in ("pretrained", "random"):
        for metric in (*metrics, "first_line_s", "total_s", "cpu_s", "sum_pss_gb"):
            values = [float(row[metric]) for row in rows if row["weights"] == weights and row.get(metric)]
            if values:
                spread = f"{min(values):.3f} to {max(values):.3f}"
                print(f"{weights:10} {metric:14} median {statistics.median(values):.3f}  ({spread}, n = {len(values)})")


if __name__ == "__main__":
    main()
