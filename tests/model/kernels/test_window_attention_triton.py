"""The Triton kernel of window attention: computed in Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest
from compiled_kernels import compile_triton, resource_usage

CASES = {
    "one tile": {"window": 8, "shift": 4, "height": 16, "width": 16},
    "not shifted": {"window": 8, "shift": 0, "height": 16, "width": 8},
    "map smaller than a window": {"window": 8, "shift": 0, "height": 5, "width": 11},
    "odd window": {"window": 7, "shift": 3, "height": 9, "width": 17, "batch": 2},
    "tokens that fill no tile": {"window": 12, "shift": 6, "height": 13, "width": 24, "num_heads": 1},
    "several tiles": {"window": 16, "shift": 8, "height": 17, "width": 30, "num_heads": 1},
    "largest tiled": {"window": 24, "shift": 0, "height": 20, "width": 24, "num_heads": 1},
    "V1": {"window": 7, "shift": 3, "height": 11, "width": 8, "cosine": False},
    "64 dims per head": {"window": 8, "shift": 4, "height": 9, "width": 13, "head_dim": 64},
    "tiny window": {"window": 2, "shift": 1, "height": 3, "width": 5},
    "logits of a large range": {"window": 8, "shift": 4, "height": 12, "width": 12, "max_scale": 100.0},
    "half precision": {"window": 8, "shift": 4, "height": 11, "width": 16, "dtype": "float16"},
    "half precision, odd window": {"window": 7, "shift": 3, "height": 8, "width": 15, "dtype": "float16"},
    "half precision, 12": {"window": 12, "shift": 6, "height": 15, "width": 13, "dtype": "float16", "num_heads": 1},
    "half precision, 16": {"window": 16, "shift": 8, "height": 33, "width": 17, "dtype": "float16", "num_heads": 1},
    "half precision, 24": {"window": 24, "shift": 12, "height": 25, "width": 30, "dtype": "float16", "num_heads": 1},
    "half precision, V1": {"window": 8, "shift": 4, "height": 9, "width": 9, "dtype": "float16", "cosine": False},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_equals_the_reference(interpreter, fields) -> None:
    outcome = interpreter("window_attention_case", **fields)
    assert outcome["error"] <= outcome["tolerance"]
    assert outcome["tolerance"] < (3e-6 if fields.get("dtype", "float32") == "float32" else 5e-3)


@pytest.mark.slow
def test_equals_the_reference_at_a_window_of_40(interpreter) -> None:
    outcome = interpreter(
        "window_attention_case", window=40, shift=0, height=37, width=40, dtype="float16", num_heads=1
    )
    assert outcome["error"] <= outcome["tolerance"]


def test_torch_compile_sees_the_ops_as_a_whole(interpreter) -> None:
    outcome = interpreter("ops")
    assert outcome["equal"] == [True, True]
    (graph,) = outcome["graphs"]
    assert "permafrost.window_attention.default" in graph
    assert "permafrost.residual_norm.default" in graph


def test_offsets_beyond_32_bits(interpreter) -> None:
    outcome = interpreter("far_images", window=4, shift=2, height=5, width=8, dtype="float16", num_heads=1)
    assert outcome["error"] <= outcome["tolerance"]


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("window", [8, 12, 16])
def test_compiles_without_spills(tmp_path: Path, architecture: int, window: int) -> None:
    check_compiles(tmp_path, architecture, window, "bfloat16", 32)


@pytest.mark.parametrize(
    ("window", "dtype", "head_dim"),
    [(24, "bfloat16", 32), (16, "float16", 64), (8, "float32", 32), (56, "float16", 32)],
)
def test_other_sizes_compile_without_spills(tmp_path: Path, window: int, dtype: str, head_dim: int) -> None:
    check_compiles(tmp_path, 90, window, dtype, head_dim)


def check_compiles(folder: Path, architecture: int, window: int, dtype: str, head_dim: int) -> None:
    from permafrost.model.kernels.window_attention.triton import launch_options, window_attention_fwd_kernel

    name = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    types = dict.fromkeys(("qkv", "qkv_bias", "out"), f"*{name}") | dict.fromkeys(("scale", "table"), "*fp32")
    types |= dict.fromkeys(("height", "width", "down", "across", "shift"), "i32")
    types |= dict.fromkeys(("qkv_image_stride", "out_image_stride"), "i64")
    constants = launch_options(64, head_dim, window, cosine=True, dtype=dtype)
    usage = resource_usage(compile_triton(window_attention_fwd_kernel, types, constants, architecture), folder)
    assert usage["REG"] > 16
    assert usage["STACK"] == usage["LOCAL"] == 0
