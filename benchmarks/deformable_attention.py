"""Time and memory of multi-scale deformable attention, forward and forward with backward.

    python benchmarks/deformable_attention.py [--sides 320 640] [--repeats 5]

The call is that of a Mask2Former pixel decoder on a square image: maps of strides 32, 16 and 8, 8 heads of 32 dims, 4 points, every
cell a query. On a CPU our plain PyTorch runs beside that of transformers; on a GPU the Triton kernel runs too. Before anything is timed
all contestants' outputs and gradients are compared with float64, and a contestant that is wrong stops the program. `saved_mib` is what
the forward keeps for the backward, each storage once; `peak_mib` is the allocator's on a GPU. Milliseconds on a CPU are processor time,
which other work changes least (all threads together: use one). Rows go to benchmarks/results/deformable_attention.csv.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from records import append, processor
from torch import Tensor
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

from permafrost.model.kernels.deformable_attention import deformable_attention

RESULTS = Path(__file__).parent / "results" / "deformable_attention.csv"
HEADS, HEAD_DIM, POINTS, STRIDES = 8, 32, 4, (32, 16, 8)
TOLERANCE = 1e-4
"""Relative error in float32 above which a contestant is wrong."""


def make_inputs(side: int, batch: int) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """Sizes of the maps, and value, locations and weights: points scatter by a few cells around each query's own."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(side // stride, side // stride) for stride in STRIDES]
    queries = sum(height * width for height, width in sizes)
    shape = (batch, queries, HEADS, len(sizes), POINTS)
    centres = torch.cat(
        [
            torch.cartesian_prod((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width).flip(1)
            for height, width in sizes
        ]
    )
    offsets = torch.randn(*shape, 2, generator=generator) * 2
    cells = torch.tensor([[width, height] for height, width in sizes])[:, None]
    # In cells, and never within a hundredth of a cell's centre: the gradient jumps there, and rounding decides the side.
    at = centres[None, :, None, None, None] * cells + offsets - 0.5
    at = at.floor() + at.frac().where(at >= 0, 1 + at.frac()).clamp(0.01, 0.99)
    locations = (at + 0.5) / cells
    weights = torch.randn(shape, generator=generator).flatten(3).softmax(-1).view(shape)
    return sizes, [torch.randn(batch, queries, HEADS, HEAD_DIM, generator=generator), locations, weights]


def contestants(sizes: list[tuple[int, int]], device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Return what runs against each other."""
    entries = {
        "reference": lambda v, x, w: deformable_attention(v, sizes, x, w, kernel="reference"),
        "transformers": lambda v, x, w: multi_scale_deformable_attention(v, sizes, x, w),
    }
    if device.type == "cuda":
        entries["triton"] = lambda v, x, w: deformable_attention(v, sizes, x, w, kernel="triton")
    return entries


def both_ways(call: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    leaves = [one.detach().requires_grad_() for one in tensors]
    out = call(*leaves)
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, above.to(out))]


def saved_bytes(call: Callable[..., Tensor], tensors: list[Tensor]) -> int:
    """Return the bytes that a forward keeps beyond its inputs."""
    leaves = [one.detach().requires_grad_() for one in tensors]
    known = {one.untyped_storage().data_ptr() for one in leaves}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call(*leaves)
    del out
    return sum(kept.values())


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of `repeats` calls after one that is not counted."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found = []
    for _ in range(repeats + 1):
        start = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append((clock() - start) * 1000)
    return statistics.median(found[1:])


def measure(side: int, batch: int, device: torch.device, repeats: int) -> list[dict[str, object]]:
    """One row per contestant."""
    sizes, tensors = make_inputs(side, batch)
    tensors = [one.to(device) for one in tensors]
    entries = contestants(sizes, device)
    exact = both_ways(entries["reference"], [one.double() for one in tensors])
    rows = []
    for name, call in entries.items():
        found = both_ways(call, tensors)
        error = max(float((one.double() - other).norm() / other.norm()) for one, other in zip(found, exact))
        if error > TOLERANCE:
            raise SystemExit(f"{name} is wrong by {error:.1e} at {side}: nothing was timed")
        del found
        with torch.no_grad():
            forward = milliseconds(lambda call=call: call(*tensors), device, repeats)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        both = milliseconds(lambda call=call: both_ways(call, tensors), device, repeats)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device.type == "cuda" else None
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "side": side,
                "batch": batch,
                "contestant": name,
                "forward_ms": round(forward, 2),
                "forward_backward_ms": round(both, 2),
                "saved_mib": round(saved_bytes(call, tensors) / 2**20, 1),
                "peak_mib": "" if peak is None else round(peak, 1),
                "error": f"{error:.1e}",
            }
        )
    return rows


def main() -> None:
    """Measure and append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[320, 640])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for side in options.sides:
        rows = measure(side, options.batch, device, options.repeats)
        for row in rows:
            print({key: row[key] for key in ("side", "contestant", "forward_ms", "forward_backward_ms", "saved_mib")})
        append(RESULTS, list(rows[0]), rows)


if __name__ == "__main__":
    main()
