"""Network: what a module must offer to stand behind a Backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from permafrost.model.spec import FeatureSpec

if TYPE_CHECKING:
    from permafrost.model.config import BackboneConfig


class Network(nn.Module):
    """Base of base networks.

    Its forward maps normalised images (B, 3, H, W) in the parameters' dtype to feature maps as `spec` says, channels_last. That of
    a network which is trained takes drop path's `generator`, too.

    Attributes:
        spec: channels and strides of the maps.
        min_image_size: smallest side of an image in pixels.
    """

    spec: FeatureSpec
    min_image_size: int

    @property
    def no_decay(self) -> tuple[str, ...]:
        """Return parts of the names of parameters that weight decay would harm, norms and biases aside."""
        return ()

    def fold(self) -> None:
        """Compute, or arrange to keep, all that depends on the parameters alone; they never change from here on."""
        raise NotImplementedError

    def set_training(self, config: BackboneConfig) -> dict[str, Any]:
        """Do what the config asks of a network that learns, before it is trained, and return it for `describe`.

        Raises:
            BackboneError: it cannot do it.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return what it is, as plain values: windows, tapped layers, ..."""
        raise NotImplementedError
