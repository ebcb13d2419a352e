"""The front of the package: every configuration by name, no torch before it is needed."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest


def test_configurations_need_no_torch():
    code = (
        "import sys, permafrost.heads as heads, permafrost.heads.config\n"
        "heads.MaskRCNNConfig(), heads.HeadError\n"
        "assert 'MaskRCNN' in dir(heads)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_lazy_exports_all_resolve():
    import permafrost.heads as heads

    names = {name for name in heads.__all__ if name not in ("LossCounts", "NeckConfig")}
    assert {getattr(heads, name).__name__ for name in names} == names
    with pytest.raises(AttributeError, match="no attribute 'Mask'"):
        _ = heads.Mask


@pytest.mark.parametrize("room", ["", "necks.", "detection.", "segmentation.", "video."])
def test_names_every_configuration(room):
    import permafrost.heads as heads

    module = importlib.import_module(f"permafrost.heads.{room}config")
    own = {name for name, found in vars(module).items() if getattr(found, "__module__", "") == module.__name__}
    wanted = {name for name in own if name.endswith("Config")}
    assert wanted
    assert wanted <= set(heads.__all__)
