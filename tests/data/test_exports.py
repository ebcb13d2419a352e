"""Configurations import without torch; every exported name is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import permafrost.data as data
from permafrost.data.detection.config import CocoDataConfig
from permafrost.data.errors import DataError
from permafrost.data.worlds.config import ShapesDataConfig


def test_configurations_need_no_torch():
    code = (
        "import sys, permafrost.data, permafrost.data.detection.config; permafrost.data.ShapesDataConfig(); permafrost.data.DataError;"
        "heavy = {'torch', 'torchvision', 'numpy', 'pycocotools', 'PIL'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", data.__all__)
def test_exports_exist(name):
    assert getattr(data, name).__name__ == name
    assert name in dir(data)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        data.Nothing  # noqa: B018


@pytest.mark.parametrize(("field", "value"), [("image_size", 8), ("max_val_images", 0), ("corrupt_share", 1.5)])
def test_impossible_fields_are_named(field, value):
    with pytest.raises(DataError, match=f"data.{field}"):
        CocoDataConfig(**{field: value})


def test_paths_follow_the_fields():
    paths = CocoDataConfig(root="~/x", val_images="elsewhere").paths
    assert paths["val"][1].name == "elsewhere"
    assert "~" not in str(paths["train"][0])
    assert ShapesDataConfig().root == ""
