"""Everything that waits for a GPU, in a few calls: the tests, the benchmarks of the kernels, and of whole forwards.

    python benchmarks/gpu_all.py tests          every test marked gpu but those of speed and of training: some minutes
    python benchmarks/gpu_all.py ops            window attention, residual norm, deformable attention; rows go to benchmarks/results/
    python benchmarks/gpu_all.py backbone       forwards of the tiny SwinV2 at 256, 512 and 1024 pixels, all contestants
    python benchmarks/gpu_all.py giant          the 3 B SwinV2 at 1024 x 1024, window 16, batch 4, bfloat16: needs 80 GB
    python benchmarks/gpu_all.py training       the path of a training through the launcher, and the quickstart's AP in 8 bits

One part a call, or several; each step has `--limit` seconds (default 540) and its output is shown as it comes. The exit code is 1 if a
step failed. At the end stands which of the aims are met by the rows of today, and, of kernels that meet them, the row to add to
model/kernels/verified.py: a row is added by a person, in one commit with the CSV.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import sys
from collections.abc import Iterator

import torch
from timing import RESULTS, ROOT, device_name, pick_device

PYTEST = ("-m", "pytest", "-q", "-m", "gpu")
STEPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "tests": ((*PYTEST, "tests/model", "tests/heads"),),
    "ops": (
        ("benchmarks/window_attention.py",),
        ("benchmarks/residual_norm.py",),
        ("benchmarks/deformable_attention.py",),
    ),
    "backbone": tuple(
        ("benchmarks/backbone.py", "--name", "swinv2_tiny", "--sides", side, "--repeats", "50")
        for side in ("256", "512", "1024")
    ),
    "giant": (
        (
            *("benchmarks/backbone.py", "--name", "swinv2_giant", "--sides", "1024"),
            *("--window", "16", "--batch", "4", "--repeats", "20"),
        ),
    ),
    "training": ((*PYTEST, "tests/launcher"), (*PYTEST, "tests/distributed")),
}
WITHIN_FLOOR, OVER_EAGER = 2.0, 3.0
"""The attention op at stage 3 of the giant: times the floor at most, times as fast as eager at least."""
OVER_TIMM, OVER_COMPILED, OF_MATRIX_RATE, OVER_BFLOAT16, COSINE = 1.5, 1.2, 0.6, 1.3, 0.985
"""The giant's forward: against timm eager and compiled, of the matrix rate; in 8 bits against bfloat16, and its maps' cosine."""


def rows_of(name: str, device: str) -> list[dict[str, str]]:
    """Today's rows of a benchmark on a device."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    today = datetime.date.today().isoformat()
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row["date"] == today and row["device"] == device]


def check_attention(rows: list[dict[str, str]]) -> Iterator[tuple[str, bool]]:
    """The aims of the op, and for each whether it is met: by the best kernel, from the map, with a cold cache."""
    for window in ("8", "12", "16"):
        own = [row for row in rows if row["window"] == window and (row["input"], row["cache"]) == ("map", "cold")]
        kernels = [row for row in own if row["contestant"] in ("triton", "cuda") and row["times_as_fast_as_eager"]]
        if not kernels:
            continue
        best = min(kernels, key=lambda row: float(row["p50_ms"]))
        floor, eager = float(best["times_floor"]), float(best["times_as_fast_as_eager"])
        yield (
            f"window {window}, {best['contestant']}: {floor:.2f} times the floor (at most {WITHIN_FLOOR}), {eager:.2f} times "
            f"as fast as eager (at least {OVER_EAGER})",
            floor <= WITHIN_FLOOR and eager >= OVER_EAGER,
        )


def check_giant(rows: list[dict[str, str]]) -> Iterator[tuple[str, bool]]:
    """The aims of the giant's forward, and for each whether it is met."""
    found = {row["contestant"]: row for row in rows if row["name"] == "swinv2_giant" and row["times_as_fast_as_timm"]}
    ours = {name: row for name, row in found.items() if name.startswith("permafrost") and "fp8" not in name}
    if not ours or "timm compiled" not in found:
        return
    name, best = min(ours.items(), key=lambda item: float(item[1]["p50_ms"]))
    eager = float(best["times_as_fast_as_timm"])
    compiled = float(found["timm compiled"]["p50_ms"]) / float(best["p50_ms"])
    rate = float(best["of_matrix_rate"])
    yield f"giant, {name}: {eager:.2f} times as fast as timm (at least {OVER_TIMM})", eager >= OVER_TIMM
    yield f"giant, {name}: {compiled:.2f} times timm compiled (at least {OVER_COMPILED})", compiled >= OVER_COMPILED
    yield f"giant, {name}: {rate:.0%} of the matrix rate (at least {OF_MATRIX_RATE:.0%})", rate >= OF_MATRIX_RATE
    quantised = found.get("permafrost cuda fp8 compiled")
    if quantised is not None:
        gain, cosine = float(best["p50_ms"]) / float(quantised["p50_ms"]), float(quantised["cosine"])
        yield (
            f"giant, fp8: {gain:.2f} times as fast as {name} (at least {OVER_BFLOAT16}), least cosine {cosine:.4f} (at least "
            f"{COSINE})",
            gain >= OVER_BFLOAT16 and cosine >= COSINE,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=tuple(STEPS))
    parser.add_argument("--limit", type=float, default=540.0, help="seconds a step may take")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch sees no GPU here: nothing is run, and nothing is recorded", file=sys.stderr)
        return 2
    failed = []
    for part in arguments.parts:
        for step in STEPS[part]:
            print(f"\n== {' '.join(step)}", flush=True)
            try:
                code = subprocess.run([sys.executable, *step], cwd=ROOT, timeout=arguments.limit).returncode
            except subprocess.TimeoutExpired:
                code = f"stopped after {arguments.limit:g} s"
            if code:
                failed.append(f"{' '.join(step)}: {code}")
    device = device_name(pick_device())
    aims = [
        *check_attention(rows_of("window_attention", device)),
        *check_giant(rows_of("backbone", device)),
    ]
    print(f"\n== aims, by today's rows of {device}", flush=True)
    for text, is_met in aims or [("no rows yet", False)]:
        print(f"{'met' if is_met else 'not met'}: {text}", flush=True)
    if any(is_met for _, is_met in aims) and not failed:
        major, minor = torch.cuda.get_device_capability()
        today, version = datetime.date.today().isoformat(), torch.__version__
        print(
            "for model/kernels/verified.py, of each kernel that is right and fast: Verified(op, kernel, "
            f"{10 * major + minor}, 'bfloat16', {device!r}, {today!r}, {version!r})",
            flush=True,
        )
    for one in failed:
        print(f"failed: {one}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
