"""backbone.fp8 and the quickstart's AP, on a GPU: a head trained on bfloat16 features finds as much on quantised ones.

pytest -m gpu tests/launcher/test_fp8_on_a_gpu.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from permafrost.launcher.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs compute capability 9.0"
    ),
]


def scores(run: Path) -> dict[str, float]:
    assert main(["evaluate", str(run), "--device", "cuda"]) == 0
    return json.loads((run / "evaluation.json").read_text())["metrics"]["detection"]


def test_the_quickstarts_ap_changes_by_at_most_half_a_point(tmp_path: Path) -> None:
    run, quantised = tmp_path / "run", tmp_path / "quantised"
    assert main(["train", "quickstart", "--output", str(run), "--device", "cuda"]) == 0
    shutil.copytree(run, quantised)
    recipe = json.loads((quantised / "recipe.json").read_text())
    recipe["backbone"]["fp8"] = True
    (quantised / "recipe.json").write_text(json.dumps(recipe))
    before, after = scores(run), scores(quantised)
    assert before["bbox/AP"] > 0.3
    for kind in ("bbox/AP", "segm/AP"):
        assert abs(after[kind] - before[kind]) <= 0.005
