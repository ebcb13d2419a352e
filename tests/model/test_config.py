"""BackboneConfig: what makes no sense is refused before anything is loaded."""

from __future__ import annotations

import pytest

from permafrost.model import BackboneConfig, BackboneError


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
