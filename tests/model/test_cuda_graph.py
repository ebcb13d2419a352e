"""backbone.cuda_graph where there is no GPU, and its bookkeeping; that it gives the same maps is shown in test_on_a_gpu.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from permafrost.launcher.cli import main
from permafrost.launcher.errors import RecipeError
from permafrost.launcher.experiment import MeshConfig
from permafrost.model import BackboneConfig, BackboneError, build_backbone, load_backbone
from permafrost.model.cuda_graph import CapturedNetwork

RECIPE = f"{Path(__file__).parents[1] / 'launcher' / 'tiny_recipe.py'}:tiny"
TOLD = r"backbone\.cuda_graph is True, but the backbone is on cpu: only GPUs have graphs; set it to False"


def test_without_a_gpu_it_is_an_error(tmp_path: Path, capsys) -> None:
    with pytest.raises(BackboneError, match=TOLD):
        build_backbone(BackboneConfig("swinv2_nano", "random", cuda_graph=True), "cpu")
    backbone = load_backbone("swinv2_nano", weights="random")
    with pytest.raises(BackboneError, match=TOLD):
        backbone.capture_forward()
    assert "cuda_graph" not in backbone.describe()
    assert len(backbone.stages) == 4
    with pytest.raises(BackboneError, match=TOLD):
        CapturedNetwork(backbone.network)(torch.zeros(1, 3, 8, 8))
    assert main(["train", RECIPE, "--output", str(tmp_path / "run"), "--backbone.cuda-graph", "True"]) == 2
    assert "backbone.cuda_graph is True, but the backbone is on cpu" in capsys.readouterr().err


def test_combinations_that_cannot_be_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"backbone\.cuda_graph is True, but backbone\.frozen is False"):
        BackboneConfig("swinv2_nano", "random", cuda_graph=True, frozen=False)
    from permafrost.configs.quickstart import quickstart

    experiment = quickstart()
    experiment.backbone.cuda_graph, experiment.mesh = True, MeshConfig(tensor=2)
    with pytest.raises(RecipeError, match=r"backbone\.cuda_graph is True and mesh\.tensor is 2: .* not captured"):
        experiment.__post_init__()
