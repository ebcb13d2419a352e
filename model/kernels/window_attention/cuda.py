"""Configure, compile and launch window attention in CUDA C++ (csrc/window_attention.cu)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from permafrost.model.errors import KernelError
from permafrost.model.kernels.nvrtc import LoadedKernel, compile_cubin

SOURCES = Path(__file__).parent / "csrc"
KERNEL = "window_attention_fwd_kernel"
_TYPES = {torch.float32: "Float32", torch.float16: "Float16", torch.bfloat16: "BFloat16"}
# Keys of a window up to here lie in shared memory together.
_LARGEST_WHOLE_WINDOW = 24
_CHUNK_BYTES = 80 << 10
_MAX_WARPS = 9
_MAX_BLOCKS = 2**31 - 1


class Arguments(ctypes.Structure):
    """As `struct Arguments` in the source."""

    _fields_ = [
        ("qkv", ctypes.c_void_p),
        ("qkv_bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("qkv_image_stride", ctypes.c_longlong),
        ("out_image_stride", ctypes.c_longlong),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("down", ctypes.c_int),
        ("across", ctypes.c_int),
        ("shift", ctypes.c_int),
        ("num_heads", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Plan:
    """The constants of a build; `struct Config` in the source says what follows from them.

    Attributes:
        dtype: of the map.
        window: side of a window.
        head_dim: D.
        cosine: as in the reference.
        heads: heads of a block.
        warps: warps of a block.
        group: tiles of 16 keys whose logits are in registers together.
        chunk_groups: groups of keys that are in shared memory together.
    """

    dtype: torch.dtype
    window: int
    head_dim: int
    cosine: bool
    heads: int
    warps: int
    group: int
    chunk_groups: int

    @property
    def config(self) -> str:
        """The type in the source."""
        cosine = "true" if self.cosine else "false"
        numbers = f"{self.heads}, {self.warps}, {self.group}, {self.chunk_groups}"
        return f"Config<{_TYPES[self.dtype]}, {self.window}, {self.head_dim}, {cosine}, {numbers}>"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def tiles(self) -> int:
        """Tiles of 16 queries of a window and head."""
        return -(-(self.window**2) // 16)

    @property
    def parts(self) -> int:
        """Blocks that share a window and its heads."""
        is_whole = self.chunk_groups * self.group >= self.tiles
        return 1 if is_whole else -(-self.heads * self.tiles // self.warps)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        chunk, size = self.chunk_groups * self.group * 16, self.dtype.itemsize
        table = -(-self.heads * (2 * self.window - 1) ** 2 // 4) * 16
        return table + 4 * chunk + 2 * self.heads * chunk * (self.head_dim * size + 16)

    def blocks(self, batch: int, down: int, across: int, num_heads: int) -> int:
        """Size of the grid."""
        return batch * down * across * (num_heads // self.heads) * self.parts


def plan(dtype: torch.dtype, window: int, head_dim: int, num_heads: int, *, cosine: bool) -> Plan:
    """Choose the constants for windows of a size."""
    tiles = -(-(window**2) // 16)
    row_bytes = head_dim * dtype.itemsize
    # The group that wastes the fewest tiles; of these the largest. Logits of larger ones spill where two blocks of nine
    # warps leave 96 registers a thread, and float32 multiplies with so much code that one will do.
    sizes = (1,) if dtype == torch.float32 else (2, 1)
    group = min(sizes, key=lambda size: -(-tiles // size) * size)
    # Two heads share a line of memory; more tokens than these fill a block with one.
    heads = 2 if num_heads % 2 == 0 and window**2 <= 256 and row_bytes <= 64 else 1
    chunk_groups = -(-tiles // group)
    if window > _LARGEST_WHOLE_WINDOW or chunk_groups * group * 32 * row_bytes > _CHUNK_BYTES:
        chunk_groups, warps = max(1, _CHUNK_BYTES // (group * 32 * row_bytes)), 8
    else:
        # As few rounds as the warps allow, and then as few warps as these rounds need.
        rounds = -(-heads * tiles // _MAX_WARPS)
        warps = -(-heads * tiles // rounds)
    return Plan(dtype, window, head_dim, cosine, heads, warps, group, chunk_groups)


def sources() -> tuple[str, dict[str, str]]:
    """Return the kernel's source, and what it includes."""
    headers = {name: (SOURCES / name).read_text() for name in ("geometry.h", "warp.h")}
    return (SOURCES / "window_attention.cu").read_text(), headers


def compile_plan(chosen: Plan, architecture: int) -> tuple[bytes, str]:
    """Compile a build for one kind of GPU: the cubin, and the assembler's messages.

    Raises:
        KernelError: if NVRTC is missing or refuses the source.
    """
    source, headers = sources()
    defines = [f"CONFIG={chosen.config}"]
    return compile_cubin(
        source, name="window_attention.cu", headers=headers, defines=defines, architecture=architecture
    )


@cache
def _load(chosen: Plan, device: torch.device) -> LoadedKernel:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise KernelError(
            f"The cuda kernel of window attention needs compute capability 8.0, {torch.cuda.get_device_name(device)} "
            f"has {major}.{minor}."
        )
    cubin, _ = compile_plan(chosen, 10 * major + minor)
    return LoadedKernel(cubin, KERNEL, shared_bytes=chosen.shared_bytes, device=device)


def window_attention_cuda(
    qkv: Tensor, qkv_bias: Tensor, scale: Tensor, table: Tensor, out: Tensor, *, window: int, shift: int, cosine: bool
) -> None:
    """Fill `out` (B, H, W, C) with what the reference says, on the current stream.

    Args:
        qkv: (B, H, W, 3 * C); images may lie anywhere, each is contiguous.
        qkv_bias: (3 * C,), in the dtype of `qkv`.
        scale: (A,), float32.
        table: (A, (2 * window - 1) ** 2), float32.
        out: as `qkv`.
        window, shift, cosine: as in the reference.

    Raises:
        KernelError: if the tensors are not on a GPU, or it cannot be built for theirs.
    """
    if qkv.device.type != "cuda":
        raise KernelError(f"The cuda kernel of window attention needs tensors on a GPU, these are on {qkv.device}.")
    if any(one.data_ptr() % 16 for one in (qkv, qkv_bias)) or qkv.stride(0) * qkv.element_size() % 16:
        raise KernelError(
            "The cuda kernel of window attention needs maps and biases that begin at multiples of 16 bytes."
        )
    chosen = plan(qkv.dtype, window, out.shape[3] // len(table), len(table), cosine=cosine)
    blocks, arguments = describe_launch(chosen, qkv, qkv_bias, scale, table, out, window=window, shift=shift)
    with torch.cuda.device(qkv.device):
        _load(chosen, qkv.device).launch(blocks, chosen.threads, arguments)


def describe_launch(
    chosen: Plan,
    qkv: Tensor,
    qkv_bias: Tensor,
    scale: Tensor,
    table: Tensor,
    out: Tensor,
    *,
    window: int,
    shift: int,
) -> tuple[int, Arguments]:
    """Return the size of the grid, and the kernel's argument.

    Raises:
        KernelError: if the grid is larger than a GPU takes.
    """
    batch, height, width, _ = out.shape
    down, across = -(-height // window), -(-width // window)
    blocks = chosen.blocks(batch, down, across, len(table))
    if blocks > _MAX_BLOCKS:
        raise KernelError(
            f"Window attention: {blocks} blocks in one launch, a GPU takes {_MAX_BLOCKS}; use fewer images."
        )
    pointers = (one.data_ptr() for one in (qkv, qkv_bias, scale, table, out))
    return blocks, Arguments(*pointers, qkv.stride(0), out.stride(0), height, width, down, across, shift, len(table))
