"""Activation offload: the same gradients, and the memory that really leaves."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from permafrost.launcher.run.offload import ActivationOffload, HostBuffers, HostCopy, KeptFeatures
from permafrost.model import load_backbone

CPU = torch.device("cpu")


class Backbone:
    """Two maps from a fixed function, the second one a view of its stage's storage."""

    def __init__(self) -> None:
        self.stages: tuple[nn.Module, ...] = ()

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        return images * 2, (images.permute(0, 2, 3, 1).contiguous() + 1).permute(0, 3, 1, 2)


class SmallHead(nn.Module):
    """Saves maps, views of them, slices, the same tensor twice, integers and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(3)
        self.linear = nn.Linear(8, 5)
        self.register_buffer("scale", torch.full((1, 8, 1, 1), 0.5))

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        fine, coarse = maps
        normed = self.norm(coarse.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = torch.relu(self.conv(fine) * self.scale + self.conv(normed))
        picked = x.flatten(2).gather(2, x.flatten(2).argsort(2)[..., :7]).transpose(1, 2)
        half = x[:, :, ::2]
        return self.linear(picked).square().sum() + (half.sigmoid() * half).sum() + torch.exp(x * x * 0.01).sum()


def images(side: int = 64) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def gradients(offload: ActivationOffload, *, retain: bool = False, side: int = 64) -> list[Tensor]:
    torch.manual_seed(0)
    head = SmallHead()
    kept = offload.forward(Backbone(), images(side))
    maps = kept.take()
    with offload.saving(head, kept, maps):
        loss = head(maps)
    del maps
    if retain:
        loss.backward(retain_graph=True)
        head.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in head.parameters()]


@pytest.mark.parametrize("mode", ["features", "all"])
@pytest.mark.parametrize("num_ahead", [0, 1, 3, 100])
def test_gradients_are_bitwise_the_same(mode, num_ahead) -> None:
    expected = gradients(ActivationOffload("off", CPU))
    found = gradients(ActivationOffload(mode, CPU, num_ahead=num_ahead))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_second_backward_through_the_same_graph() -> None:
    expected = gradients(ActivationOffload("off", CPU))
    found = gradients(ActivationOffload("all", CPU), retain=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_tensor_changed_in_place_after_it_was_saved_keeps_its_saved_values() -> None:
    """Two states of one storage are two copies: the version is part of the key."""
    offload = ActivationOffload("all", CPU)
    kept = KeptFeatures((), [])
    x = torch.rand(64, 64, requires_grad=True)
    with offload.saving(nn.Identity(), kept, ()):
        y = x * 1
        first = y.detach().clone()
        a = (y * y).sum()
        with torch.no_grad():
            y.mul_(3)
        b = (y * y).sum()
    (grad,) = torch.autograd.grad(a + b, x)
    torch.testing.assert_close(grad, 2 * first + 2 * 3 * first)


def test_parameters_and_small_tensors_stay_and_most_leaves() -> None:
    offload = ActivationOffload("all", CPU)
    gradients(offload)
    counted = offload.take_statistics()
    assert 0.9 < counted.offloaded_bytes / counted.saved_bytes <= 1.0
    assert offload.take_statistics().saved_bytes == 0
    torch.manual_seed(0)
    head = nn.Linear(4096, 64, bias=False)
    kept = KeptFeatures((), [])
    with offload.saving(head, kept, ()):
        head(torch.rand(1, 4096, requires_grad=True)).sum().backward()
    assert offload.take_statistics().offloaded_bytes == 4096 * 4, "the input, not the weight of a megabyte"


def test_features_mode_moves_the_maps_and_their_views_only() -> None:
    offload = ActivationOffload("features", CPU)
    gradients(offload)
    counted = offload.take_statistics()
    assert counted.offloaded_bytes == 2 * images().nbytes
    assert counted.saved_bytes > counted.offloaded_bytes


def test_buffers_are_used_again() -> None:
    offload = ActivationOffload("all", CPU)
    gradients(offload)
    gc.collect()
    after_one = offload.buffers.held_bytes
    for _ in range(3):
        gradients(offload)
        gc.collect()
    assert offload.buffers.held_bytes == after_one > 0


@pytest.mark.parametrize("pinned", [False, True])
def test_host_memory_is_flat_when_every_step_has_sizes_of_its_own(pinned, monkeypatch) -> None:
    """Mask heads save as many regions as are positive, another number in every step."""
    monkeypatch.setattr(HostBuffers, "_allocate", lambda self, size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: None, raising=False)
    buffers, random, held = HostBuffers(pinned), torch.Generator().manual_seed(0), []
    most = needed = 0
    for step in range(120):
        positives = int(torch.randint(20, 512, (), generator=random))
        wanted = [positives * 256 * side * side * 4 // 16 for side in (14, 14, 14, 14, 28)] + [3_000_000]
        needed = max(needed, sum(wanted)) if step < 20 else needed
        taken = [buffers.take(num_bytes) for num_bytes in wanted]
        most = max(most, sum(buffer.numel() for buffer in taken))
        for buffer in reversed(taken):
            buffers.give_back(buffer, None)
        held.append(buffers.held_bytes)
        assert held[-1] == sum(entry[0] for entry in buffers._free) <= 1.25 * most
    assert max(held) <= (3 if pinned else 1.5) * needed, "of the most that a step of the first 20 needs"


def test_size_classes_waste_little_and_pinned_ones_are_powers_of_two() -> None:
    for num_bytes in (1, 65536, 65537, 100_000, 5_000_001, 2**30, 2**30 + 1):
        size = HostBuffers(pinned=False).size_of(num_bytes)
        assert num_bytes <= size <= max(65536, num_bytes * 1.13)
        pinned = HostBuffers(pinned=True).size_of(num_bytes)
        assert num_bytes <= pinned < max(65537, 2 * num_bytes)
        assert pinned & (pinned - 1) == 0


def test_what_was_idle_longest_goes_first_and_a_larger_free_buffer_serves() -> None:
    buffers = HostBuffers(pinned=False)
    small, large = buffers.take(2**20), buffers.take(2**24)
    buffers.give_back(small, None)
    buffers.give_back(large, None)
    assert buffers.take(2**20 - 2**17) is small
    assert buffers.take(2**24 - 2**21) is large
    buffers.give_back(large, None)
    buffers.give_back(small, None)
    assert buffers.held_bytes == 2**20 + 2**24
    buffers.take(2**25)
    assert buffers.held_bytes == 2**25 + 2**20, "the large one was idle longest"


def test_copies_die_with_their_graph_nodes() -> None:
    buffers = HostBuffers(pinned=False)
    values = torch.rand(100, 100)
    copy = HostCopy(values.untyped_storage(), buffers, None)
    values_then = values.clone()
    values.zero_()
    fetched = torch.empty(0).set_(copy.fetch(), 0, (100, 100))
    assert torch.equal(fetched, values_then)
    again = copy.fetch()
    assert again.data_ptr() == fetched.data_ptr(), "it is on the device already"
    assert not buffers._free
    del copy
    assert [entry[0] for entry in buffers._free] == [65536]
    assert torch.equal(fetched, values_then)
    assert buffers.take(30_000).numel() == 65536
    assert buffers.held_bytes == 65536


def test_stage_outputs_of_a_swin_leave_as_they_are_produced() -> None:
    backbone = load_backbone("swinv2_nano", weights="random", dtype=torch.float32)
    pictures = (images(96) * 255).to(torch.uint8)
    expected = backbone(pictures)
    offload = ActivationOffload("features", CPU)
    made = []
    copy = offload._copy
    offload._copy = lambda tensor: made.append(tensor) or copy(tensor)
    kept = offload.forward(backbone, pictures)
    assert len(made) == 4, "one copy a stage, none again for its map"
    assert all(tensor.ndim == 4 and tensor.shape[-1] in (32, 64, 128, 256) for tensor in made)
    for found, other in zip(kept.take(), expected, strict=True):
        assert torch.equal(found, other)
        assert found.stride() == other.stride()
    assert not any(stage._forward_hooks for stage in backbone.stages)


def test_nothing_of_the_maps_stays_on_the_device_between_uses() -> None:
    offload = ActivationOffload("all", CPU)
    backbone = Backbone()
    kept = offload.forward(backbone, images())
    first = kept.take()
    reference = first[0].untyped_storage().data_ptr()
    again = kept.take()
    assert again[0].untyped_storage().data_ptr() == reference, "shared while somebody has them"
    del first, again
    gc.collect()
    assert all(view.copy._returned.expired() for view in kept.views)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_memory_leaves_and_the_gradients_stay() -> None:
    """A deep chain of saved maps: with offload the device holds a few of them instead of all."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    head = nn.Sequential(*(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GELU()) for _ in range(12))).to(device)
    maps = (torch.rand(4, 16, 256, 256, device=device),)

    def step(mode) -> tuple[list[Tensor], int]:
        offload = ActivationOffload(mode, device, num_ahead=2)
        head.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with offload.saving(head, KeptFeatures((), []), ()):
            loss = head(maps[0]).square().mean()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        loss.backward()
        torch.cuda.synchronize()
        return [parameter.grad.clone() for parameter in head.parameters()], held

    torch.backends.cudnn.deterministic = True
    for _ in range(3):
        expected, everything = step("off")
        found, little = step("all")
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    map_bytes = maps[0].nbytes
    assert everything - little > 20 * map_bytes
