"""Train task heads on giant frozen vision backbones, from one CPU to many GPU nodes."""

from __future__ import annotations

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent
if __name__ != "permafrost":
    # A tool that walks packages met this folder inside itself, by the path that is added below.
    raise ImportError("permafrost is imported under its own name alone")
if all((_CHECKOUT / folder / "__init__.py").is_file() for folder in ("configs", "data", "heads", "launcher", "model")):
    # This file was found in a checkout, beside the folders of the subpackages: `permafrost.data` is its `data`. An installed
    # package has them inside, and an editable one is told of them by its finder.
    __path__.append(str(_CHECKOUT))
