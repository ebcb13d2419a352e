"""The part that the evidence scripts share: cells that are runs of their own on one thread, and what their seeds say together."""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

CellT = TypeVar("CellT")


def run_apart(script: str, values: Sequence[Any], folder: Path) -> Any:
    """Runs `script --child JSON` in a process of its own, on one thread; what it leaves in the run folder is deleted when it is done.

    Args:
        script: whose --child ends with a line of JSON.
        values: JSON values; the folder is added to them as the last.
        folder: of the run. One that was interrupted goes on there.

    Returns:
        what the last line says.

    Raises:
        SystemExit: the process failed; what it said is shown.
    """
    done = subprocess.run(
        [sys.executable, script, "--child", json.dumps([*values, str(folder)])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        raise SystemExit(f"{folder.name} failed:\n{done.stdout[-4000:]}")
    shutil.rmtree(folder)
    return json.loads(done.stdout.splitlines()[-1])


class Costs:
    """In a --child: what it took from here on, on one thread."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.start = time.monotonic()

    def columns(self) -> dict[str, object]:
        """`torch`, `cpu_s` (of this process and its ended children, imports included) and `wall_s`."""
        import torch

        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return {
            "torch": torch.__version__,
            "cpu_s": round(sum(one.ru_utime + one.ru_stime for one in used), 1),
            "wall_s": round(time.monotonic() - self.start, 1),
        }


def run_all(cells: Sequence[CellT], run: Callable[[CellT], Any], jobs: int) -> Iterator[tuple[Any, Sequence[CellT]]]:
    """Runs cells, `jobs` at a time: (what `run` returned, the cells after it), in their order."""
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        started = [pool.submit(run, cell) for cell in cells]
        for number, future in enumerate(started, start=1):
            yield future.result(), cells[number:]


def remaining(missing: Sequence[Any], times: dict[Any, float], jobs: int) -> str:
    """Return how long cells take.

    Args:
        missing: of each cell what `times` knows its kind by.
        times: seconds of processor time of a cell of each kind that has been run.
        jobs: cells at a time.
    """
    if not missing:
        return "no cell is missing"
    if not times:
        return f"{len(missing)} cells are missing; the first tells how long they take"
    typical = statistics.mean(times.values())
    seconds = sum(times.get(kind, typical) for kind in missing)
    return f"{len(missing)} cells are missing: about {seconds / jobs / 60:.0f} minutes on {jobs} free core(s)"


def described(values: Sequence[float]) -> str:
    """A mean with its spread."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)})"


def gap(frozen: dict[int, float], full: dict[int, float]) -> str:
    """The mean difference of equal seeds, and whether it counts."""
    both = sorted(frozen.keys() & full.keys())
    if not both:
        return "-"
    differences = [full[seed] - frozen[seed] for seed in both]
    text = f"{statistics.mean(differences):+.3f} ({min(differences):+.3f} to {max(differences):+.3f})"
    if len(both) < 2:
        return f"{text}, one seed: no spread known"
    apart = max(frozen.values()) < min(full.values()) or max(full.values()) < min(frozen.values())
    return f"{text}, {'beyond' if apart else 'within'} the spread of the seeds"
