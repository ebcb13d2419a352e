"""Train task heads on giant frozen vision backbones, from one CPU to many GPU nodes.

    import permafrost

    run = permafrost.load_run("runs/quickstart")
    for found in run.predict(["street.jpg", "harbour.jpg"]):
        print(found.names, found.scores, found.boxes)

Configurations, data sets, heads and the backbone are in permafrost.launcher, .data, .heads and .model. Nothing heavy is imported
before it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost._lazy import attach

if __name__ != "permafrost":
    # A tool that walks packages met this folder inside itself, by the path that is added below.
    raise ImportError("permafrost is imported under its own name alone")

_CHECKOUT = Path(__file__).resolve().parent.parent
if all((_CHECKOUT / folder / "__init__.py").is_file() for folder in ("configs", "data", "heads", "launcher", "model")):
    # This file was found in a checkout, beside the folders of the subpackages: `permafrost.data` is its `data`. An installed
    # package has them inside, and an editable one is told of them by its finder.
    __path__.append(str(_CHECKOUT))

if TYPE_CHECKING:
    from permafrost.launcher.evaluate import evaluate_run as evaluate
    from permafrost.launcher.run.restore import TrainedRun as TrainedRun, load_run as load_run
    from permafrost.launcher.train import train as train
    from permafrost.model.build import load_backbone as load_backbone

__all__ = ["TrainedRun", "__version__", "evaluate", "load_backbone", "load_run", "train"]
_load, __dir__, _ = attach(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name != "__version__":
        return _load(name)
    from importlib.metadata import version

    return version("permafrost")
