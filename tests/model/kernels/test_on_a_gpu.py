"""The kernels and options of the frozen forward on a GPU: right, whatever the stream, the graph or the compiler around them.

pytest -m gpu tests/model/kernels/test_on_a_gpu.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import Case, relative_error
from norm_cases import NormCase
from torch import Tensor, nn

from permafrost.model import FrozenBackbone, load_backbone
from permafrost.model.kernels import window_attention as op
from permafrost.model.kernels.residual_norm import residual_norm
from permafrost.model.kernels.window_attention import window_attention
from permafrost.model.spec import SWIN_V1_SIZES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KERNELS = ("triton", "cuda")
DTYPES = ("float32", "float16", "bfloat16")
CASES = {
    **{f"window {window}": {"window": window, "shift": window // 2} for window in (7, 8, 12, 16, 24)},
    "not shifted": {"window": 12, "shift": 0, "height": 24, "width": 36},
    "map smaller than a window": {"window": 8, "shift": 0, "height": 5, "width": 11},
    "odd number of heads": {"window": 16, "shift": 8, "num_heads": 3},
    "64 dims per head": {"window": 12, "shift": 6, "head_dim": 64},
    "logits of a large range": {"window": 16, "shift": 8, "max_scale": 100.0},
    "V1": {"window": 7, "shift": 3, "cosine": False},
    "V1, large": {"window": 27, "shift": 13, "cosine": False},
    "27": {"window": 27, "shift": 13},
    "40": {"window": 40, "shift": 20},
    "56": {"window": 56, "shift": 28, "height": 70, "width": 60},
    "tiny window": {"window": 2, "shift": 1},
}
OURS = {"residual_norm": "triton", "gelu": "epilogue"}


def poisoned(case: Case, kernel: str) -> Tensor:
    """Return what a kernel writes over NaN."""
    qkv, bias, scale, table = case.tensors("cuda")
    out = torch.full((*qkv.shape[:3], qkv.shape[3] // 3), float("nan"), dtype=qkv.dtype, device="cuda")
    op._launcher(kernel)(qkv, bias, scale.float(), table.float(), out, **case.keywords)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_window_attention_errs_at_most_twice_as_much_as_pytorch(kernel: str, fields, dtype: str) -> None:
    """Maps that fill no window and are not square, unless a case says otherwise."""
    window = fields["window"]
    case = Case(**({"height": 2 * window + 3, "width": 3 * window - 1, "batch": 2, "dtype": dtype} | fields))
    found = poisoned(case, kernel)
    assert torch.isfinite(found).all()
    assert relative_error(found, case.expected()) <= case.tolerance("cuda")


@pytest.mark.parametrize("kernel", KERNELS)
def test_window_attention_of_more_windows_than_a_grid_axis_has(kernel: str) -> None:
    case = Case(4, 2, 1042, 1060, dtype="bfloat16", num_heads=1)
    assert (1042 // 4) * (1060 // 4) > 65_535
    assert relative_error(poisoned(case, kernel), case.expected()) <= case.tolerance("cuda")


@pytest.mark.parametrize("kernel", KERNELS)
def test_window_attention_beyond_32_bits(kernel: str) -> None:
    """Two images further apart than 32 bits reach, in elements."""
    case = Case(8, 4, 19, 27, dtype="float16", batch=2)
    qkv, bias, scale, table = case.tensors("cuda")
    far = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 5 * far:
        pytest.skip("needs 11 GB of free GPU memory")
    spread = []
    for shape in (qkv.shape, (*qkv.shape[:3], qkv.shape[3] // 3)):
        memory = torch.empty(far + shape[1] * shape[2] * shape[3], dtype=qkv.dtype, device="cuda")
        spread.append(memory.as_strided(shape, (far, shape[2] * shape[3], shape[3], 1)))
    spread[0].copy_(qkv)
    spread[1].fill_(float("nan"))
    op._launcher(kernel)(spread[0], bias, scale.float(), table.float(), spread[1], **case.keywords)
    assert relative_error(spread[1], case.expected()) <= case.tolerance("cuda")


@pytest.mark.parametrize("kernel", KERNELS)
def test_window_attention_on_another_stream_in_a_graph_and_compiled(kernel: str) -> None:
    case = Case(12, 6, 31, 25, dtype="bfloat16", batch=2)
    tensors = case.tensors("cuda")

    def call() -> Tensor:
        return window_attention(*tensors, **case.keywords, kernel=kernel)

    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = call()
    stream.synchronize()
    assert torch.equal(aside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    tensors[0].neg_()
    graph.replay()
    assert torch.equal(captured, call())
    assert not torch.equal(captured, expected)
    compiled = torch.compile(lambda *given: window_attention(*given, **case.keywords, kernel=kernel), fullgraph=True)
    assert torch.equal(compiled(*tensors), captured)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_extra", [False, True])
@pytest.mark.parametrize("shape", [(2, 37, 29, 96), (3, 5, 512), (7, 11, 2048), (65, 4096), (1, 32)])
def test_residual_norm_errs_at_most_twice_as_much_as_pytorch(shape, has_extra: bool, dtype: str) -> None:
    case = NormCase(shape, dtype, has_extra=has_extra)
    found = residual_norm(*case.tensors("cuda"), kernel="triton")
    theirs = relative_error(case.in_pytorch("cuda"), case.expected())
    assert relative_error(found, case.expected()) <= 2 * theirs


def images(height: int = 200, width: int = 333, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def worst_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    return max(relative_error(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("name", "window"), [("swinv2_tiny", 12), ("swin_tiny", 7), ("swinv2_nano", (16, 8, 7, 5))])
def test_maps_err_at_most_twice_as_much_as_pytorch(name: str, window, kernel: str, dtype: str) -> None:
    """All kernels at once, against PyTorch's own operators in the same dtype."""
    own = {"weights": "random", "window_size": window}
    exact = load_backbone(name, dtype=torch.float64, **own)(images())
    own |= {"dtype": getattr(torch, dtype), "device": "cuda"}
    others = {} if name in SWIN_V1_SIZES else {"residual_norm": "triton"}
    if dtype != "float32":
        others["gelu"] = "epilogue"
    backbone = load_backbone(name, attention=kernel, **others, **own)
    told = backbone.describe()
    assert told["attention"].startswith(f"{kernel} (as asked for)")
    assert all(told[field].endswith("(as asked for)") for field in others)
    theirs = worst_error(load_backbone(name, attention="sdpa", **own)(images()), exact)
    assert worst_error(backbone(images()), exact) <= 2 * theirs


def twins(**fields) -> tuple[FrozenBackbone, FrozenBackbone]:
    """The same backbone twice."""
    backbone = load_backbone("swinv2_tiny", weights="random", window_size=8, device="cuda", **fields)
    return backbone, copy.deepcopy(backbone)


@pytest.mark.parametrize("fields", [{}, {"attention": "cuda", **OURS}, {"attention": "triton", **OURS}])
def test_a_captured_forward_gives_the_same_bits(fields) -> None:
    plain, captured = twins(**fields)
    captured.capture_forward()
    assert captured.describe()["cuda_graph"].startswith("captured")
    assert not captured.stages
    sizes = [(64, 64), (100, 70), (64, 64)]
    kept = [captured(images(*size)) for size in sizes]
    # Of all sizes, and of the first once more after others have run: maps are not those of a later replay.
    other = captured(images(64, 64).flip(0))
    for size, found in zip(sizes, kept, strict=True):
        for one, expected in zip(found, plain(images(*size)), strict=True):
            assert torch.equal(one, expected)
            assert one.stride() == expected.stride()
    assert torch.equal(other[0], plain(images(64, 64).flip(0))[0])
    assert captured.checksum() == plain.checksum()
    captured.to("cpu").to("cuda")
    assert torch.equal(captured(images(64, 64))[0], kept[0][0])


def test_a_captured_forward_serves_a_heads_backward() -> None:
    _, captured = twins()
    captured.capture_forward()
    head = nn.Conv2d(96, 4, 1).to("cuda", torch.bfloat16)
    loss = head(captured(images(64, 64))[0]).square().mean()
    captured(images(64, 64).flip(0))
    loss.backward()
    assert head.weight.grad.isfinite().all()


def test_compiled_and_captured_together() -> None:
    plain, both = twins(attention="triton", residual_norm="triton")
    exact = load_backbone("swinv2_tiny", weights="random", window_size=8, dtype=torch.float64)(images(64, 96))
    both.compile_forward()
    both.capture_forward()
    theirs = worst_error(plain(images(64, 96)), exact)
    for _ in range(2):
        assert worst_error(both(images(64, 96)), exact) <= 2 * theirs


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs compute capability 9.0"
)
@pytest.mark.parametrize(("name", "window"), [("swinv2_tiny", 8), ("swin_tiny", 7), ("swinv2_base", 12)])
def test_fp8_maps_have_a_cosine_of_0_985(name: str, window: int) -> None:
    own = {"weights": "random", "window_size": window}
    expected = load_backbone(name, dtype=torch.float32, **own)(images())
    quantised = load_backbone(name, dtype=torch.bfloat16, device="cuda", fp8=True, **own)
    assert "E4M3" in quantised.describe()["fp8"]
    for one, other in zip(quantised(images()), expected, strict=True):
        cosine = nn.functional.cosine_similarity(one.double().cpu().flatten(), other.double().flatten(), dim=0)
        assert float(cosine) >= 0.985
