"""Time of window attention, from the packed projection of a map to the attended map, each beside its floor and its error.

    python benchmarks/window_attention.py [--windows 8 12 16 24] [--repeats 50] [--no-flex]

On a GPU the map is that of stage 3 of SwinV2-G at 1024 x 1024 (64 x 64, 64 heads of 32, bfloat16), shifted; on a CPU a small one in
float32. Contestants:

- eager: what the released code does: pad, roll, partition, normalise, product, bias, mask, softmax, product, join; every step a pass.
  Bias and mask are materialised outside the timer.
- reference: model/kernels/window_attention/reference.py, float32 inside.
- sdpa, flex: the same around scaled_dot_product_attention with bias and mask of every window materialised outside the timer, and
  around a compiled FlexAttention that computes them as it goes; both also without what is around them ("windows" in the column
  `input`).
- triton, cuda: the kernels.

`floor_ms` is what reading the projection, writing the output, both products and the exponentials take at this machine's measured
rates, were all done at once. `error` is against the reference in float64 (relative L2). The op's test runs first: where it fails,
nothing is said about speed-ups, and the exit code is 1. Rows are appended to benchmarks/results/window_attention.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
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
from torch import Tensor

from permafrost.model.kernels.window_attention import window_attention
from permafrost.model.kernels.window_attention.pytorch import join, materialise_bias, partition
from permafrost.model.kernels.window_attention.reference import (
    SHIFT_PENALTY,
    scale_to_length,
    window_attention_reference,
)

HEAD_DIM = 32
KERNELS = ("triton", "cuda")
CPU_TESTS = ("tests/model/kernels/test_window_attention.py",)
GPU_TESTS = ("-m", "gpu", "tests/model/kernels/test_on_a_gpu.py", "-k", "window_attention")


class Problem:
    """A map to attend on.

    Args:
        window: Side of a window; shifted by half.
        side: Of the square map.
        heads: A.
        batch: B.
        dtype: Of the map.
        device: Where.
    """

    def __init__(
        self, *, window: int, side: int, heads: int, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        channels = heads * HEAD_DIM
        self.window, self.shift, self.side, self.heads, self.batch = window, window // 2, side, heads, batch
        self.dtype, self.device = dtype, device
        qkv = torch.randn(batch, side, side, 3 * channels, generator=generator)
        bias = torch.randn(3 * channels, generator=generator)
        bias[channels : 2 * channels] = 0.0
        self.qkv, self.qkv_bias = qkv.to(device, dtype), bias.to(device, dtype)
        self.scale = (1.0 + 29.0 * torch.rand(heads, generator=generator)).to(device)
        self.table = (16.0 * torch.rand(heads, (2 * window - 1) ** 2, generator=generator)).to(device)
        self.keywords = {"window": window, "shift": self.shift, "cosine": True}

    def expected(self) -> Tensor:
        """In float64."""
        tensors = (one.double() for one in (self.qkv, self.qkv_bias, self.scale, self.table))
        return window_attention_reference(*tensors, **self.keywords)

    @property
    def cost(self) -> dict[str, float]:
        """Return what cannot be avoided: bytes read and written, FLOP of both products, exponentials."""
        tokens = self.batch * self.side**2
        padded = self.batch * (-(-self.side // self.window) * self.window) ** 2
        length = self.window**2
        return {
            "num_bytes": 4 * tokens * self.heads * HEAD_DIM * self.dtype.itemsize + self.table.nbytes,
            "flops": 4 * padded * length * self.heads * HEAD_DIM,
            "exponentials": padded * length * self.heads,
        }

    def contestants(self, flex: bool) -> dict[tuple[str, str], Callable[[], Tensor]]:
        """Return what runs against each other, by name and by what it starts from."""
        tensors = (self.qkv, self.qkv_bias, self.scale, self.table)
        own = {"window": self.window, "shift": self.shift}
        bias, penalty = materialise_bias(self.table, height=self.side, width=self.side, dtype=self.dtype, **own)
        # One for every window, as scaled_dot_product_attention takes it.
        whole = (bias + penalty).repeat(self.batch, 1, 1, 1)

        def windows() -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = partition(self.qkv, self.qkv_bias, self.heads, **own)
            return scale_to_length(q, self.scale[:, None, None]), scale_to_length(k, 1.0), v

        def whole_map(x: Tensor) -> Tensor:
            return join(x, self.side, self.side, **own)

        def eager() -> Tensor:
            q, k, v = windows()
            logits = q @ k.mT + bias
            logits = logits.view(self.batch, -1, *logits.shape[1:]) + penalty
            return whole_map(logits.flatten(0, 1).softmax(dim=-1) @ v)

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=whole, scale=1.0)

        partitioned = windows()
        entries: dict[tuple[str, str], Callable[[], Tensor]] = {
            ("eager", "map"): eager,
            ("reference", "map"): lambda: window_attention(*tensors, **self.keywords, kernel="reference"),
            ("sdpa", "map"): lambda: whole_map(sdpa(*windows())),
            ("sdpa", "windows"): lambda: sdpa(*partitioned),
        }
        if flex:
            attend = self._flex()
            entries["flex", "map"] = lambda: whole_map(attend(*windows()))
            entries["flex", "windows"] = lambda: attend(*partitioned)
        if self.device.type == "cuda":
            for kernel in KERNELS:
                entries[kernel, "map"] = lambda kernel=kernel: window_attention(
                    *tensors, **self.keywords, kernel=kernel
                )
        return entries

    def _flex(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        from torch.nn.attention.flex_attention import flex_attention

        window, shift, table = self.window, self.shift, self.table
        across = -(-self.side // window)

        def score(logit, place, head, query, key):
            rows, columns = query // window - key // window, query % window - key % window
            entry = (rows + window - 1) * (2 * window - 1) + columns + window - 1
            is_last_row = place // across % across == across - 1
            is_last_column = place % across == across - 1
            below = is_last_row & ((query // window >= window - shift) != (key // window >= window - shift))
            beyond = is_last_column & ((query % window >= window - shift) != (key % window >= window - shift))
            return logit + table[head, entry] + torch.where(below | beyond, SHIFT_PENALTY, 0.0)

        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, score_mod=score, scale=1.0)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    return float((found.double() - expected).norm() / expected.norm())


@torch.no_grad()
def measure(problem: Problem, *, repeats: int, flex: bool, is_right: bool) -> list[dict[str, object]]:
    """Rows of all contestants.

    Args:
        problem: The map.
        repeats: Timed rounds.
        flex: Whether FlexAttention takes part.
        is_right: Whether the op's tests have passed; else no speed-up is given.
    """
    device = problem.device
    entries = problem.contestants(flex)
    expected = problem.expected()
    errors = {key: relative_error(call(), expected) for key, call in entries.items() if key[1] == "map"}
    floor = measure_rates(device, problem.dtype).floor_ms(**problem.cost)
    machine = describe_machine(device)
    rows = []
    for cache in ("cold", "warm") if device.type == "cuda" else ("warm",):
        times = take_turns(
            {"/".join(key): call for key, call in entries.items()}, device, repeats=repeats, cold=cache == "cold"
        )
        medians = {name: percentiles(found)["p50_ms"] for name, found in times.items()}
        for (name, source), found in zip(entries, times.values(), strict=True):
            median = medians[f"{name}/{source}"]
            rows.append(
                machine
                | _columns(problem)
                | {"contestant": name, "input": source, "cache": cache}
                | percentiles(found)
                | {
                    "floor_ms": round(floor, 4),
                    "times_floor": round(median / floor, 2) if source == "map" else "",
                    "times_as_fast_as_eager": round(medians["eager/map"] / median, 2)
                    if is_right and source == "map"
                    else "",
                    "error": f"{errors[name, source]:.2e}" if source == "map" else "",
                }
            )
    if device.type != "cuda":
        gpu = Problem(window=problem.window, dtype=torch.bfloat16, device=torch.device("meta"), **GPU_SIZE)
        for kernel in KERNELS:
            blank = {key: NOT_MEASURED if key.endswith("_ms") or key == "error" else "" for key in rows[0]}
            where = {"date": machine["date"], "device": "a GPU", "contestant": kernel, "input": "map"}
            rows.append(blank | _columns(gpu) | where)
    return rows


GPU_SIZE = {"side": 64, "heads": 64, "batch": 1}
CPU_SIZE = {"side": 32, "heads": 4, "batch": 1}


def _columns(problem: Problem) -> dict[str, object]:
    names = ("window", "shift", "side", "heads", "batch")
    dtype = str(problem.dtype).removeprefix("torch.")
    return {name: getattr(problem, name) for name in names} | {"dtype": dtype}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 12, 16, 24])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=True, help="FlexAttention too")
    arguments = parser.parse_args()
    device = pick_device()
    is_gpu = device.type == "cuda"
    is_right = passes(*(GPU_TESTS if is_gpu else CPU_TESTS))
    if not is_right:
        print("the op's test fails: no speed-ups are given", flush=True)
    dtype = torch.bfloat16 if is_gpu else torch.float32
    for window in arguments.windows:
        problem = Problem(window=window, dtype=dtype, device=device, **(GPU_SIZE if is_gpu else CPU_SIZE))
        rows = measure(problem, repeats=arguments.repeats, flex=arguments.flex, is_right=is_right)
        shown = ("window", "contestant", "input", "cache", "p50_ms", "times_floor", "times_as_fast_as_eager", "error")
        for row in rows:
            print("  ".join(str(row[key]) for key in shown), flush=True)
        append(RESULTS / "window_attention.csv", list(rows[0]), rows)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
