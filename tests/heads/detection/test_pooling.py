"""RoIAlign over levels and mask targets, against torchvision's own and against direct sums."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import MultiScaleRoIAlign, roi_align

from permafrost.heads.detection import pooling
from permafrost.heads.detection.config import PoolingConfig
from permafrost.heads.detection.pooling import RegionPooling, project_masks

STRIDES = (4, 8, 16, 32)


def maps(side=256, channels=3, dtype=torch.float32) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, side // s, side // s, generator=random).to(dtype) for s in STRIDES]


def boxes_of_all_sizes(per_image=12, side=256) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    result = []
    for _ in range(2):
        wh = torch.logspace(0.8, 2.4, per_image)[:, None] * (0.8 + 0.4 * torch.rand(per_image, 2, generator=random))
        wh = wh.clamp(max=side)[torch.randperm(per_image, generator=random)]
        xy = torch.rand(per_image, 2, generator=random) * (side - wh)
        result.append(torch.cat([xy, xy + wh], dim=1))
    return result


def flat(boxes) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat(boxes), torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(b) for b in boxes]))


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("canonical_size", [224.0, 96.0])
def test_equals_torchvision_multiscale_roi_align(sampling_ratio, canonical_size) -> None:
    config = PoolingConfig(sampling_ratio=sampling_ratio, canonical_size=canonical_size, aligned=False)
    ours = RegionPooling(resolution=7, strides=STRIDES, config=config)
    theirs = MultiScaleRoIAlign(list("0123"), 7, sampling_ratio, canonical_scale=int(canonical_size))
    levels, boxes = maps(), boxes_of_all_sizes()
    expected = theirs(OrderedDict(zip("0123", levels)), boxes, [(256, 256)] * 2)
    found = ours(levels, *flat(boxes))
    assert set(ours.levels(flat(boxes)[0]).tolist()) >= {0, 1, 2}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_level_by_size_and_stride() -> None:
    sides = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 5000.0])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], dim=1)

    def levels(strides) -> list[int]:
        return RegionPooling(resolution=7, strides=strides, config=PoolingConfig()).levels(boxes).tolist()

    assert levels(STRIDES) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert levels((8, 16)) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert levels((16,)) == [0] * 8


def test_aligned_pools_what_the_box_covers() -> None:
    """On a map that is linear in x and y, the mean over a bin is the value at its centre, half-pixel convention."""
    side, stride = 16, 4
    centres = (torch.arange(side) + 0.5) * stride
    level = torch.stack([centres.expand(side, side), centres[:, None].expand(side, side)])[None]
    box = torch.tensor([[10.0, 14.0, 38.0, 50.0]])
    for sampling_ratio in (0, 2):
        config = PoolingConfig(sampling_ratio=sampling_ratio)
        pool = RegionPooling(resolution=4, strides=(stride,), config=config)
        x, y = pool([level], box, torch.zeros(1, dtype=torch.int64))[0]
        torch.testing.assert_close(x[0], 10 + 28 * (torch.arange(4) + 0.5) / 4)
        torch.testing.assert_close(y[:, 0], 14 + 36 * (torch.arange(4) + 0.5) / 4)


def test_bf16_maps_keep_float32_boxes() -> None:
    """The result is that of float32 pooling of the same map, rounded once."""
    pool = RegionPooling(resolution=7, strides=STRIDES, config=PoolingConfig())
    levels = maps(dtype=torch.bfloat16)
    boxes, image_index = flat(boxes_of_all_sizes())
    found = pool(levels, boxes, image_index)
    expected = pool([x.float() for x in levels], boxes, image_index)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


def test_gradients_reach_every_level_even_without_boxes() -> None:
    pool = RegionPooling(resolution=3, strides=STRIDES, config=PoolingConfig())
    levels = [x.requires_grad_() for x in maps()]
    pooled = pool(levels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert pooled.shape == (0, 3, 3, 3)
    pooled.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in levels)


def test_broken_boxes_do_not_crash() -> None:
    pool = RegionPooling(resolution=3, strides=STRIDES, config=PoolingConfig())
    boxes = torch.tensor([[0.0, 0, 0, 0], [5, 5, 5, 9], [9, 9, 1, 1]])
    assert pool(maps(), boxes, torch.zeros(3, dtype=torch.int64)).isfinite().all()
    assert pool.levels(torch.full((1, 4), torch.nan)).tolist() == [0]


def random_masks(count=5, side=64) -> torch.Tensor:
    return torch.rand(count, side, side, generator=torch.Generator().manual_seed(3)) > 0.5


def mask_boxes(count=20, side=64) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(4)
    xy = torch.rand(count, 2, generator=random) * 40
    boxes = torch.cat([xy, xy + 2 + torch.rand(count, 2, generator=random) * 22], dim=1)
    return boxes, torch.randint(0, 5, (count,), generator=random)


@pytest.mark.parametrize("max_elements", [2**26, 64 * 64 * 2, 1])
def test_mask_targets_equal_torchvision(monkeypatch, max_elements) -> None:
    monkeypatch.setattr(pooling, "MAX_MASK_ELEMENTS", max_elements)
    masks, (boxes, gt_index) = random_masks(), mask_boxes()
    expected = project_masks_on_boxes(masks, boxes, gt_index, 28)
    assert torch.equal(project_masks(masks, boxes, gt_index, resolution=28, aligned=False), expected)


def test_mask_targets_use_only_the_masks_asked_for(monkeypatch) -> None:
    seen = []

    def recording(maps, *args, **options) -> torch.Tensor:
        seen.append(len(maps))
        return roi_align(maps, *args, **options)

    monkeypatch.setattr(pooling, "roi_align", recording)
    boxes, _ = mask_boxes(6)
    project_masks(random_masks(50), boxes, torch.tensor([7, 7, 49, 7, 0, 0]), resolution=4, aligned=True)
    assert seen == [3]


def test_mask_targets_on_whole_pixels_are_the_mask() -> None:
    masks = random_masks(1, 16)
    box = torch.tensor([[3.0, 5.0, 11.0, 13.0]])
    target = project_masks(masks, box, torch.zeros(1, dtype=torch.int64), resolution=8, aligned=True)
    torch.testing.assert_close(target[0], masks[0, 5:13, 3:11].float())


def test_no_boxes_give_no_targets() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert project_masks(random_masks(), torch.zeros(0, 4), none, resolution=8, aligned=True).shape == (0, 8, 8)
    assert project_masks(random_masks(0), torch.zeros(0, 4), none, resolution=8, aligned=True).shape == (0, 8, 8)
