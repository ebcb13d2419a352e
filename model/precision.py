"""Choose what a network computes in: where autocast must not reach, and what a device can do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from permafrost.model.errors import BackboneError

if TYPE_CHECKING:
    from permafrost.model.config import BackboneConfig


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off on this device, whatever surrounds; the meta device, on which only shapes are computed, has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def find_device(device: torch.device | str) -> torch.device:
    """Return the device of this name.

    Raises:
        BackboneError: if there is none here.
    """
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise BackboneError(f"There is no device {device!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackboneError(
            f"The backbone is asked to run on {device}, but PyTorch sees {torch.cuda.device_count()} CUDA devices."
        )
    return device


def choose_dtype(config: BackboneConfig, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype that a network computes in, or that its parameters have if it learns, and why."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype), "as asked for"
    if not config.frozen:
        return torch.float32, "parameters that are trained; engine.precision says in what they compute"
    if device.type == "cuda":
        return torch.bfloat16, "default on CUDA"
    return torch.float32, f"default on {device.type}: bfloat16 is slower than float32 on most CPUs"


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a dtype that a device lacks, by computing a little of everything that a network does.

    Raises:
        BackboneError: if the device cannot do that in this dtype, or only by emulating it.
    """
    name = str(dtype).removeprefix("torch.")
    advice = "choose another dtype (backbone.dtype), float32 is everywhere"
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise BackboneError(f"{torch.cuda.get_device_name(device)} has no {name} arithmetic: {advice}.")
    try:
        with torch.no_grad():
            x = torch.ones(1, 4, 2, 2, device=device).to(dtype)
            x = F.conv2d(x, x.expand(4, 4, 2, 2)).flatten(1)
            x = F.layer_norm(F.gelu(F.linear(x, x.expand(4, 4))), (4,))[:, None, None]
            F.scaled_dot_product_attention(x, x, x)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise BackboneError(f"The backbone cannot compute in {name} on {device} ({reason}): {advice}.") from error
