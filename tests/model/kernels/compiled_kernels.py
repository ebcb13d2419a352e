"""Triton kernels compiled for GPUs that are not here, and what the assembler says of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any


def compile_triton(kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int) -> bytes:
    """The cubin of a kernel.

    Args:
        kernel: A function under triton.jit.
        types: Of every argument but the constants: "*bf16", "i32", ...
        constants: What a launch is given by name, `num_warps` among it.
        architecture: Compute capability times 10.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(constants)
    num_warps = constants.pop("num_warps")
    types = types | dict.fromkeys(constants, "constexpr")
    # What a launch finds out by itself: addresses and strides that are multiples of 16.
    aligned = [number for number, one in enumerate(kernel.arg_names) if types[one][0] == "*" or one.endswith("stride")]
    attributes = {(number,): [["tt.divisibility", 16]] for number in aligned}
    signature = {one: types[one] for one in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps}).asm["cubin"]


def resource_usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack and local memory of a kernel, as cuobjdump lists them; spilled registers are stack."""
    from triton.backends import nvidia

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
