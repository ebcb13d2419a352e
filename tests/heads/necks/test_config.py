"""Configurations of necks: errors that name field and remedy."""

from __future__ import annotations

import pytest

from permafrost.heads.errors import HeadError
from permafrost.heads.necks.config import BiFPNConfig, FPNConfig, ResidualFPNConfig, SimplePyramidConfig

BAD = [
    (FPNConfig, {"channels": 0}, "neck.channels is 0"),
    (FPNConfig, {"num_extra_levels": -1}, "neck.num_extra_levels is -1"),
    (ResidualFPNConfig, {"num_blocks": 0}, "neck.num_blocks is 0"),
    (BiFPNConfig, {"num_layers": 0}, "neck.num_layers is 0"),
    (BiFPNConfig, {"channels": 0}, "neck.channels is 0"),
    (BiFPNConfig, {"finest_stride": 0}, "neck.finest_stride is 0"),
    (SimplePyramidConfig, {"channels": 0}, "neck.channels is 0"),
    (SimplePyramidConfig, {"num_extra_levels": -1}, "neck.num_extra_levels is -1"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), BAD, ids=[f"{k.__name__}-{m[:24]}" for k, _, m in BAD])
def test_impossible_values_name_the_field(kind, fields, message) -> None:
    with pytest.raises(HeadError, match=message):
        kind(**fields)
