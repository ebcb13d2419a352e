"""A detection data set's configuration refuses what cannot work, and says where its files are."""

from __future__ import annotations

import pytest

from permafrost.data import CocoDataConfig, DataError, ShapesDataConfig


@pytest.mark.parametrize(("field", "value"), [("image_size", 8), ("max_val_images", 0), ("corrupt_share", 1.5)])
def test_impossible_fields_are_named(field, value) -> None:
    with pytest.raises(DataError, match=f"data.{field}"):
        CocoDataConfig(**{field: value})


def test_paths_follow_the_fields() -> None:
    config = CocoDataConfig(root="~/x", val_images="elsewhere")
    assert config.paths("val")[1].name == "elsewhere"
    assert "~" not in str(config.paths("train")[0])
    assert ShapesDataConfig().root == ""
