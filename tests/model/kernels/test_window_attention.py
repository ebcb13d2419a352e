"""Window attention's reference, its one entry, and PyTorch's own version of it."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import Case, relative_error
from torch import Tensor, nn

from permafrost.model import BackboneError
from permafrost.model.errors import KernelError
from permafrost.model.kernels import window_attention as op
from permafrost.model.kernels.window_attention import window_attention
from permafrost.model.kernels.window_attention.pytorch import window_attention_pytorch
from permafrost.model.swin.v1 import SwinV1
from permafrost.model.swin.v2 import SwinV2, WindowAttention

MAPS = [(4, 0, 4, 12), (4, 2, 9, 7), (7, 3, 14, 15), (5, 0, 3, 8), (1, 0, 3, 2)]


@torch.no_grad()
@pytest.mark.parametrize("build", [SwinV2, SwinV1])
@pytest.mark.parametrize(("window", "shift", "height", "width"), MAPS)
def test_reference_is_what_the_network_computes(randomise, build, window, shift, height, width) -> None:
    network = build("swinv2_nano" if build is SwinV2 else "swin_tiny", window_size=window)
    attention = randomise(network).double().layers[1].blocks[0].attn
    # Only up to the projection that follows.
    attention.proj = nn.Identity()
    x = torch.randn(2, height, width, attention.qkv.in_features, dtype=torch.float64)
    qkv_bias, scale, table = attention.constants(window)
    assert isinstance(attention, WindowAttention) == (build is SwinV2)
    qkv = nn.functional.linear(x, attention.qkv.weight, qkv_bias)
    keywords = {"window": window, "shift": shift, "cosine": build is SwinV2}
    found = window_attention(qkv, qkv_bias, scale, table, **keywords, kernel="reference")
    assert relative_error(found, attention(x, window, shift)) < 1e-12


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(("window", "shift", "height", "width"), MAPS)
def test_pytorch_version_equals_the_reference(window, shift, height, width, cosine, fused) -> None:
    case = Case(window, shift, height, width, cosine=cosine, batch=2)
    found = window_attention_pytorch(*(one.double() for one in case.tensors()), **case.keywords, fused=fused)
    assert relative_error(found, case.expected()) < 1e-12


def test_reference_computes_in_float32() -> None:
    case = Case(8, 4, 9, 17, dtype="bfloat16")
    found = window_attention(*case.tensors(), **case.keywords, kernel="reference")
    assert found.dtype == torch.bfloat16
    # Rounding the result is the only error: a relative 2 ** -9 at most of each number.
    assert relative_error(found, case.expected()) < 2**-9


def test_autocast_does_not_reach_the_reference() -> None:
    case = Case(8, 4, 9, 17, dtype="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        found = window_attention(*case.tensors(), **case.keywords, kernel="reference")
    assert relative_error(found, case.expected()) < 2**-9


def test_a_gradient_takes_the_reference_and_says_so() -> None:
    case = Case(4, 2, 6, 9)
    qkv, bias, scale, table = case.tensors()
    qkv.requires_grad_()
    with pytest.warns(UserWarning, match="a gradient is wanted and the triton kernel has none"):
        found = window_attention(qkv, bias, scale, table, **case.keywords, kernel="triton")
    found.square().sum().backward()
    assert qkv.grad.abs().sum() > 0
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        window_attention(qkv, bias, scale, table, **case.keywords, kernel="reference")


def test_gradients_of_the_reference() -> None:
    case = Case(3, 1, 6, 6, num_heads=1, head_dim=4, max_scale=3.0)
    tensors = [one.double().requires_grad_() for one in case.tensors()]
    torch.autograd.gradcheck(lambda *args: window_attention(*args, **case.keywords, kernel="reference"), tensors)


def test_shapes_are_known_without_computing() -> None:
    def call(device: str) -> Tensor:
        tensors = (one.to(device) for one in Case(8, 4, 9, 17, dtype="bfloat16", batch=3).tensors())
        return window_attention(*tensors, window=8, shift=4, kernel="cuda")

    found = call("meta")
    assert found.shape == (3, 9, 17, 64)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float64"}, "does not take dtype torch.float64"),
        ({"head_dim": 16}, "16 dims per head"),
        ({"window": 57, "shift": 0}, "a window of 57"),
    ],
)
def test_kernels_say_what_they_do_not_take(changes, message) -> None:
    case = Case(**({"window": 4, "shift": 2, "height": 6, "width": 9} | changes))
    for kernel in ("triton", "cuda"):
        with pytest.raises(KernelError, match=message):
            window_attention(*case.tensors(), **case.keywords, kernel=kernel)


def test_arguments_that_do_not_go_together_are_refused() -> None:
    case = Case(4, 2, 6, 9)
    qkv, bias, scale, table = case.tensors()
    with pytest.raises(BackboneError, match="shift of 4 do not go together"):
        window_attention(qkv, bias, scale, table, window=4, shift=4, kernel="reference")
    with pytest.raises(BackboneError, match="needs a table of 81 entries"):
        window_attention(qkv, bias, scale, table, window=5, shift=0, kernel="reference")
    with pytest.raises(BackboneError, match="bias of 192, found 49 and"):
        window_attention(qkv, bias[1:], scale, table, window=4, shift=0, kernel="reference")
    with pytest.raises(BackboneError, match="divisible by the heads"):
        window_attention(qkv[..., 1:], bias, scale, table, window=4, shift=0, kernel="reference")
    with pytest.raises(BackboneError, match="not shifted"):
        window_attention(qkv[:, :4], bias, scale, table, window=4, shift=2, kernel="reference")
    with pytest.raises(BackboneError, match="no window attention kernel 'flash'"):
        window_attention(qkv, bias, scale, table, window=4, kernel="flash")


def test_no_images_need_no_kernel() -> None:
    qkv, bias, scale, table = Case(4, 2, 6, 9).tensors()
    assert window_attention(qkv[:0], bias, scale, table, window=4, shift=2, kernel="triton").shape == (0, 6, 9, 64)
    assert op.MAX_WINDOW == 56
