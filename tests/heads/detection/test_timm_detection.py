"""One training step and one evaluation of Mask R-CNN on the maps of each family of timm backbones."""

from __future__ import annotations

import pytest
import torch

from permafrost.heads.build import build_head
from permafrost.heads.errors import HeadError
from permafrost.heads.necks.config import FPNConfig, SimplePyramidConfig
from permafrost.model import load_backbone

SINGLE = ("vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224")
SEVERAL = ("convnextv2_atto", "hiera_tiny_224", "swinv2_cr_tiny_224")


@pytest.mark.parametrize("name", SINGLE + SEVERAL)
def test_a_head_trains_on_frozen_features(name, small_config, classes, make_batch) -> None:
    backbone = load_backbone(f"timm/{name}", weights="random")
    neck = (SimplePyramidConfig if name in SINGLE else FPNConfig)(channels=16)
    config = small_config(neck=neck)
    torch.manual_seed(0)
    head = build_head(config, spec=backbone.spec, classes=classes)
    batch = make_batch((4, 2), side=96, size=(90, 96))
    batch.images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert head.neck.strides == (4, 8, 16, 32, 64)

    checksum = backbone.checksum()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        named = head(backbone(batch.images), batch)
        optimizer.zero_grad()
        sum(named.values()).backward()
        missing = [key for key, parameter in head.named_parameters() if parameter.grad is None]
        assert not missing
        optimizer.step()
        losses.append(sum(named.values()).item())
    assert losses[-1] < losses[0]
    assert backbone.checksum() == checksum
    with torch.no_grad():
        results = head.eval()(backbone(batch.images), batch)
    assert [result.size for result in results] == [(90, 96), (90, 96)]

    other = small_config(neck=(FPNConfig if name in SINGLE else SimplePyramidConfig)(channels=16))
    with pytest.raises(
        HeadError, match=r"use SimplePyramidConfig as neck" if name in SINGLE else "use FPNConfig as neck"
    ):
        build_head(other, spec=backbone.spec, classes=classes)
