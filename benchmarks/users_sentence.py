"""Does what the project promises, as one run: the 3 B SwinV2 in bfloat16 split over two processes, offload, a ZeRO 2 head.

    python benchmarks/users_sentence.py FOLDER [--name swinv2_giant]

Random weights are written to FOLDER as sharded safetensors (6 GB, see giant.py) unless they are there. DeepSpeed's launcher then
starts two ranks of this file, which train the recipe `giant:smoke` on them with the loop's own code: one step of two images of
192 x 192 with activation offload, then a checkpoint and an evaluation of two images. Each rank notes what it holds, by kind, and
samples its anonymous memory; pages of mapped files, which the system can drop, are not part of that. The table is printed beside
what `permafrost plan` says, and appended to benchmarks/results/users_sentence.csv. Two CPU cores and 14 GB of memory do.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from giant import GIB, anonymous_bytes, measured, write
from records import append, processor

RESULTS = Path(__file__).parent / "results" / "users_sentence.csv"


def unique_bytes(tensors: Any) -> int:
    """Count the bytes of the storages of some tensors, each once."""
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def train_one_step(name: str, folder: Path, output: Path) -> None:
    """One rank: trains, and rank 0 writes the table of all."""
    base = anonymous_bytes()
    start = time.monotonic()
    from permafrost.launcher.plan.planner import Machines, Planner
    from permafrost.launcher.ranks.process_group import join_process_group
    from permafrost.launcher.recipes.overrides import parse_experiment
    from permafrost.launcher.run.folder import RunFolder
    from permafrost.launcher.run.monitor import Monitor
    from permafrost.launcher.run.parts import build_parts
    from permafrost.launcher.run.session import finish, open_session
    from permafrost.launcher.run.startup import announce, count_parameters
    from permafrost.launcher.train import train_steps

    fields = ["--backbone.name", name, "--backbone.weights", str(folder), "--output", str(output)]
    experiment = parse_experiment("giant:smoke", fields)
    report: dict[str, float] = {"base": base}
    group = join_process_group("cpu")
    run = RunFolder.of(experiment)
    group.on_main(lambda: run.prepare(experiment, "never"))
    with measured(report, "build"):
        parts = build_parts(experiment, group)
    num_parameters = count_parameters(parts)
    with Monitor(run, num_steps=1, is_main=group.is_main, start_step=0, log_every=1) as monitor:
        session = open_session(experiment, group, run, monitor, parts, None)
        announce(session, num_parameters, None, [])
        (trainee,) = session.trainees.values()
        with measured(report, "train"):
            done = train_steps(session, 0)
        finish(session, done)
    zero = trainee.engine._engine.optimizer
    states = [value for state in zero.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    constants = [
        one
        for module in parts.backbone.modules()
        for row in (getattr(module, "folded", None) or {}).values()
        for one in row
    ]
    own: dict[str, float] = {
        "frozen weights": unique_bytes([*parts.backbone.parameters(), *parts.backbone.buffers(), *constants]),
        "head weights": unique_bytes(zero.bit16_groups_flat),
        "optimizer": unique_bytes([*zero.single_partition_of_fp32_groups, *states]),
        "loading_s": report["build_s"],
        "training_s": report["train_s"],
        "total_s": time.monotonic() - start,
    }
    for phase in ("build", "train"):
        own[f"peak anonymous above imports, {phase}"] = report[f"{phase}_peak_gib"] * GIB
    own["imports"] = base
    everyone = group.gather_objects(own)
    group.close()
    if group.is_main:
        # Only now: a plan runs the head, whose losses would wait for the other rank.
        planner = Planner(experiment, Machines(gpus=group.world_size, device_type="cpu"))
        _write_table(name, everyone, planner.row(planner.own), _logged(output))


def _logged(output: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if "memory/offload_gib" in line)


def _write_table(name: str, everyone: list[dict[str, float]], planned: Any, logged: dict[str, float]) -> None:
    offload = {
        "feature maps and activations offloaded": logged["memory/offload_gib"] * GIB,
        "share of what the head saves": logged["offload/share"],
        "loss": logged["detection/loss"],
    }
    rows = []
    for rank, own in enumerate(everyone):
        for kind, value in (own | (offload if rank == 0 else {})).items():
            in_bytes = not kind.endswith("_s") and kind not in ("loss", "share of what the head saves")
            plan = {"feature maps and activations offloaded": planned.host}.get(kind, planned.memory.get(kind))
            rows.append(
                {
                    "date": datetime.date.today().isoformat(),
                    "processor": processor(),
                    "cores": len(os.sched_getaffinity(0)),
                    "torch": torch.__version__,
                    "name": name,
                    "rank": rank,
                    "kind": kind,
                    "value": round(value / GIB if in_bytes else value, 4),
                    "unit": "GiB" if in_bytes else "s" if kind.endswith("_s") else "",
                    "planned": "" if plan is None else round(plan / GIB, 4),
                }
            )
    for row in rows:
        print(f"rank {row['rank']}  {row['kind']:<40} {row['value']:>9} {row['unit']:<4} {row['planned']}", flush=True)
    append(RESULTS, list(rows[0]), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="swinv2_giant")
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments, _ = parser.parse_known_args()  # The launcher adds --local_rank.
    if arguments.output is not None:
        train_one_step(arguments.name, arguments.folder, arguments.output)
        return 0
    if not arguments.folder.exists():
        write(arguments.name, arguments.folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(port)]
        command = [*launcher, __file__, str(arguments.folder), "--name", arguments.name, "--output", f"{scratch}/run"]
        environ = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        return subprocess.run(command, env=environ).returncode


if __name__ == "__main__":
    from permafrost.launcher.ranks.exit import run_and_leave

    run_and_leave(main)
