"""FeatureSpec, the table of sizes and BackboneConfig: checked values, no torch."""

from __future__ import annotations

import pytest

from permafrost.model import BackboneConfig, BackboneError, FeatureSpec
from permafrost.model.spec import SWIN_V1_SIZES, SWINV2_SIZES


def test_feature_spec_holds_channels_and_strides() -> None:
    spec = FeatureSpec(channels=[96, 192], strides=[4, 8])
    assert spec == FeatureSpec((96, 192), (4, 8))
    assert spec.num_levels == 2
    with pytest.raises(AttributeError):
        spec.channels = (1,)


@pytest.mark.parametrize(
    ("channels", "strides", "message"),
    [
        ((96, 192), (4,), "one stride per level"),
        ((), (), "one stride per level"),
        ((96, 0), (4, 8), "at least 1"),
        ((96, 1.5), (4, 8), "integers"),
        ((96, True), (4, 8), "integers"),
        ((96, 192), (8, 8), "increase"),
        ("ab", (4, 8), "tuple of integers"),
    ],
)
def test_feature_spec_refuses_what_makes_no_sense(channels, strides, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        FeatureSpec(channels, strides)


def test_sizes_have_32_channels_per_head_and_the_usual_strides() -> None:
    for size in (*SWINV2_SIZES.values(), *SWIN_V1_SIZES.values()):
        assert size.channels == tuple(32 * heads for heads in size.num_heads)
        assert size.spec.strides == (4, 8, 16, 32)
    assert SWINV2_SIZES["swinv2_giant"].depths == (2, 2, 42, 4)
    assert SWIN_V1_SIZES["swin_large"].channels == (192, 384, 768, 1536)
    assert {size.window_size for size in SWIN_V1_SIZES.values()} == {7}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "swinv2_bse"}, "Did you mean 'swinv2_base'"),
        ({"name": "swin_bse"}, "names are swinv2_nano.*swin_large.*Did you mean 'swin_base'"),
        ({"name": "swin_tiny", "extra_norm_interval": 6}, "swin_tiny is a Swin V1, and only SwinV2 has extra norms"),
        ({"name": "timm/"}, "no name of a timm model.*vit_small_patch14_dinov2"),
        ({"name": "timm/hf-hub:some/where"}, "no name of a timm model"),
        ({"name": "timm/resnet50", "window_size": 7}, "backbone.window_size is 7, but timm/resnet50 is built as timm"),
        ({"name": "timm/resnet50", "pretrained_window_size": 7}, "backbone.pretrained_window_size is 7"),
        ({"name": "timm/resnet50", "extra_norm_interval": 6}, "backbone.extra_norm_interval is 6"),
        ({"name": "timm/resnet50", "taps": ()}, "backbone.taps is .*at least one"),
        ({"name": "timm/resnet50", "taps": (1.5,)}, "backbone.taps is .*number of a layer"),
        ({"taps": (1, 2)}, "backbone.taps is .*swinv2_nano always gives all its stages"),
        ({"weights": ""}, "give a file, a known name"),
        ({"window_size": 0}, "backbone.window_size"),
        ({"window_size": (8, 8)}, "4 of them"),
        ({"pretrained_window_size": "12"}, "backbone.pretrained_window_size"),
        ({"dtype": "bf16"}, "bfloat16"),
        ({"extra_norm_interval": -1}, "extra_norm_interval"),
    ],
)
def test_config_refuses_what_makes_no_sense(fields: dict, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        BackboneConfig(**({"name": "swinv2_nano", "weights": "random"} | fields))


def test_config_requires_weights() -> None:
    with pytest.raises(TypeError, match="weights"):
        BackboneConfig(name="swinv2_nano")


def test_config_builds_what_it_says() -> None:
    import torch

    config = BackboneConfig("swinv2_nano", "random", window_size=[6, 6, 6, 3], dtype="bfloat16", extra_norm_interval=2)
    assert config.window_size == (6, 6, 6, 3)
    backbone = config.build("cpu")
    assert backbone.network.window_size == backbone.network.pretrained_window_size == (6, 6, 6, 3)
    assert backbone.dtype == torch.bfloat16
    assert any(".enorm." in name for name, _ in backbone.named_parameters())
    assert BackboneConfig("swinv2_nano", "random").build().dtype == torch.float32
