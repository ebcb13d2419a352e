"""Multi-scale deformable attention: the reference against its definition, the Triton kernel against the reference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from cases import relative_error
from compiled_kernels import compile_triton, resource_usage
from deformable_cases import DeformableCase

from permafrost.model.errors import KernelError
from permafrost.model.kernels.deformable_attention import deformable_attention


def by_definition(value, sizes, locations, weights) -> torch.Tensor:
    """Point by point in Python, as Deformable DETR writes it down."""
    batch, _, heads, dims = value.shape
    out = value.new_zeros(batch, locations.shape[1], heads, dims)
    firsts = [sum(h * w for h, w in sizes[:level]) for level in range(len(sizes))]
    for b, q, a, level, point in torch.cartesian_prod(*map(torch.arange, locations.shape[:5])).tolist():
        height, width = sizes[level]
        x, y = (locations[b, q, a, level, point] * torch.tensor([width, height]) - 0.5).tolist()
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[b, q, a, level, point]
                    out[b, q, a] += share * value[b, firsts[level] + row * width + column, a]
    return out.flatten(2)


def test_reference_is_the_definition() -> None:
    case = DeformableCase(queries=5, points=3)
    value, *rest = case.tensors(torch.float64)
    found = deformable_attention(value, case.sizes, *rest, kernel="reference")
    assert relative_error(found, by_definition(value, case.sizes, *rest)) < 1e-12


def test_reference_is_what_transformers_computes() -> None:
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

    case = DeformableCase()
    value, *rest = case.tensors(torch.float64)
    found = deformable_attention(value, case.sizes, *rest, kernel="reference")
    assert relative_error(found, multi_scale_deformable_attention(value, list(case.sizes), *rest)) < 1e-12


def test_gradients_of_the_reference() -> None:
    case = DeformableCase(sizes=((2, 3), (4, 3)), queries=3, batch=1, head_dim=2, points=2)
    tensors = [one.requires_grad_() for one in case.tensors(torch.float64)]

    def call(value, locations, weights) -> torch.Tensor:
        return deformable_attention(value, case.sizes, locations, weights, kernel="reference")

    assert torch.autograd.gradcheck(call, tensors)


def test_reference_computes_in_float32() -> None:
    case = DeformableCase(dtype="bfloat16")
    value, *rest = case.tensors()
    found = deformable_attention(value, case.sizes, *rest, kernel="reference")
    exact = deformable_attention(value.double(), case.sizes, *(one.double() for one in rest), kernel="reference")
    assert found.dtype == torch.bfloat16
    assert relative_error(found, exact) < 2**-9


@pytest.mark.parametrize(
    "fields",
    [
        {"batch": 1},
        {"queries": 64, "head_dim": 32, "batch": 1, "points": 1},
        {"sizes": [[1, 1], [2, 9]], "queries": 3, "points": 1},
        {"sizes": [[5, 4]], "head_dim": 64, "points": 2},
        {"dtype": "float16", "batch": 1, "points": 2},
    ],
    ids=["three maps", "whole tiles", "few queries", "one map", "half precision"],
)
def test_triton_equals_the_reference_forward_and_backward(interpreter, fields) -> None:
    outcome = interpreter("deformable_case", **fields)
    # No worse than twice PyTorch's own error in the dtype; below the rounding of one sum both are as good.
    for found, theirs in zip(outcome["triton"], outcome["reference"], strict=True):
        assert found <= max(2 * theirs, 5e-7)
        assert found < (3e-6 if fields.get("dtype") is None else 2e-3)


@pytest.mark.parametrize(("architecture", "dtype"), [(80, "bf16"), (90, "fp32"), (90, "bf16"), (100, "fp32")])
@pytest.mark.parametrize("name", ["fwd", "bwd"])
def test_compiles_without_spills(tmp_path: Path, architecture: int, dtype: str, name: str) -> None:
    from permafrost.model.kernels.deformable_attention import triton as kernels

    kernel = getattr(kernels, f"deformable_attention_{name}_kernel")
    types = dict.fromkeys(("value", "out", "grad"), f"*{dtype}") | {"levels": "*i32"}
    types |= dict.fromkeys(("locations", "weights", "grad_value", "grad_locations", "grad_weights"), "*fp32")
    types |= dict.fromkeys(("num_queries", "num_cells"), "i32")
    usage = resource_usage(compile_triton(kernel, types, kernels.launch_options(8, 32, 3, 4), architecture), tmp_path)
    assert usage["REG"] > 16
    assert usage["STACK"] == usage["LOCAL"] == 0


def test_shapes_are_known_without_computing() -> None:
    case = DeformableCase(dtype="bfloat16")
    value, locations, weights = (one.to("meta").requires_grad_() for one in case.tensors())
    out = deformable_attention(value, case.sizes, locations, weights, kernel="triton")
    assert out.shape == (2, 37, 32)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert value.grad.shape == value.shape
    assert locations.grad.dtype == torch.float32


def test_arguments_that_do_not_go_together_are_refused() -> None:
    case = DeformableCase()
    value, locations, weights = case.tensors()
    with pytest.raises(KernelError, match="no deformable attention kernel 'cuda'"):
        deformable_attention(value, case.sizes, locations, weights, kernel="cuda")
    with pytest.raises(KernelError, match="have 12 cells, found 197"):
        deformable_attention(value, case.sizes[:1], locations[:, :, :, :1], weights[:, :, :, :1], kernel="reference")
    with pytest.raises(KernelError, match="do not go with locations"):
        deformable_attention(value, case.sizes, locations[:, :, :1], weights[:, :, :1], kernel="reference")
    with pytest.raises(KernelError, match=r"takes value \(B, S, A, D\)"):
        deformable_attention(value[0], case.sizes, locations, weights, kernel="reference")
    with pytest.raises(KernelError, match="float64 and 16; use kernel='reference'"):
        deformable_attention(value.double(), case.sizes, locations, weights, kernel="triton")
    with pytest.raises(KernelError, match="float32 and 8; use kernel='reference'"):
        deformable_attention(value[..., :8], case.sizes, locations, weights, kernel="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_triton_on_a_gpu(dtype) -> None:
    case = DeformableCase(sizes=((20, 20), (40, 40), (80, 80)), queries=8400, heads=8, head_dim=32, dtype=dtype)
    exact = case.gradients("reference", torch.float64)
    tensors = [one.cuda().requires_grad_() for one in case.tensors()]
    out = deformable_attention(tensors[0], case.sizes, *tensors[1:], kernel="triton")
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(above.to(out))
    for found, expected in zip([out, *(one.grad for one in tensors)], exact, strict=True):
        assert relative_error(found, expected) < (1e-5 if dtype == "float32" else 1e-2)
