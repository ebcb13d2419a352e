"""Compute linear layers of a frozen network in 8-bit floating point: half the bytes, and on GPUs that have it twice the products.

Weights never change, so they are quantised once, when they are loaded; activations are as they come. Both have a scale per
row (of a weight a row is an output channel, of activations a token), so that one large value costs only its own row its
digits. Products are summed in 32 bits.

The format is E4M3 of "FP8 Formats for Deep Learning" (Micikevicius et al., 2022), in the variant without infinities.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from permafrost.model.errors import BackboneError

FORMAT = torch.float8_e4m3fn
LARGEST = 448.0
"""The format's largest magnitude."""
SMALLEST_ROW = 1e-12
"""Rows of smaller numbers become zeros: their scale would have no digits."""
MULTIPLE = 16
"""Channels in and out are multiples of this, or the hardware's products do not take them."""
CAPABILITY = (9, 0)
"""Compute capability of the first GPUs that scale each row within the product."""


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale every row so that its largest magnitude is the format's, and round.

    Args:
        x: (..., C).

    Returns:
        (..., C) in FORMAT, and the scales (..., 1) in float32: the first times the second is x, but for the rounding.
    """
    precise = x.to(torch.float32)
    scales = precise.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST_ROW) / LARGEST
    return (precise / scales).to(FORMAT), scales


class Fp8Linear(nn.Module):
    """A linear layer with an 8-bit weight, which quantises what comes in.

    Args:
        linear: the layer it stands for; its channels are multiples of MULTIPLE.

    Attributes:
        weight: (C_out, C_in) in FORMAT.
        scales: (C_out, 1) float32.
        bias: (C_out,) in the dtype of the layer, or None.
    """

    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with torch.no_grad():
            values, scales = quantise_rows(linear.weight)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C_in) to (..., C_out), in the dtype of `x`."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map as `forward`, with another bias (C_out,), in the dtype of `x`."""
        values, scales = quantise_rows(x.reshape(-1, self.in_features))
        out = torch._scaled_mm(
            values,
            self.weight.t(),
            scale_a=scales,
            scale_b=self.scales.t(),
            bias=bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return out.view(*x.shape[:-1], self.out_features)


def linear_with(layer: nn.Linear | Fp8Linear, x: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer with another bias than its own: x (..., C_in), bias (C_out,) -> (..., C_out)."""
    return layer.product(x, bias) if isinstance(layer, Fp8Linear) else nn.functional.linear(x, layer.weight, bias)


def require_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Check that products of 8-bit numbers can be had.

    Raises:
        BackboneError: if not, naming the field and the remedy.
    """
    remedy = "set backbone.fp8 to False"
    if device.type != "cuda":
        raise BackboneError(
            f"backbone.fp8 is True, but the backbone is on {device}: only GPUs multiply 8-bit floats; {remedy}."
        )
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        needed, had = (f"{major}.{minor}" for major, minor in (CAPABILITY, found))
        raise BackboneError(
            f"backbone.fp8 is True, which needs compute capability {needed}; {torch.cuda.get_device_name(device)} has {had}: "
            f"{remedy}."
        )
    if dtype != torch.bfloat16:
        raise BackboneError(
            f"backbone.fp8 is True and the backbone computes in {str(dtype).removeprefix('torch.')}: products scaled by rows "
            f"give bfloat16; set backbone.dtype to it, or {remedy}."
        )
    try:
        layer = Fp8Linear(nn.Linear(MULTIPLE, MULTIPLE, device=device, dtype=dtype))
        layer(torch.ones(MULTIPLE, MULTIPLE, device=device, dtype=dtype))
        torch.cuda.synchronize(device)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise BackboneError(
            f"backbone.fp8 is True, but 8-bit products do not run on {device} ({str(error).splitlines()[0]}): {remedy}."
        ) from error


def quantise_linears(network: nn.Module) -> dict[str, Any]:
    """Put Fp8Linear in the place of a network's linear layers, one after the other; their weights are freed.

    The parameters of continuous position biases stay: they are used once.

    Returns:
        For the start-up lines: how many layers and which share of the network's parameters.
    """
    layers = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and ".cpb_mlp." not in name
    ]
    fitting = [
        (name, module)
        for name, module in layers
        if module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
    ]
    total = sum(parameter.numel() for parameter in network.parameters())
    quantised = 0
    for name, module in fitting:
        owner, _, key = name.rpartition(".")
        quantised += module.weight.numel()
        setattr(network.get_submodule(owner), key, Fp8Linear(module))
    others = f", {len(layers) - len(fitting)} of other sizes left as they are" if len(layers) > len(fitting) else ""
    return {
        "fp8": f"{len(fitting)} linear layers in E4M3, a scale per row of weights and activations ({quantised / total:.1%} of the "
        f"parameters){others}"
    }
