"""Time of a residual connection around a normalised branch: x + norm(y), with and without an extra norm on the sum.

    python benchmarks/residual_norm.py [--repeats 50] [--no-compile]

On a GPU the map is that of stage 3 of SwinV2-G at 1024 x 1024 (4096 tokens of 2048 channels, bfloat16), on a CPU a small one in float32.
Contestants: PyTorch's norm and sum ("torch"), the same compiled, the reference, and the Triton kernel. The floor is reading both maps
and writing one at this machine's measured copy rate; `error` is against float64 (relative L2). The op's test runs first: where it
fails, nothing is said about speed-ups, and the exit code is 1. Rows are appended to benchmarks/results/residual_norm.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from records import append
from timing import (
    NOT_MEASURED,
    RESULTS,
    describe_machine,
    measure_rates,
    passes,
    percentiles,
    pick_device,
    take_turns,
)
from torch import Tensor, nn

from permafrost.model.kernels.residual_norm import residual_norm

GPU_SIZE, CPU_SIZE = (4096, 2048), (32768, 384)
CPU_TESTS = ("tests/model/kernels/test_residual_norm.py", "-k", "reference_is or float32")
GPU_TESTS = ("-m", "gpu", "tests/model/kernels/test_on_a_gpu.py", "-k", "residual_norm")


@torch.no_grad()
def measure(
    device: torch.device, *, has_extra: bool, repeats: int, compiled: bool, is_right: bool
) -> list[dict[str, object]]:
    """Rows of all contestants; without speed-ups unless the tests have passed."""
    is_gpu = device.type == "cuda"
    tokens, channels = GPU_SIZE if is_gpu else CPU_SIZE
    dtype = torch.bfloat16 if is_gpu else torch.float32
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(tokens, channels, generator=generator).to(device, dtype) for _ in range(2))
    norm, extra = (nn.LayerNorm(channels, device=device, dtype=dtype) for _ in range(2))
    for parameter in (*norm.parameters(), *extra.parameters()):
        nn.init.normal_(parameter, 0.5, 0.5)
    chosen = extra if has_extra else None

    def plain(x: Tensor, y: Tensor) -> Tensor:
        total = x + norm(y)
        return extra(total) if has_extra else total

    entries: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: plain(x, y),
        "reference": lambda: residual_norm(x, y, norm, chosen, kernel="reference"),
    }
    if compiled:
        program = torch.compile(plain, dynamic=False)
        entries["torch compiled"] = lambda: program(x, y)
    if is_gpu:
        entries["triton"] = lambda: residual_norm(x, y, norm, chosen, kernel="triton")
    precise = [nn.LayerNorm(channels, device=device, dtype=torch.float64) for _ in range(2)]
    for copy, original in zip(precise, (norm, extra)):
        copy.load_state_dict(original.state_dict())
    expected = residual_norm(x.double(), y.double(), precise[0], precise[1] if has_extra else None, kernel="reference")
    errors = {name: float((call().double() - expected).norm() / expected.norm()) for name, call in entries.items()}
    floor = measure_rates(device, dtype).floor_ms(num_bytes=3 * x.nbytes)
    machine = describe_machine(device)
    size = {"tokens": tokens, "channels": channels, "dtype": str(dtype).removeprefix("torch."), "extra": has_extra}
    rows = []
    for cache in ("cold", "warm") if is_gpu else ("warm",):
        times = take_turns(entries, device, repeats=repeats, cold=cache == "cold")
        medians = {name: percentiles(found)["p50_ms"] for name, found in times.items()}
        for name, found in times.items():
            rows.append(
                machine
                | size
                | {"contestant": name, "cache": cache}
                | percentiles(found)
                | {
                    "floor_ms": round(floor, 4),
                    "times_floor": round(medians[name] / floor, 2),
                    "times_as_fast_as_torch": round(medians["torch"] / medians[name], 2) if is_right else "",
                    "error": f"{errors[name]:.2e}",
                }
            )
    if not is_gpu:
        blank = {key: NOT_MEASURED if key.endswith("_ms") or key == "error" else "" for key in rows[0]}
        gpu = {"tokens": GPU_SIZE[0], "channels": GPU_SIZE[1], "dtype": "bfloat16", "extra": has_extra}
        rows.append(blank | {"date": machine["date"], "device": "a GPU", "contestant": "triton"} | gpu)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="the compiled one too")
    arguments = parser.parse_args()
    device = pick_device()
    is_right = passes(*(GPU_TESTS if device.type == "cuda" else CPU_TESTS))
    if not is_right:
        print("the op's test fails: no speed-ups are given", flush=True)
    for has_extra in (False, True):
        rows = measure(
            device, has_extra=has_extra, repeats=arguments.repeats, compiled=arguments.compile, is_right=is_right
        )
        for row in rows:
            shown = ("extra", "contestant", "cache", "p50_ms", "times_floor", "times_as_fast_as_torch", "error")
            print("  ".join(str(row[key]) for key in shown), flush=True)
        append(RESULTS / "residual_norm.csv", list(rows[0]), rows)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
