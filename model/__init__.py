"""B is the frozen base network: Swin V1 and V2 in all their sizes, its weights, and the contract a head sees.

Names load on first use: configurations need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from permafrost._lazy import attach

if TYPE_CHECKING:
    from permafrost.model.build import build_backbone as build_backbone, load_backbone as load_backbone
    from permafrost.model.config import BackboneConfig as BackboneConfig
    from permafrost.model.errors import BackboneError as BackboneError, WeightsError as WeightsError
    from permafrost.model.frozen import FrozenBackbone as FrozenBackbone
    from permafrost.model.spec import FeatureSpec as FeatureSpec
    from permafrost.model.swin.v1 import SwinV1 as SwinV1
    from permafrost.model.swin.v2 import SwinV2 as SwinV2, SwinV2Classifier as SwinV2Classifier
    from permafrost.model.swin.weights import save_weights as save_weights
    from permafrost.model.trainable import TrainableBackbone as TrainableBackbone

__getattr__, __dir__, __all__ = attach(__name__, __file__)
