"""Runs Triton kernels in Triton's interpreter: a JSON line with a case in, a JSON line with its outcome out.

TRITON_INTERPRET is read when Triton is imported, so this is a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from cases import Case, relative_error
from deformable_cases import DeformableCase
from functorch.compile import make_boxed_func
from norm_cases import NormCase
from torch._functorch.aot_autograd import aot_module_simplified

from permafrost.model import BackboneConfig
from permafrost.model.kernels import residual_norm as norm_ops, window_attention as window_ops
from permafrost.model.kernels.residual_norm import residual_norm
from permafrost.model.kernels.window_attention import window_attention
from permafrost.model.kernels.window_attention.triton import window_attention_triton
from permafrost.model.spec import SwinV1Size, SwinV2Size
from permafrost.model.swin.v1 import SwinV1
from permafrost.model.swin.v2 import SwinV2
from permafrost.model.swin.weights import draw_weights


def window_attention_case(**fields) -> dict[str, float]:
    case = Case(**fields)
    found = window_attention(*case.tensors(), **case.keywords, kernel="triton")
    return {"error": relative_error(found, case.expected()), "tolerance": case.tolerance()}


def far_images(**fields) -> dict[str, float]:
    """Two images further apart than 32 bits reach; the memory between them is never touched."""
    case = Case(**fields, batch=2)
    qkv, bias, scale, table = case.tensors()
    far = 2**31 + 4096
    spread = []
    for shape in (qkv.shape, (*qkv.shape[:3], qkv.shape[3] // 3)):
        size = shape[1] * shape[2] * shape[3]
        memory = torch.empty(far + size, dtype=qkv.dtype)
        spread.append(memory.as_strided(shape, (far, shape[2] * shape[3], shape[3], 1)))
    spread[0].copy_(qkv)
    spread[1].fill_(float("nan"))
    window_attention_triton(spread[0], bias, scale, table, spread[1], **case.keywords)
    return {"error": relative_error(spread[1], case.expected()), "tolerance": case.tolerance()}


def deformable_case(**fields) -> dict[str, list[float]]:
    """Errors of output and gradients against float64, of the kernel and of the reference in the same dtype."""
    case = DeformableCase(**fields)
    exact = case.gradients("reference", torch.float64)
    return {
        kernel: [relative_error(found, expected) for found, expected in zip(case.gradients(kernel), exact)]
        for kernel in ("triton", "reference")
    }


@torch.no_grad()
def residual_norm_case(**fields) -> dict[str, float]:
    case = NormCase(**fields)
    found = residual_norm(*case.tensors(), kernel="triton")
    theirs = case.in_pytorch()
    return {"error": relative_error(found, case.expected()), "tolerance": 2 * relative_error(theirs, case.expected())}


@torch.no_grad()
def ops() -> dict[str, Any]:
    """Both ops as torch.compile sees them: one graph, the same bits; and PyTorch's own checks of an op."""
    case = Case(4, 2, 6, 9)
    tensors = case.tensors()
    norm_tensors = NormCase((2, 3, 32), has_extra=True).tensors()

    def both(qkv, bias, scale, table, x, y) -> tuple[torch.Tensor, torch.Tensor]:
        attended = window_attention(qkv, bias, scale, table, **case.keywords, kernel="triton")
        return attended * 2, residual_norm(x, y, *norm_tensors[2:], kernel="triton") + 1

    found, graphs = [], []

    def backend(graph, inputs) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return aot_module_simplified(graph, inputs, lambda inner, _: make_boxed_func(inner.forward))

    for call in (both, torch.compile(both, fullgraph=True, backend=backend)):
        found.append(call(*tensors, *norm_tensors[:2]))
    norms = [one for norm in norm_tensors[2:] for one in (norm.weight, norm.bias, norm.eps)]
    torch.library.opcheck(window_ops._window_attention, (*tensors, 4, 2, True, "triton"))
    torch.library.opcheck(norm_ops._residual_norm, (*norm_tensors[:2], *norms))
    return {
        "equal": [torch.equal(one, other) for one, other in zip(*found)],
        "graphs": graphs,
    }


@torch.no_grad()
def network(version: int) -> dict[str, Any]:
    """Errors of every map of a network that attends by Triton, against PyTorch's own operators; smaller than any of the table."""
    extra = {"extra_norm_interval": 2} if version == 2 else {}
    build, size = ((SwinV1, SwinV1Size), (SwinV2, SwinV2Size))[version - 1]
    swin = build(size(32, (2, 1, 1, 1), (1, 2, 4, 8), **extra), window_size=(5, 3, 2, 2))
    swin.load_state_dict(dict(draw_weights(swin, seed=0)))
    x = torch.randn(1, 3, 33, 42, generator=torch.Generator().manual_seed(0))
    expected = swin(x)
    swin.fold()
    name, kernels = (("swin_tiny", {}), ("swinv2_nano", {"residual_norm": "triton"}))[version - 1]
    swin.choose_kernels(BackboneConfig(name, "random", attention="triton", **kernels), dtype=torch.float32)
    errors = [relative_error(*pair) for pair in zip(swin(x), expected, strict=True)]
    return {"errors": errors, **{key: swin.describe().get(key) for key in ("attention", "residual_norm")}}


JOBS = {
    one.__name__: one for one in (window_attention_case, far_images, deformable_case, residual_norm_case, ops, network)
}

if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        # Fills what torch.empty gives with NaN, except where a test needs memory that is never touched.
        torch.use_deterministic_algorithms(request["job"] != "far_images")
        print(json.dumps(JOBS[request["job"]](**request["fields"])), flush=True)
