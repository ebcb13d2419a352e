"""The part that the benchmarks of kernels share: times, the machine's own rates, floors, and the test that comes first.

Contestants take turns, in random order in each round, so that whatever else the machine does hits all of them. On a GPU a call is
timed by events after at least ten warm-ups: "cold" after a write that fills the L2 cache, "warm" right after the same call. Times are
given as 20th, 50th and 80th percentile.
"""

from __future__ import annotations

import datetime
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from records import processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured"
WARM_UPS = 10
_FLUSH_BYTES = 256 << 20
"""Above the L2 cache of every GPU."""


def pick_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def describe_machine(device: torch.device) -> dict[str, object]:
    """The columns that say where and with what."""
    columns: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "sm_mhz": "",
        "celsius": "",
    }
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,temperature.gpu", "--format=csv,noheader,nounits", "-i", "0"]
        try:
            text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
            columns["sm_mhz"], columns["celsius"] = (value.strip() for value in text.strip().split(","))
        except (OSError, subprocess.SubprocessError, ValueError):
            columns["sm_mhz"] = columns["celsius"] = "unknown"
    return columns


def device_name(device: torch.device) -> str:
    """The card, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()


def _version(module: str) -> str:
    try:
        return __import__(module).__version__
    except ImportError:
        return "absent"


def passes(*arguments: str) -> bool:
    """Return whether tests pass here, by pytest's arguments; what it says is shown where they do not."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (result.stdout.strip().splitlines() or [result.stderr])[-1]
    print(f"tests: {last}", flush=True)
    if result.returncode:
        print(result.stdout[-4000:], result.stderr[-2000:], file=sys.stderr, flush=True)
    return result.returncode == 0


def take_turns(
    calls: dict[str, Callable[[], object]], device: torch.device, *, repeats: int, cold: bool
) -> dict[str, list[float]]:
    """Milliseconds of each call, `repeats` times.

    Args:
        calls: By name of the contestant.
        device: Where they run.
        repeats: Timed rounds; on a CPU one more comes first, on a GPU WARM_UPS.
        cold: On a GPU: whether the L2 cache is filled with something else before each call. A CPU has no say.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    warm_ups = WARM_UPS if device.type == "cuda" else 1
    flush = (
        torch.empty(_FLUSH_BYTES if cold else 1, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    )
    for number in range(warm_ups + repeats):
        shuffle(order)
        for name in order:
            milliseconds = _time(calls[name], flush, cold)
            if number >= warm_ups:
                found[name].append(milliseconds)
    return found


def _time(call: Callable[[], object], flush: torch.Tensor | None, cold: bool) -> float:
    if flush is None:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1000
    if cold:
        flush.zero_()
    else:
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """Columns p20_ms, p50_ms, p80_ms."""
    cuts = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return {"p20_ms": round(cuts[1], 4), "p50_ms": round(cuts[4], 4), "p80_ms": round(cuts[7], 4)}


@dataclass(frozen=True)
class Rates:
    """Rates of this machine at its best, measured here and now.

    Attributes:
        copy: Bytes a second, read and written ones counted alike.
        products: FLOP a second of a large matrix product.
        exponentials: Of a GPU's special function units, from its clock: 16 a cycle and multiprocessor. Infinite elsewhere.
    """

    copy: float
    products: float
    exponentials: float

    def floor_ms(self, *, num_bytes: float, flops: float = 0.0, exponentials: float = 0.0) -> float:
        """Milliseconds below which no program comes that moves so much and computes so much, were all done at once."""
        return 1000 * max(
            num_bytes / self.copy, flops / self.products, exponentials / self.exponentials if exponentials else 0.0
        )


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of a device in a dtype: the best of several runs of a large copy and a large product."""
    is_gpu = device.type == "cuda"
    source = torch.empty((1 << 30 if is_gpu else 1 << 27) // dtype.itemsize, dtype=dtype, device=device).zero_()
    target = torch.empty_like(source)
    side = 8192 if is_gpu else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = take_turns(
        {"copy": lambda: target.copy_(source), "products": lambda: left @ right}, device, repeats=10, cold=False
    )
    exponentials = math.inf
    if is_gpu:
        properties = torch.cuda.get_device_properties(device)
        kilohertz = getattr(properties, "clock_rate", None)
        if kilohertz:
            exponentials = 16.0 * properties.multi_processor_count * kilohertz * 1000
    return Rates(
        copy=2000 * source.nbytes / min(times["copy"]),
        products=2000 * side**3 / min(times["products"]),
        exponentials=exponentials,
    )
