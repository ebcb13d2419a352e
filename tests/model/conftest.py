"""Helpers of the model tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from permafrost.model.swin.v2 import SwinV2Classifier


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Gives every parameter a value of its own: norms start at zero, which would hide whole branches."""

    @torch.no_grad()
    def fill(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in module.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("logit_scale"):
                # Some heads lie beyond the clamp at ln 100 = 4.6.
                parameter.uniform_(1.0, 5.0, generator=generator)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.2, generator=generator)
            else:
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, fan_in**-0.5, generator=generator)
        return module

    return fill


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Relative L2 error of the first against the second."""

    def error(found: Tensor, expected: Tensor) -> float:
        found, expected = found.detach().double(), expected.detach().double()
        return float((found - expected).norm() / expected.norm())

    return error


def official_buffers(depths: tuple[int, ...], windows: tuple[int, ...], pretrained: tuple[int, ...]) -> dict[str, Any]:
    """The buffers that an official checkpoint carries beside the weights, from their published definition."""
    buffers = {}
    for stage, (depth, window, trained) in enumerate(zip(depths, windows, pretrained, strict=True)):
        offset = np.arange(-(window - 1), window, dtype=np.float32)
        divisor = trained - 1 if trained > 0 else window - 1
        scaled = 8.0 * np.stack(np.meshgrid(offset, offset, indexing="ij"), axis=-1) / divisor
        table = np.sign(scaled) * np.log2(np.abs(scaled) + 1.0) / np.log2(8)
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            buffers[f"{name}.attn.relative_coords_table"] = torch.from_numpy(table)[None].float()
            buffers[f"{name}.attn.relative_position_index"] = torch.zeros(window**2, window**2, dtype=torch.int64)
            if block % 2:
                buffers[f"{name}.attn_mask"] = torch.zeros(4, window**2, window**2)
    return buffers


@pytest.fixture
def official_file(tmp_path: Path, randomise: Callable[[nn.Module], nn.Module]) -> Callable[..., Path]:
    """Writes a nano classification checkpoint as the official training code would."""

    def write(
        windows: tuple[int, ...] = (12, 12, 12, 6),
        pretrained: tuple[int, ...] = (0, 0, 0, 0),
        change: Callable[[dict[str, Tensor]], None] = lambda state: None,
    ) -> Path:
        model = randomise(SwinV2Classifier("swinv2_nano", num_classes=10))
        state = dict(model.state_dict()) | official_buffers(model.size.depths, windows, pretrained)
        change(state)
        path = tmp_path / "swinv2_nano_official.pth"
        torch.save({"model": state}, path)
        return path

    return write


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a job of interpreter_worker.py and gives its outcome: Triton's interpreter needs a process of its own."""
    messages = tmp_path_factory.mktemp("interpreter") / "stderr"
    with messages.open("w") as stderr:
        worker = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "kernels" / "interpreter_worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"TRITON_INTERPRET": "1"},
        )

    def run(job: str, **fields: Any) -> dict[str, Any]:
        if worker.poll() is None:
            worker.stdin.write(json.dumps({"job": job, "fields": fields}) + "\n")
            worker.stdin.flush()
        answer = worker.stdout.readline()
        assert answer, f"The interpreter ended: {messages.read_text()[-4000:]}"
        return json.loads(answer)

    yield run
    worker.stdin.close()
    worker.stdout.close()
    worker.wait(timeout=60)
