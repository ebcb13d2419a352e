"""The packages' fronts: what editors are shown is what is there, and every configuration is among it."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from importlib import import_module
from pathlib import Path

import pytest

PACKAGES = ("data", "heads", "launcher", "model")


def shown(front: str) -> dict[str, str]:
    """Return name -> module of what a front's TYPE_CHECKING block imports."""
    tree = ast.parse(Path(import_module(front).__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    assert all(isinstance(node, ast.ImportFrom) for node in block.body), front
    aliases = [(node.module, alias) for node in block.body for alias in node.names]
    # `X as X` (PEP 484) is how a type checker tells what is public from what is only used.
    assert not [alias.name for _, alias in aliases if alias.asname is None]
    return {alias.asname: module for module, alias in aliases}


@pytest.mark.parametrize("front", ["permafrost", *(f"permafrost.{package}" for package in PACKAGES)])
def test_a_front_has_what_it_shows_and_nothing_else(front: str) -> None:
    package, names = import_module(front), shown(front)
    assert sorted(package.__all__) == sorted({*names, *(["__version__"] if front == "permafrost" else [])})
    assert names.keys() <= set(dir(package))
    for name, module in names.items():
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__ == module, f"{front} shows {name} from {module}, where it is only imported"
            assert front == "permafrost" or value.__name__ == name
    with pytest.raises(AttributeError, match=f"module '{front}' has no attribute 'Nothing'"):
        _ = package.Nothing


@pytest.mark.parametrize("package", PACKAGES)
def test_every_configuration_is_on_its_front(package: str) -> None:
    front = import_module(f"permafrost.{package}")
    modules = [module.name for module in pkgutil.walk_packages(front.__path__, f"permafrost.{package}.")]
    wanted = {
        name
        for module in modules
        if module.endswith((".config", "permafrost.launcher.experiment"))
        for name, value in vars(import_module(module)).items()
        if name.endswith(("Config", "Experiment", "World")) and getattr(value, "__module__", "") == module
    }
    assert wanted
    assert wanted <= set(front.__all__)
