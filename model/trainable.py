"""Train a base network with its head. The exception, for comparison with a frozen one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from permafrost.model.backbone import Backbone
from permafrost.model.errors import BackboneError
from permafrost.model.network import Network
from permafrost.model.swin.drop_path import Generators

if TYPE_CHECKING:
    from permafrost.model.config import BackboneConfig

# They would draw from the global generator, or mix the samples of a batch into statistics that differ from rank to
# rank: what a sample is worth must not depend on where it is computed. Detectors keep such norms fixed for the same
# reason.
_STAY_IN_EVALUATION = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class TrainableBackbone(Backbone):
    """Images in, feature maps out, with gradients.

    Its parameters are float32 (or better); in what it computes, the autocast around it decides. Nothing is folded: what
    depends on the parameters alone is computed in every forward. Batch norms keep their statistics, and dropout other
    than drop path is off. Use `load_backbone` with frozen=False to make one. Arguments as for Backbone.

    `fingerprint` is that of the weights it started from.
    """

    def __init__(self, network: Network, config: BackboneConfig, **source: Any) -> None:
        choices = network.set_training(config)
        super().__init__(network, config, **source)
        self._choices |= choices
        self.to(self._patch_weight.dtype)
        for parameter in self.parameters():
            parameter.requires_grad = True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its parameters."""
        # Not asked of a parameter: under ZeRO 3 that would gather it.
        return self.mean.dtype

    @property
    def device(self) -> torch.device:
        """Device the network is on, to which it moves the images."""
        return self.mean.device

    @property
    def no_decay(self) -> tuple[str, ...]:
        """Parts of the names of parameters that are not decayed, norms and biases aside."""
        return self.network.no_decay

    def forward(self, images: Tensor, generators: Generators = None) -> tuple[Tensor, ...]:
        """Compute the raw feature maps, finest first.

        Args:
            images: as FrozenBackbone takes them.
            generators: what drop path draws from, in training; one for each image or clip.

        Returns:
            Maps as of FrozenBackbone, in the parameters' dtype or that of the autocast.

        Raises:
            BackboneError: if shape, dtype or range of the images are others.
        """
        self._check_images(images)
        return self._folded(images, lambda flat: self.network(self._normalise(flat), generator=generators))

    def train(self, mode: bool = True) -> TrainableBackbone:
        """Switch between training and evaluation, but for batch norms and dropout."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _STAY_IN_EVALUATION):
                module.training = False
        return self


def require_gradients(backbone: TrainableBackbone, name: str) -> None:
    """Run a backward, since engines wait for every parameter's gradient, and only a backward tells what is really used.

    Raises:
        BackboneError: if a parameter gets none, naming it.
    """
    parameters = dict(backbone.named_parameters())
    side = 2 * max(backbone.spec.strides)
    images = torch.zeros(1, backbone.patch_frames, 3, side, side, dtype=torch.uint8, device=backbone.device)
    total = torch.stack([one.float().sum() for one in backbone(images, [torch.Generator()])]).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    unused = [key for key, gradient in zip(parameters, gradients) if gradient is None]
    if unused:
        shown: Sequence[str] = [key.removeprefix("network.") for key in unused[:5]]
        raise BackboneError(
            f"{name} cannot be fine-tuned: its maps do not depend on {', '.join(shown)}"
            f"{' and others' if len(unused) > len(shown) else ''}, which would never get a gradient. Freeze it "
            "(backbone.frozen), or choose other taps."
        )
