"""List the kernels found right and fast, and on which GPUs: `auto` chooses from them.

A row is added by whoever has run `pytest -m gpu` and the op's benchmark on that card, with the CSV of the benchmark in the
same commit; benchmarks/gpu_all.py does both. No row is inferred from another architecture or dtype.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verified:
    """A kernel that has passed its tests and beaten PyTorch's own operators on a GPU.

    Attributes:
        op: folder of the op beside this file.
        kernel: "triton", "cuda", or what else the recipe calls it.
        architecture: compute capability times 10, as in 90.
        dtype: "float32", "float16" or "bfloat16".
        card: as the driver calls it.
        date: of the run, as in 2026-11-26.
        torch: its version.
    """

    op: str
    kernel: str
    architecture: int
    dtype: str
    card: str
    date: str
    torch: str


VERIFIED: tuple[Verified, ...] = ()
"""The best first, where an op has several for a GPU."""
