"""Choose the kernel that an op runs on: what the recipe asks for, whether it can run here, and why it was taken.

What is asked for by name is taken or is an error. "auto" takes what model/kernels/verified.py lists for this GPU and dtype,
and PyTorch's own operators everywhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from permafrost.model.errors import KernelError
from permafrost.model.kernels.verified import VERIFIED

COMPILED = ("triton", "cuda", "epilogue")
"""Versions that run on a GPU and have no gradient; the others are made of PyTorch's common operators."""


@dataclass(frozen=True)
class Choice:
    """The version that computes an op, and why it was taken."""

    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel} ({self.reason})"


def choose_kernel(
    asked: str,
    *,
    field: str,
    op: str,
    plain: str,
    dtype: torch.dtype,
    device: torch.device,
    learns: bool,
    attempt: Callable[[Any], None],
) -> Choice:
    """Choose what computes an op of a network.

    Args:
        asked: "auto", or what the recipe names.
        field: the recipe's field, for messages.
        op: folder of the op.
        plain: what PyTorch's own operators are called.
        dtype: what the network computes in.
        device: where the network is.
        learns: whether the network is trained, for which kernels have no backward.
        attempt: runs the op once in each shape the network needs, with a kernel; raises if that cannot be done.

    Raises:
        KernelError: if a kernel that is asked for by name cannot run here.
    """
    if asked in COMPILED:
        if learns:
            return Choice(plain, f"a gradient is wanted, which the {asked} kernel asked for does not have")
        _attempt(asked, field=field, plain=plain, device=device, attempt=attempt)
        return Choice(asked, "as asked for")
    if asked != "auto":
        return Choice(asked, "as asked for")
    if learns:
        return Choice(plain, "a gradient is wanted, which kernels do not have")
    if device.type != "cuda":
        return Choice(plain, f"kernels are for GPUs, the network is on {device.type}")
    major, minor = torch.cuda.get_device_capability(device)
    name = str(dtype).removeprefix("torch.")
    target = (op, 10 * major + minor, name)
    problems = []
    for row in VERIFIED:
        if (row.op, row.architecture, row.dtype) == target:
            try:
                _attempt(row.kernel, field=field, plain=plain, device=device, attempt=attempt)
            except KernelError as error:
                problems.append(str(error))
            else:
                return Choice(row.kernel, f"verified on sm_{row.architecture} in {name}, {row.card}, {row.date}")
    if problems:
        return Choice(plain, f"what is verified here does not run: {'; '.join(problems)}")
    return Choice(plain, f"no kernel has been verified on sm_{10 * major + minor} in {name}; {field} asks for one")


def _attempt(kernel: str, *, field: str, plain: str, device: torch.device, attempt: Callable[[Any], None]) -> None:
    """Run a kernel once.

    Raises:
        KernelError: if it cannot be run, whatever the reason, naming the field and the remedy.
    """
    try:
        if device.type != "cuda" and not (kernel == "triton" and is_interpreted()):
            raise KernelError(f"it runs on a GPU, and the network is on {device}")
        attempt(kernel)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Compilers and drivers have errors of many kinds.
        kind = "" if isinstance(error, KernelError) else f"{type(error).__name__}: "
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = f"{kind}{' '.join(lines)[:600]}".rstrip(".")
        raise KernelError(
            f"{field} is {kernel!r}, which does not run here: {text}. Set {field} to {plain!r} or 'auto' to do without."
        ) from error


def is_interpreted() -> bool:
    """Return whether Triton's kernels run in its interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
