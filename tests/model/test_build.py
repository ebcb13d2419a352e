"""From a config to a network: every option arrives where it acts, whichever network is built, and by whichever door."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from permafrost.launcher.plan.backbone import plan_backbone, settle_windows
from permafrost.launcher.plan.fine_tune import build_trained
from permafrost.model import BackboneConfig, BackboneError, SwinV2, build_backbone, load_backbone, save_weights
from permafrost.model.timm.backbone import TimmNetwork
from permafrost.model.trainable import TrainableBackbone


def test_a_config_builds_what_it_says() -> None:
    config = BackboneConfig("swinv2_nano", "random", window_size=[6, 6, 6, 3], dtype="bfloat16", extra_norm_interval=2)
    assert config.window_size == (6, 6, 6, 3)
    backbone = build_backbone(config, "cpu")
    assert backbone.network.window_size == backbone.network.pretrained_window_size == (6, 6, 6, 3)
    assert backbone.dtype == torch.bfloat16
    assert any(".enorm." in name for name, _ in backbone.named_parameters())
    assert build_backbone(BackboneConfig("swinv2_nano", "random")).dtype == torch.float32


def test_both_doors_build_the_same(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(SwinV2("swinv2_nano", window_size=6), path, {})
    one = load_backbone("swinv2_nano", weights=path, dtype=torch.bfloat16, max_images=2)
    config = BackboneConfig("swinv2_nano", str(path), dtype="bfloat16", max_images=2)
    assert one.describe() == build_backbone(config).describe()
    assert one.max_images == 2
    assert load_backbone("swinv2_nano", weights="random", dtype=None).dtype == torch.float32
    assert isinstance(load_backbone("swinv2_nano", weights="random", frozen=False), TrainableBackbone)
    with pytest.raises(BackboneError, match="no option 'residual': did you mean residual_norm"):
        load_backbone("swinv2_nano", weights="random", residual="torch")


@dataclass
class Scaled(BackboneConfig):
    """An option more."""

    layer_scale: float = 1.0


def test_an_option_more_arrives_where_it_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing between the config and the network has to know it: its field, and where it acts, are all there is to write."""
    seen = []

    def note(self: object, config: Scaled, **_: object) -> dict:
        seen.append(config.layer_scale)
        return {}

    monkeypatch.setattr(SwinV2, "choose_kernels", note)
    for kind in (SwinV2, TimmNetwork):
        monkeypatch.setattr(kind, "set_training", note)
    path = tmp_path / "weights.safetensors"
    save_weights(SwinV2("swinv2_nano"), path, {})
    for weights in ("random", str(path)):
        build_backbone(Scaled("swinv2_nano", weights, layer_scale=0.5))
        build_backbone(Scaled("swinv2_nano", weights, layer_scale=0.25, frozen=False))
    build_backbone(Scaled("timm/resnet10t", "random", layer_scale=0.125, frozen=False))
    config, _ = settle_windows(Scaled("swinv2_nano", str(path), layer_scale=2.0, frozen=False))
    build_trained(config)
    # Once for the kernels; a network that learns also for its training.
    assert seen == [0.5, 0.25, 0.25, 0.5, 0.25, 0.25, 0.125, 2.0]
    frozen, _ = settle_windows(Scaled("swinv2_nano", str(path), max_images=1))
    plan_backbone(frozen, dtype=torch.float32, tensor=1, images=(2, 3, 32, 32))
    assert frozen.window_size == (8, 8, 8, 8)
