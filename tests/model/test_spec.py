"""FeatureSpec and the table of sizes: checked values, no torch."""

from __future__ import annotations

import pytest

from permafrost.model import BackboneError, FeatureSpec
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
