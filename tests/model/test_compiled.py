"""torch.compile of the frozen forward: the same maps, at every size, and what it does not take."""

from __future__ import annotations

import copy

import pytest
import torch

from permafrost.launcher.errors import RecipeError
from permafrost.launcher.experiment import MeshConfig
from permafrost.launcher.run.offload import ActivationOffload
from permafrost.model import BackboneConfig, BackboneError, FrozenBackbone, compiled
from permafrost.model.spec import SwinV2Size
from permafrost.model.swin.v2 import SwinV2
from permafrost.model.swin.weights import draw_weights

# The maps of the first are no larger than a window; of the second they have shifted windows, and padding.
SIZES = ((1, 8, 8), pytest.param((1, 36, 40), marks=pytest.mark.slow))
SIZE = SIZES[0]
CONFIG = BackboneConfig("swinv2_nano", "random")


def images(batch: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def build(dtype: torch.dtype = torch.float32) -> FrozenBackbone:
    """Smaller than any of the table, as compiling takes seconds a block; the weights are the same each time."""
    network = SwinV2(SwinV2Size(32, (2, 1, 1, 1), (1, 2, 2, 4)), window_size=4)
    network.load_state_dict(dict(draw_weights(network, seed=0)))
    return FrozenBackbone(network.to(dtype), CONFIG, mean=(0.5,) * 3, std=(0.25,) * 3, fingerprint="", choices={})


@pytest.fixture(scope="module")
def eager() -> FrozenBackbone:
    return build()


@pytest.fixture(scope="module")
def backbone() -> FrozenBackbone:
    made = build()
    made.compile_forward()
    return made


@pytest.mark.parametrize("size", SIZES)
def test_maps_are_those_of_the_network_as_it_is(backbone, eager, size, relative_error) -> None:
    for found, expected in zip(backbone(images(*size)), eager(images(*size)), strict=True):
        assert found.shape == expected.shape
        assert found.stride() == expected.stride()
        assert not found.requires_grad
        assert not found.is_inference()
        assert relative_error(found, expected) < 1e-5


def test_a_size_is_compiled_once_and_nothing_else_changes(backbone, eager, monkeypatch) -> None:
    from torch._dynamo.utils import counters

    backbone(images(*SIZE))
    counters.clear()
    with torch.autocast("cpu", torch.bfloat16):
        maps = backbone(images(*SIZE))
    assert all(one.dtype == torch.float32 for one in maps)
    assert counters["frames"]["total"] == 0, "compiled again"
    assert backbone.checksum() == eager.checksum()
    assert backbone.state_dict().keys() == eager.state_dict().keys()
    assert "compile" not in eager.describe()
    assert backbone.describe()["compile"].startswith("torch.compile")

    monkeypatch.setattr(compiled, "MAX_COMPILED_SIZES", len(backbone._compiled._sizes))
    with pytest.warns(UserWarning, match=r"sizes of images have been compiled; others, like \(3, 3, 16, 16\)"):
        few = backbone(images(3, 16, 16))
    assert torch.equal(few[0], eager(images(3, 16, 16))[0])
    backbone(images(4, 16, 16))  # Says it once.


def test_offload_takes_the_maps_at_the_end(backbone, eager) -> None:
    batch = images(*SIZE)
    assert not backbone.stages
    kept = ActivationOffload("features", torch.device("cpu")).forward(backbone, batch)
    for one, other in zip(kept.take(), backbone(batch), strict=True):
        assert torch.equal(one, other)


def test_a_copy_is_compiled_for_itself(backbone) -> None:
    other = copy.deepcopy(backbone)
    assert other._compiled is not None
    assert other._compiled._network is other.network


def test_what_cannot_be_compiled_is_told_by_name(monkeypatch) -> None:
    backbone = build()
    backbone.compile_forward()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    told = r"torch.compile failed on the backbone for images of \(1, 3, 4, 4\) on cpu: .*C\+\+"
    options = {"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}
    with torch._inductor.config.patch(options), pytest.raises(BackboneError, match=told):
        backbone(images(1, 4, 4))


def test_a_backbone_that_learns_or_is_split_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"backbone.compile is True, but backbone.frozen is False"):
        BackboneConfig("swinv2_nano", "random", compile=True, frozen=False)
    from permafrost.configs.quickstart import quickstart

    experiment = quickstart()
    experiment.backbone.compile, experiment.mesh = True, MeshConfig(tensor=2)
    with pytest.raises(RecipeError, match=r"backbone.compile is True and mesh.tensor is 2: .* is not compiled"):
        experiment.__post_init__()


@pytest.mark.slow
def test_bfloat16_is_as_precise_as_without(relative_error) -> None:
    precise, plain, fast = build(torch.float64), build(torch.bfloat16), build(torch.bfloat16)
    fast.compile_forward()
    batch = images(*SIZE)
    for one, other, expected in zip(fast(batch), plain(batch), precise(batch), strict=True):
        assert one.dtype == torch.bfloat16
        assert relative_error(one, expected) < 1.5 * relative_error(other, expected)
