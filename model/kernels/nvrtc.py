"""Compile CUDA C++ at run time with NVRTC, and launch it through the driver.

Both come with a CUDA build of PyTorch (cuda.bindings and NVIDIA's libraries), so nobody needs a compiler. Compiling needs
no GPU; the sources include nothing but each other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from permafrost.model.errors import KernelError


def compile_cubin(
    source: str, *, name: str, headers: Mapping[str, str], defines: Sequence[str] = (), architecture: int
) -> tuple[bytes, str]:
    """Compile a source for one kind of GPU.

    Args:
        source: CUDA C++.
        name: what messages call it.
        headers: what it may include, by name.
        defines: macros, as NAME or NAME=VALUE.
        architecture: compute capability times 10, as in 90.

    Returns:
        The cubin, and what the assembler said about registers and spills.

    Raises:
        KernelError: if NVRTC cannot be had, does not know the architecture, or refuses the source.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelError(f"{name} is compiled by NVRTC, which a CUDA build of PyTorch brings: {error}.") from error

    def check(result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelError(f"NVRTC could not compile {name} for sm_{architecture}: {status.name}.")
        return values[0] if values else None

    try:
        count = check(nvrtc.nvrtcGetNumSupportedArchs())
        known = check(nvrtc.nvrtcGetSupportedArchs())
    except RuntimeError as error:
        # cuda.bindings is there, its libraries are not.
        raise KernelError(f"{name} is compiled by NVRTC, which cannot be loaded: {error}.") from error
    if architecture not in known[:count]:
        raise KernelError(
            f"{name} is compiled for sm_{architecture}, which this NVRTC does not know: it has {known[:count]}."
        )
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", "--ptxas-options=-v"]
    options += [f"--define-macro={one}" for one in defines]
    program = check(
        nvrtc.nvrtcCreateProgram(
            source.encode(),
            name.encode(),
            len(headers),
            [text.encode() for text in headers.values()],
            [header.encode() for header in headers],
        )
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = bytearray(check(nvrtc.nvrtcGetProgramLogSize(program)))
        check(nvrtc.nvrtcGetProgramLog(program, log))
        messages = bytes(log).rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelError(
                f"NVRTC could not compile {name} for sm_{architecture} ({status.name}): {messages or 'no message'}"
            )
        cubin = bytearray(check(nvrtc.nvrtcGetCUBINSize(program)))
        check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin), messages


class LoadedKernel:
    """A kernel on one GPU.

    Args:
        cubin: from compile_cubin, for this GPU's architecture.
        name: the kernel's name in it.
        shared_bytes: dynamic shared memory of a block.
        device: the GPU.

    Raises:
        KernelError: if the driver refuses it: mostly, if the GPU has less shared memory.
    """

    def __init__(self, cubin: bytes, name: str, *, shared_bytes: int, device: torch.device) -> None:
        from cuda.bindings import driver

        self._driver, self._name, self._shared_bytes = driver, name, shared_bytes
        with torch.cuda.device(device):
            # PyTorch makes its context current at its first use of the device, not before.
            torch.cuda.current_stream().synchronize()
            self._module = self._check(driver.cuModuleLoadData(cubin))
            self._function = self._check(driver.cuModuleGetFunction(self._module, name.encode()))
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._check(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes))

    def launch(self, blocks: int, threads: int, arguments: ctypes.Structure) -> None:
        """Start it on the current stream of the current device, with one argument by value."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = torch.cuda.current_stream().cuda_stream
        sizes = (blocks, 1, 1, threads, 1, 1, self._shared_bytes)
        self._check(self._driver.cuLaunchKernel(self._function, *sizes, stream, ctypes.addressof(pointers), 0))

    def _check(self, result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise KernelError(f"The driver refused {self._name} ({self._shared_bytes} bytes shared): {status.name}.")
        return values[0] if values else None
