"""Time of the frozen SwinV2's forward: ours against timm and transformers, on the same weights, in the same process.

    python benchmarks/backbone.py [--name swinv2_tiny] [--sides 256 512 1024] [--window 8] [--batch 1] [--no-compile] [--repeats 7]
    python benchmarks/backbone.py --name swinv2_giant --sides 1024 --window 16 --batch 4 --repeats 50     (one GPU of 80 GB)

The contestants run in turn, round after round in random order, so that whatever else the machine does hits all of them; medians are
compared. Each gives the four feature maps, in float32 on a CPU and bfloat16 on a GPU. "products" is the floor: the matrix products
(linear layers and attention) of our forward alone, replayed on tensors of the same shapes. The error of each (relative L2, the worst of
the four maps) and its least cosine are against our network in float64 on a CPU, in float32 on a GPU. `first_s` is what the first
forward took, compiling included (less where torch's cache already has the program). Compiling takes minutes a size on a CPU.

- permafrost: PyTorch's own operators, as `auto` takes them where nothing is verified. On a GPU also with the Triton and the CUDA C++
  kernels for attention, with residual_norm and the GELU epilogue; these captured as a CUDA graph; compiled; and quantised to 8 bits.
- timm: the same weights in timm's classes, eager and compiled. timm knows no extra norms, so ours has none either here, the giant
  included.
- transformers: eager, for the sizes it was given (tiny, small, base).

The tests of what runs come first: where they fail, nothing is said about speed-ups, and the exit code is 1. Rows are appended to
benchmarks/results/backbone.csv; "of_matrix_rate" is the forward's FLOP a second over those of a large product, measured here.
"""

from __future__ import annotations

import argparse
import copy
import gc
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import transformers
from records import append
from safetensors.torch import save_file
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
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from permafrost.model import BackboneConfig, load_backbone
from permafrost.model.compiled import CompiledNetwork
from permafrost.model.cuda_graph import CapturedNetwork
from permafrost.model.fp8 import CAPABILITY, quantise_linears
from permafrost.model.spec import SWINV2_SIZES
from permafrost.model.swin.v2 import SwinV2
from permafrost.model.weights.read import read_weights

IN_TRANSFORMERS = ("swinv2_tiny", "swinv2_small", "swinv2_base")
CPU_TESTS = ("tests/model/swin/test_v2.py",)
GPU_TESTS = ("-m", "gpu", "tests/model/kernels/test_on_a_gpu.py")
Forward = Callable[[Tensor], tuple[Tensor, ...]]
aten = torch.ops.aten
_PRODUCTS = (
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.convolution,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_fused_attention_overrideable,
    aten._scaled_dot_product_cudnn_attention,
)


class Products(TorchDispatchMode):
    """Notes every matrix product that runs inside, to be run again on tensors like those it had."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        # Products of one shape share their tensors, or those of a giant would not fit.
        self._made: dict[tuple[object, ...], Tensor] = {}

    def _like(self, tensor: Tensor, position: int) -> Tensor:
        key = (position, tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._made:
            self._made[key] = torch.randn_like(tensor)
        return self._made[key]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in _PRODUCTS:
            kept = [self._like(one, place) if isinstance(one, Tensor) else one for place, one in enumerate(args)]
            self.calls.append(lambda: func(*kept, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def __call__(self) -> None:
        """Runs them all."""
        for call in self.calls:
            call()


def transformers_model(name: str, side: int, window: int) -> nn.Module:
    """A random Swinv2Backbone of a size, its norms (zero at first) drawn around one so that every block counts."""
    size = SWINV2_SIZES[name]
    config = transformers.Swinv2Config(
        image_size=side,
        embed_dim=size.embed_dim,
        depths=list(size.depths),
        num_heads=list(size.num_heads),
        window_size=window,
        pretrained_window_sizes=[window] * 4,
        out_features=[f"stage{stage}" for stage in range(1, 5)],
    )
    torch.manual_seed(0)
    model = transformers.Swinv2Backbone(config).eval()
    for key, parameter in model.named_parameters():
        if "layernorm" in key or ".norm." in key:
            nn.init.normal_(parameter, 1.0 if key.endswith("weight") else 0.0, 0.2)
    return model


def timm_model(name: str, side: int, window: int, official: dict[str, Tensor], device: torch.device) -> nn.Module:
    """timm's model of a size with the given weights (its step between stages opens the next one), in their dtype."""
    size = SWINV2_SIZES[name]
    with device:
        model = SwinTransformerV2(
            img_size=side,
            num_classes=0,
            embed_dim=size.embed_dim,
            depths=size.depths,
            num_heads=size.num_heads,
            window_size=window,
            pretrained_window_sizes=(window,) * 4,
        ).eval()
    model.to(next(iter(official.values())).dtype)
    moved = {
        re.sub(r"layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", key): value
        for key, value in official.items()
    }
    missing, unexpected = model.load_state_dict(moved, strict=False)
    assert not unexpected, unexpected
    # What is left are buffers and the classifier's norm, which no map has passed.
    assert all(key.startswith("norm.") or "relative" in key or "attn_mask" in key for key in missing), missing
    return model


def twin(network: SwinV2, **kernels: str) -> SwinV2:
    """A network of its own on the same weights, with other kernels."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    other = copy.deepcopy(network, shared)
    other.choose_kernels(BackboneConfig("swinv2_nano", "random", **kernels), dtype=next(network.parameters()).dtype)
    return other


def contestants(
    name: str, side: int, window: int, device: torch.device, compiled: bool, image: Tensor
) -> tuple[dict[str, Forward], tuple[Tensor, ...]]:
    """Return what runs against each other, and the maps they are compared with.

    Args:
        name: Of the size.
        side: Of the square images.
        window: Side of a window.
        device: Where.
        compiled: Whether compiled ones take part.
        image: (B, 3, side, side), normalised, float32.
    """
    is_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if is_gpu else torch.float32
    own = {"window_size": window, "pretrained_window_size": window, "extra_norm_interval": 0}
    with tempfile.TemporaryDirectory() as folder:
        weights: str | Path = "random"
        theirs = transformers_model(name, side, window) if name in IN_TRANSFORMERS else None
        if theirs is not None:
            weights = Path(folder) / "model.safetensors"
            save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, weights)
            read_weights(weights)
        precise = load_backbone(
            name, weights=weights, dtype=torch.float32 if is_gpu else torch.float64, device=device, **own
        ).network
        expected = tuple(one.cpu() for one in precise(image.to(device, next(precise.parameters()).dtype)))
        del precise
        gc.collect()
        ours = load_backbone(name, weights=weights, dtype=dtype, device=device, **own).network
    eager = timm_model(name, side, window, ours.state_dict(), device).to(device, dtype)

    def in_timm(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(eager.forward_intermediates(x, intermediates_only=True))

    entries: dict[str, Forward] = {"permafrost": ours, "timm": in_timm}
    if theirs is not None:
        theirs = theirs.to(device, dtype)
        entries["transformers"] = lambda x: theirs(x).feature_maps
    others = {"residual_norm": "triton", "gelu": "epilogue"}
    if is_gpu:
        for kernel in ("triton", "cuda"):
            entries[f"permafrost {kernel}"] = twin(ours, attention=kernel, **others)
            entries[f"permafrost {kernel} graph"] = CapturedNetwork(twin(ours, attention=kernel, **others))
    if compiled:
        entries["permafrost compiled"] = CompiledNetwork(twin(ours))
        entries["timm compiled"] = torch.compile(in_timm, dynamic=False)
        if is_gpu:
            entries["permafrost cuda compiled"] = CompiledNetwork(twin(ours, attention="cuda"))
            entries["timm max-autotune"] = torch.compile(in_timm, dynamic=False, mode="max-autotune-no-cudagraphs")
            if torch.cuda.get_device_capability(device) >= CAPABILITY:
                quantised = twin(ours, attention="cuda")
                quantise_linears(quantised)
                entries["permafrost cuda fp8 compiled"] = CompiledNetwork(quantised)
    return entries, expected


def differences(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[float, float]:
    """The largest relative L2 error over the maps, and their least cosine."""
    pairs = [(one.double().cpu().flatten(), other.double().flatten()) for one, other in zip(found, expected)]
    errors = [float((one - other).norm() / other.norm()) for one, other in pairs]
    return max(errors), min(float(nn.functional.cosine_similarity(one, other, dim=0)) for one, other in pairs)


@torch.no_grad()
def measure(
    name: str, side: int, *, window: int, batch: int, device: torch.device, compiled: bool, repeats: int, is_right: bool
) -> list[dict[str, object]]:
    """One row per contestant; without speed-ups unless the tests have passed."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    image = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    entries, expected = contestants(name, side, window, device, compiled, image)
    image = image.to(device, dtype)
    found, first = {}, {}
    for key, forward in entries.items():
        start = time.perf_counter()
        maps = forward(image)
        found[key] = differences(maps, expected)
        first[key] = round(time.perf_counter() - start, 1)
    products, counter = Products(), FlopCounterMode(display=False)
    with counter:
        entries["permafrost"](image)
    with products:
        entries["permafrost"](image)
    rate = measure_rates(device, dtype).products
    runs: dict[str, Callable[[], object]] = {
        key: (lambda forward=forward: forward(image)) for key, forward in entries.items()
    }
    runs["products"] = products
    times = {key: percentiles(values) for key, values in take_turns(runs, device, repeats=repeats, cold=False).items()}
    floor = times["products"]["p50_ms"]
    size = {"name": name, "side": side, "window": window, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
    versions = {"timm": timm.__version__, "transformers": transformers.__version__}
    rows = []
    for key, values in times.items():
        median = values["p50_ms"]
        error, cosine = found.get(key, (None, None))
        rows.append(
            describe_machine(device)
            | versions
            | size
            | {"contestant": key}
            | values
            | {
                "floor_ms": floor,
                "times_floor": round(median / floor, 2),
                "times_as_fast_as_timm": round(times["timm"]["p50_ms"] / median, 3) if is_right else "",
                "of_matrix_rate": round(counter.get_total_flops() / (median / 1000) / rate, 3),
                "error": "" if error is None else f"{error:.2e}",
                "cosine": "" if cosine is None else f"{cosine:.6f}",
                "repeats": repeats,
                "first_s": first.get(key, ""),
            }
        )
    return rows


def not_measured(row: dict[str, object]) -> list[dict[str, object]]:
    """Rows of the giant on a GPU, for a run without one: what was not measured is said, not estimated.

    Args:
        row: Of this run, for the columns and the versions.
    """
    blank = {key: NOT_MEASURED if key.endswith("_ms") or key == "error" else "" for key in row}
    giant = {"name": "swinv2_giant", "side": 1024, "window": 16, "batch": 4, "dtype": "bfloat16"}
    return [
        blank | giant | {"date": row["date"], "device": "a GPU", "contestant": name}
        for name in ("permafrost triton", "permafrost cuda compiled", "permafrost cuda fp8 compiled", "timm compiled")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="swinv2_tiny", choices=tuple(SWINV2_SIZES))
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--window", type=int, default=8, help="a divisor of every map's side, or of none larger")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="the compiled ones too")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    device = pick_device()
    is_right = passes(*(GPU_TESTS if device.type == "cuda" else CPU_TESTS))
    if not is_right:
        print("the tests of what runs here fail: no speed-ups are given", flush=True)
    for side in arguments.sides:
        rows = measure(
            arguments.name,
            side,
            window=arguments.window,
            batch=arguments.batch,
            device=device,
            compiled=arguments.compile,
            repeats=arguments.repeats,
            is_right=is_right,
        )
        for row in rows:
            shown = ("side", "contestant", "p50_ms", "times_floor", "times_as_fast_as_timm", "of_matrix_rate", "error")
            print("  ".join(str(row[key]) for key in shown), flush=True)
        append(RESULTS / "backbone.csv", list(rows[0]), rows)
    if device.type != "cuda":
        append(RESULTS / "backbone.csv", list(rows[0]), not_measured(rows[0]))
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
