"""residual_norm: the reference, its Triton kernel in the interpreter and compiled for GPUs, and its place in the network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import relative_error
from compiled_kernels import compile_triton, resource_usage
from norm_cases import NormCase
from torch import nn

from permafrost.model import BackboneConfig, BackboneError, load_backbone
from permafrost.model.errors import KernelError
from permafrost.model.kernels.residual_norm import residual_norm

CASES = {
    "tokens that fill no program": NormCase((2, 3, 7, 96)),
    "one token": NormCase((1, 32)),
    "one program a token": NormCase((5, 2048)),
    "wide": NormCase((3, 4096), has_extra=True),
    "extra": NormCase((2, 5, 3, 192), has_extra=True),
    "half": NormCase((4, 5, 352), "float16"),
    "half, extra": NormCase((4, 5, 96), "float16", has_extra=True),
}


@pytest.mark.parametrize("has_extra", [False, True])
def test_reference_is_a_norm_and_a_sum(has_extra: bool) -> None:
    case = NormCase((2, 3, 5, 96), has_extra=has_extra)
    x, y, norm, extra = case.tensors(dtype=torch.float64)
    expected = x + nn.functional.layer_norm(y, (96,), norm.weight, norm.bias, norm.eps)
    if extra is not None:
        expected = nn.functional.layer_norm(expected, (96,), extra.weight, extra.bias, extra.eps)
    assert relative_error(case.expected(), expected) < 1e-13


def test_reference_computes_in_float32() -> None:
    case = NormCase((3, 5, 64), "bfloat16", has_extra=True)
    found = residual_norm(*case.tensors(), kernel="reference")
    assert found.dtype == torch.bfloat16
    assert relative_error(found, case.expected()) < 2**-9


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_equals_the_reference(interpreter, case: NormCase) -> None:
    outcome = interpreter("residual_norm_case", shape=case.shape, dtype=case.dtype, has_extra=case.has_extra)
    assert outcome["error"] <= outcome["tolerance"]
    assert outcome["tolerance"] < (1e-6 if case.dtype == "float32" else 2e-3)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("channels", "has_extra"), [(512, False), (2048, True), (4096, True)])
def test_compiles_without_spills(tmp_path: Path, architecture: int, channels: int, has_extra: bool) -> None:
    from permafrost.model.kernels.residual_norm.triton import launch_options, residual_norm_fwd_kernel

    constants = launch_options(channels, has_extra=has_extra)
    names = residual_norm_fwd_kernel.arg_names
    types = dict.fromkeys(names, "*bf16") | {"num_tokens": "i32", "eps": "fp32", "extra_eps": "fp32"}
    cubin = compile_triton(residual_norm_fwd_kernel, types, constants, architecture)
    usage = resource_usage(cubin, tmp_path)
    assert usage["REG"] > 16
    assert usage["STACK"] == usage["LOCAL"] == 0


@pytest.mark.parametrize("interval", [0, 2])
def test_the_reference_gives_the_same_maps(interval: int, relative_error) -> None:
    own = {"weights": "random", "window_size": 5, "extra_norm_interval": interval, "dtype": torch.float64}
    images = torch.randint(0, 256, (1, 3, 43, 61), dtype=torch.uint8)
    found = load_backbone("swinv2_nano", residual_norm="reference", **own)
    expected = load_backbone("swinv2_nano", residual_norm="torch", **own)
    assert found.describe()["residual_norm"] == "reference (as asked for)"
    for one, other in zip(found(images), expected(images), strict=True):
        assert relative_error(one, other) < 1e-12


def test_what_is_chosen_is_said_and_what_cannot_run_is_an_error() -> None:
    plain = load_backbone("swinv2_nano", weights="random")
    assert plain.describe()["residual_norm"] == "torch (kernels are for GPUs, the network is on cpu)"
    told = r"backbone\.residual_norm is 'triton', which does not run here: it runs on a GPU.* to 'torch' or 'auto'"
    with pytest.raises(KernelError, match=told):
        load_backbone("swinv2_nano", weights="random", residual_norm="triton")
    learning = load_backbone("swinv2_nano", frozen=False, weights="random", residual_norm="triton")
    assert learning.describe()["residual_norm"].startswith("torch (a gradient is wanted")
    with pytest.raises(BackboneError, match=r"residual_norm is 'torch', but swin_tiny is a Swin V1"):
        BackboneConfig("swin_tiny", "random", residual_norm="torch")
    with pytest.raises(BackboneError, match=r"residual_norm is 'cuda': give one of auto, triton, torch, reference"):
        BackboneConfig("swinv2_nano", "random", residual_norm="cuda")


def test_arguments_that_do_not_go_together_are_refused() -> None:
    x, y, norm, _ = NormCase((3, 32)).tensors()
    with pytest.raises(BackboneError, match=re.escape("A norm over (16,) does not fit (3, 32)")):
        residual_norm(x, y, nn.LayerNorm(16), kernel="reference")
    with pytest.raises(BackboneError, match="one shape and dtype"):
        residual_norm(x, y[:2], norm, kernel="reference")
    with pytest.raises(BackboneError, match="no residual norm kernel 'cuda'"):
        residual_norm(x, y, norm, kernel="cuda")
    with pytest.raises(KernelError, match=r"takes torch.float32, .* found torch.float64"):
        residual_norm(*NormCase((3, 32)).tensors(dtype=torch.float64)[:3], kernel="triton")
    with pytest.raises(KernelError, match="has no gradient"):
        residual_norm(x.requires_grad_(), y, norm, kernel="triton")


def test_shapes_are_known_without_computing() -> None:
    x, y, norm, extra = NormCase((2, 3, 5, 64), "bfloat16", has_extra=True).tensors("meta")
    found = residual_norm(x, y, norm, extra, kernel="triton")
    assert (found.shape, found.dtype, found.is_contiguous()) == ((2, 3, 5, 64), torch.bfloat16, True)
