"""B, the frozen base network: Swin V1 and V2 in all their sizes, its weights, and the contract a head sees.

Names are imported on first use, so that `import permafrost.model` stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from permafrost.model.config import BackboneConfig
    from permafrost.model.errors import BackboneError, WeightsError
    from permafrost.model.frozen import FrozenBackbone, load_backbone
    from permafrost.model.spec import FeatureSpec
    from permafrost.model.swin import SwinV2, SwinV2Classifier
    from permafrost.model.swin_v1 import SwinV1
    from permafrost.model.weights import save_weights

_HOMES = {
    "BackboneConfig": "config",
    "BackboneError": "errors",
    "FeatureSpec": "spec",
    "FrozenBackbone": "frozen",
    "SwinV1": "swin_v1",
    "SwinV2": "swin",
    "SwinV2Classifier": "swin",
    "WeightsError": "errors",
    "load_backbone": "frozen",
    "save_weights": "weights",
}

__all__ = [
    "BackboneConfig",
    "BackboneError",
    "FeatureSpec",
    "FrozenBackbone",
    "SwinV1",
    "SwinV2",
    "SwinV2Classifier",
    "WeightsError",
    "load_backbone",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
