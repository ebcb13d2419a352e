"""Let a package name what its modules define without importing them: the one style of a front here.

    if TYPE_CHECKING:
        from permafrost.model.frozen import FrozenBackbone as FrozenBackbone

    __getattr__, __dir__, __all__ = attach(__name__, __file__)

A name's module is imported when the name is first used (PEP 562), so `import permafrost.model` needs no torch. Editors, type
checkers and `attach` read the names from the same block, as Scientific Python's lazy_loader does from a stub file.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return a package's `__getattr__`, `__dir__` and `__all__`.

    Args:
        package: its `__name__`.
        file: its `__file__`, whose TYPE_CHECKING block imports the public names.
    """
    homes = _homes(Path(file).read_text(encoding="utf-8"))

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = homes[name]
        value = getattr(import_module(module), attribute)
        setattr(sys.modules[package], name, value)
        return value

    def listing() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return load, listing, sorted(homes)


def _homes(source: str) -> dict[str, tuple[str, str]]:
    """Return name -> (module, its name there) of everything that a front's TYPE_CHECKING block imports."""
    (block,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    imports = (node for node in block.body if isinstance(node, ast.ImportFrom) and node.module)
    return {alias.asname or alias.name: (str(node.module), alias.name) for node in imports for alias in node.names}
