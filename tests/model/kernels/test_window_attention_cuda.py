"""The CUDA kernel of window attention: its sources on a CPU, and compiled for GPUs that are not here.

The sources are compiled by g++ against an emulated warp (emulator/), so what is computed here are their own lines, all but
the instructions in warp.h.
"""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from cases import Case, relative_error
from emulated import Emulator, Map, plan_of

from permafrost.model.errors import KernelError
from permafrost.model.kernels import nvrtc
from permafrost.model.kernels.window_attention import DTYPES, cuda, window_attention

CASES = {
    "two heads of a block": Case(8, 4, 16, 16, dtype="bfloat16"),
    "logits of a large range": Case(8, 4, 12, 12, dtype="bfloat16", max_scale=100.0),
    "not shifted": Case(8, 0, 16, 8, dtype="float16"),
    "map smaller than a window": Case(8, 0, 5, 11, dtype="float16"),
    "odd window, several images": Case(7, 3, 9, 17, dtype="bfloat16", batch=2),
    "one head, nine tiles": Case(12, 6, 13, 24, dtype="bfloat16", num_heads=1),
    "nine tiles of two heads": Case(12, 6, 13, 15, dtype="float16"),
    "several rounds": Case(16, 8, 17, 30, dtype="bfloat16"),
    "odd number of heads": Case(16, 8, 20, 17, dtype="float16", num_heads=3),
    "largest whole window": Case(24, 12, 25, 25, dtype="bfloat16", num_heads=1),
    "keys in chunks": Case(25, 0, 25, 20, dtype="float16", num_heads=1),
    "V1": Case(7, 3, 11, 8, dtype="float16", cosine=False),
    "V1, keys in chunks": Case(25, 0, 20, 25, dtype="bfloat16", cosine=False, num_heads=1),
    "64 dims per head": Case(8, 4, 9, 13, dtype="bfloat16", head_dim=64),
    "64 dims per head in chunks": Case(24, 0, 24, 20, dtype="bfloat16", head_dim=64, num_heads=1),
    "tiny window": Case(2, 1, 3, 5, dtype="float16"),
    "float32": Case(8, 4, 9, 13),
    "float32, V1, 64 dims": Case(7, 3, 8, 10, cosine=False, head_dim=64),
}
LARGE = (
    Case(27, 13, 28, 28, dtype="float16", num_heads=1),
    Case(56, 0, 50, 56, dtype="bfloat16", num_heads=1),
)
FAR = Case(4, 2, 5, 8, dtype="float16", batch=2)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    plans = {plan_of(case): None for case in (*CASES.values(), FAR, *LARGE)}
    return Emulator(list(plans), tmp_path_factory.mktemp("emulator"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_reference(emulator: Emulator, case: Case) -> None:
    check_emulated(emulator, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=["27, shifted", "56"])
def test_equals_the_reference_in_large_windows(emulator: Emulator, case: Case) -> None:
    check_emulated(emulator, case)


def check_emulated(emulator: Emulator, case: Case) -> None:
    chosen, tensors = plan_of(case), case.tensors()
    out = torch.full((*tensors[0].shape[:3], case.num_heads * case.head_dim), float("nan"), dtype=tensors[0].dtype)
    emulator.run(chosen, tensors, out, window=case.window, shift=case.shift)
    assert relative_error(out, case.expected()) <= case.tolerance()


def test_offsets_beyond_32_bits(emulator: Emulator) -> None:
    """Two images further apart than 32 bits reach; the memory between them is never touched."""
    qkv, *constants = FAR.tensors()
    far = 2**31 + 4096
    spread = []
    for shape in (qkv.shape, (*qkv.shape[:3], qkv.shape[3] // 3)):
        memory = torch.empty(far + shape[1] * shape[2] * shape[3], dtype=qkv.dtype)
        spread.append(memory.as_strided(shape, (far, shape[2] * shape[3], shape[3], 1)))
    spread[0].copy_(qkv)
    spread[1].fill_(float("nan"))
    emulator.run(plan_of(FAR), (spread[0], *constants), spread[1], window=FAR.window, shift=FAR.shift)
    assert relative_error(spread[1], FAR.expected()) <= FAR.tolerance()
    place_in_map = emulator.library.place_in_map
    place_in_map.restype = ctypes.c_longlong
    assert place_in_map(50_000, 49_999, 49_999) == 50_000**2 - 1


def test_block_numbers_at_the_end_of_a_grid(emulator: Emulator) -> None:
    """The last windows of a batch of millions: images of stride 0 are all the same."""
    case = FAR
    chosen, (qkv, *constants) = plan_of(case), case.tensors()
    images = 2**31 // chosen.blocks(1, 2, 2, case.num_heads) - 1
    qkv = qkv[:1].expand(images, -1, -1, -1)
    out = torch.full((1, 5, 8, 64), float("nan"), dtype=qkv.dtype)
    blocks = chosen.blocks(1, 2, 2, case.num_heads)
    first = (images - 1) * blocks
    assert first > 2**31 - 100
    emulator.run(
        chosen,
        (qkv, *constants),
        out.expand(images, -1, -1, -1),
        window=4,
        shift=2,
        blocks=(first, blocks),
    )
    assert relative_error(out, case.expected()[:1]) <= case.tolerance()
    with pytest.raises(KernelError, match="use fewer images"):
        cuda.describe_launch(chosen, qkv, *constants, out.expand(2**31, -1, -1, -1), window=4, shift=2)


@pytest.mark.parametrize(
    ("window", "shift", "height", "width"),
    [(3, 1, 7, 8), (7, 3, 21, 30), (8, 0, 5, 9), (12, 6, 40, 13), (16, 8, 33, 64), (24, 12, 25, 50), (56, 0, 56, 60)],
)
def test_places_are_where_rolling_moves_them(emulator: Emulator, window, shift, height, width) -> None:
    down, across = -(-height // window), -(-width // window)
    padded = torch.arange(down * window * across * window).view(down * window, across * window)

    def windows(of: torch.Tensor) -> list[int]:
        rolled = torch.roll(of, (-shift, -shift), dims=(0, 1))
        return rolled.view(down, window, across, window).permute(0, 2, 1, 3).flatten().tolist()

    y, x = padded // (across * window), padded % (across * window)
    found = emulator.places(window, Map(height, width, down, across, shift))
    assert [one.y for one in found] == windows(y)
    assert [one.x for one in found] == windows(x)
    assert [one.place for one in found] == windows(y * width + x)
    assert [bool(one.is_padding) for one in found] == windows((y >= height) | (x >= width))
    # What lies above the shift has come from below, in windows of the last row; likewise to the right.
    unrolled = [windows(torch.roll(of, (shift, shift), dims=(0, 1))) for of in (y, x)]
    origins = [
        2 * (row >= down * window - shift) + (column >= across * window - shift)
        for row, column in zip(*unrolled, strict=True)
    ]
    assert [one.origin for one in found] == origins


@pytest.mark.parametrize("window", [3, 7, 12, 24])
def test_entries_of_the_position_bias(emulator: Emulator, window: int) -> None:
    tokens = emulator.places(window, Map(window, window, 1, 1, 0))
    for query, one in enumerate(tokens):
        for key, other in enumerate(tokens):
            rows, columns = query // window - key // window, query % window - key % window
            expected = (rows + window - 1) * (2 * window - 1) + columns + window - 1
            assert one.query_entry - other.key_entry == expected


def test_host_and_source_agree_on_every_build(emulator: Emulator) -> None:
    for case in CASES.values():
        chosen = plan_of(case)
        found = emulator.describe(chosen)
        assert (found.threads, found.parts, found.shared_bytes) == (chosen.threads, chosen.parts, chosen.shared_bytes)


def test_every_plan_fits_a_gpu() -> None:
    for dtype in DTYPES:
        for head_dim in (32, 64):
            for window in range(1, 57):
                for num_heads in (3, 64):
                    chosen = cuda.plan(dtype, window, head_dim, num_heads, cosine=True)
                    # Of an A100; an H100 has 227 KiB.
                    assert chosen.shared_bytes <= 163 << 10, chosen
                    assert chosen.threads <= 288
                    assert num_heads % chosen.heads == 0


def spills(log: str) -> list[int]:
    found = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    assert found, log
    return found


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("window", [8, 12, 16, 24])
def test_compiles_without_spills(architecture: int, window: int) -> None:
    check_compiles(architecture, window, "bfloat16", 32)


@pytest.mark.parametrize(
    ("window", "dtype", "head_dim"),
    [(7, "float16", 32), (16, "float16", 64), (8, "float32", 32), (16, "float32", 64), (56, "bfloat16", 32)],
)
def test_other_sizes_compile_without_spills(window: int, dtype: str, head_dim: int) -> None:
    check_compiles(90, window, dtype, head_dim)


def check_compiles(architecture: int, window: int, dtype: str, head_dim: int) -> None:
    chosen = cuda.plan(getattr(torch, dtype), window, head_dim, 64, cosine=True)
    cubin, log = cuda.compile_plan(chosen, architecture)
    assert cubin[:4] == b"\x7fELF"
    assert cuda.KERNEL.encode() in cubin
    assert not any(spills(log))


def test_a_compiler_that_refuses_is_a_named_error() -> None:
    with pytest.raises(KernelError, match=r"(?s)could not compile broken\.cu for sm_90 .*expected a"):
        nvrtc.compile_cubin("__global__ void f() { int }", name="broken.cu", headers={}, architecture=90)
    with pytest.raises(KernelError, match="sm_33, which this NVRTC does not know"):
        nvrtc.compile_cubin("", name="empty.cu", headers={}, architecture=33)


def test_nvrtc_that_is_not_there_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match="a CUDA build of PyTorch brings"):
        nvrtc.compile_cubin("", name="empty.cu", headers={}, architecture=90)


def test_tensors_of_a_cpu_are_refused() -> None:
    case = Case(8, 4, 9, 17, dtype="bfloat16")
    with pytest.raises(KernelError, match="needs tensors on a GPU, these are on cpu"):
        window_attention(*case.tensors(), **case.keywords, kernel="cuda")
