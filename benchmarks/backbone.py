"""Time of the frozen SwinV2's forward: ours against timm and transformers, on the same weights, in the same process.

    python benchmarks/backbone.py [--name swinv2_tiny] [--sides 256 512 1024] [--no-compile] [--repeats 7]

The contestants run in turn, round after round, so that whatever else the machine does hits all of them; medians are compared. Each
gives the four feature maps of one image, in float32 on a CPU and bfloat16 on a GPU. "products" is the floor: the matrix
products (linear layers and attention) of our forward alone, replayed on tensors of the same shapes. The error of each is against our
network in float64 (relative L2, the worst of the four maps). Ours and timm's also run compiled: ours as
`backbone.compile` does it, timm's by torch.compile, both for one size at a time; "first_s" is what the first forward
took, compiling included (less where torch's cache already has the program). Compiling takes minutes a size on a CPU.
transformers has no compiled contestant here. Rows are appended to benchmarks/results/backbone.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from permafrost.model import load_backbone
from permafrost.model.compiled import CompiledNetwork
from permafrost.model.spec import SWINV2_SIZES
from permafrost.model.weights import read_weights

RESULTS = Path(__file__).parent / "results" / "backbone.csv"
WINDOW = 8
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

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in _PRODUCTS:
            kept = [torch.randn_like(one) if isinstance(one, Tensor) else one for one in args]
            self.calls.append(lambda: func(*kept, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def __call__(self) -> None:
        """Runs them all."""
        for call in self.calls:
            call()


def transformers_model(name: str, side: int) -> nn.Module:
    """A random Swinv2Backbone of a size, its norms (zero at first) drawn around one so that every block counts."""
    size = SWINV2_SIZES[name]
    config = transformers.Swinv2Config(
        image_size=side,
        embed_dim=size.embed_dim,
        depths=list(size.depths),
        num_heads=list(size.num_heads),
        window_size=WINDOW,
        pretrained_window_sizes=[WINDOW] * 4,
        out_features=[f"stage{stage}" for stage in range(1, 5)],
    )
    torch.manual_seed(0)
    model = transformers.Swinv2Backbone(config).eval()
    for key, parameter in model.named_parameters():
        if "layernorm" in key or ".norm." in key:
            nn.init.normal_(parameter, 1.0 if key.endswith("weight") else 0.0, 0.2)
    return model


def timm_model(name: str, side: int, official: dict[str, Tensor]) -> nn.Module:
    """timm's model of a size with the given weights (its step between stages opens the next one)."""
    model = timm.create_model(f"{name}_window8_256", pretrained=False, num_classes=0, img_size=side).eval()
    moved = {
        re.sub(r"layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", key): value
        for key, value in official.items()
    }
    missing, unexpected = model.load_state_dict(moved, strict=False)
    assert not unexpected, unexpected
    # What is left are buffers and the classifier's norm, which no map has passed.
    assert all(key.startswith("norm.") or "relative" in key or "attn_mask" in key for key in missing), missing
    return model


def contestants(
    name: str, side: int, device: torch.device, compiled: bool
) -> tuple[dict[str, Callable[[Tensor], tuple[Tensor, ...]]], Callable[[Tensor], tuple[Tensor, ...]], Tensor]:
    """What runs against each other, the float64 reference, and the image (1, 3, side, side), normalised float32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    theirs = transformers_model(name, side)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, path)
        windows = {"window_size": WINDOW, "pretrained_window_size": WINDOW}
        official = {key: tensor.clone() for key, tensor in read_weights(path).tensors.items()}
        ours = load_backbone(name, weights=path, dtype=dtype, device=device, **windows).network
        precise = load_backbone(name, weights=path, dtype=torch.float64, **windows).network
    eager = timm_model(name, side, official).to(device, dtype)
    theirs = theirs.to(device, dtype)
    entries = {
        "permafrost": ours,
        "timm": lambda x: tuple(eager.forward_intermediates(x, intermediates_only=True)),
        "transformers": lambda x: theirs(x).feature_maps,
    }
    if compiled:
        entries["permafrost compiled"] = CompiledNetwork(ours)
        entries["timm compiled"] = torch.compile(entries["timm"], dynamic=False)
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return entries, precise, image


def relative_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Worst of the maps."""
    return max(
        float((one.double().cpu() - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)
    )


@torch.no_grad()
def measure(name: str, side: int, device: torch.device, compiled: bool, repeats: int) -> list[dict[str, object]]:
    """One row per contestant."""
    entries, precise, image = contestants(name, side, device, compiled)
    expected = precise(image.double())
    image = image.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    errors, first = {}, {}
    for key, forward in entries.items():
        start = time.perf_counter()
        maps = forward(image)
        first[key] = round(time.perf_counter() - start, 1)
        errors[key] = relative_error(maps, expected)
    products = Products()
    with products:
        entries["permafrost"](image)
    runs: dict[str, Callable[[], object]] = {
        key: (lambda forward=forward: forward(image)) for key, forward in entries.items()
    }
    runs["products"] = products
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(repeats + 1):
        for key, call in runs.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    where = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
    return [
        {
            "date": datetime.date.today().isoformat(),
            "device": where,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "transformers": transformers.__version__,
            "name": name,
            "side": side,
            "contestant": key,
            "median_ms": round(median * 1000, 2),
            "fastest_ms": round(min(seconds[key][1:]) * 1000, 2),
            "times_timm": round(medians["timm"] / median, 3),
            "error": f"{errors[key]:.2e}" if key in errors else "",
            "repeats": repeats,
            "first_s": first.get(key, ""),
        }
        for key, median in medians.items()
    ]


def _processor() -> str:
    return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="swinv2_tiny", choices=("swinv2_tiny", "swinv2_small", "swinv2_base"))
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="the compiled ones too")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for side in arguments.sides:
        rows = measure(arguments.name, side, device, arguments.compile, arguments.repeats)
        for row in rows:
            print({key: row[key] for key in ("side", "contestant", "median_ms", "times_timm", "error")}, flush=True)
        is_new = not RESULTS.exists()
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if is_new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
