"""TrainableBackbone: a base network that learns with its head. The exception, for comparison with a frozen one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from permafrost.model.backbone import Backbone, Network
from permafrost.model.errors import BackboneError
from permafrost.model.frozen import load_network
from permafrost.model.swin.drop_path import Generators

# They would draw from the global generator, or mix the samples of a batch into statistics that differ from rank to
# rank: what a sample is worth must not depend on where it is computed. Detectors keep such norms fixed for the same
# reason.
_STAY_IN_EVALUATION = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class TrainableBackbone(Backbone):
    """Images in, feature maps out, with gradients.

    Its parameters are float32 (or better); in what it computes, the autocast around it decides. Nothing is folded: what
    depends on the parameters alone is computed in every forward. Batch norms keep their statistics, and dropout other
    than drop path is off. Use `load_trainable` to make one. Arguments as for Backbone.

    `fingerprint` is that of the weights it started from.
    """

    def __init__(self, network: Network, **source: Any) -> None:
        super().__init__(network, **source)
        self.to(self._patch_weight.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its parameters."""
        # Not asked of a parameter: under ZeRO 3 that would gather it.
        return self.mean.dtype

    @property
    def device(self) -> torch.device:
        """Where the network is, and moves the images to."""
        return self.mean.device

    @property
    def no_decay(self) -> tuple[str, ...]:
        """Parts of the names of parameters that are not decayed, norms and biases aside."""
        return self.network.no_decay

    def forward(self, images: Tensor, generators: Generators = None) -> tuple[Tensor, ...]:
        """Computes the raw feature maps, finest first.

        Args:
            images: As FrozenBackbone takes them.
            generators: What drop path draws from, in training; one for each image or clip.

        Returns:
            Maps as of FrozenBackbone, in the parameters' dtype or that of the autocast.

        Raises:
            BackboneError: If shape, dtype or range of the images are others.
        """
        self._check_images(images)
        return self._folded(images, lambda flat: self.network(self._normalise(flat), generator=generators))

    def train(self, mode: bool = True) -> TrainableBackbone:
        """Switches between training and evaluation, but for batch norms and dropout."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _STAY_IN_EVALUATION):
                module.training = False
        return self


def load_trainable(
    name: str,
    *,
    drop_path_rate: float = 0.0,
    checkpoint_activations: bool = False,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> TrainableBackbone:
    """Loads a base network to be trained.

    Args:
        name: As for `load_backbone`.
        drop_path_rate: See BackboneConfig.
        checkpoint_activations: See BackboneConfig.
        dtype: Of the parameters; None: float32.
        **kwargs: As for `load_backbone`, the tensor group aside.

    Raises:
        BackboneError: Also if the network has no place for drop path, cannot recompute its blocks, or has parameters
            that no gradient reaches.
        WeightsError: As for `load_backbone`.
    """
    network, source = load_network(name, dtype=dtype or torch.float32, learns=True, **kwargs)
    if dtype is None:
        source["choices"]["dtype_reason"] = "parameters that are trained; engine.precision says in what they compute"
    network.set_training(drop_path_rate=drop_path_rate, checkpoint_activations=checkpoint_activations)
    choices = {"drop_path_rate": drop_path_rate, "checkpoint_activations": checkpoint_activations}
    backbone = TrainableBackbone(network, **source)
    backbone._choices |= choices
    for parameter in backbone.parameters():
        parameter.requires_grad_(True)
    _require_gradients(backbone.train(), name)
    return backbone


def _require_gradients(backbone: TrainableBackbone, name: str) -> None:
    """Engines wait for every parameter's gradient; only a backward tells what is really used."""
    parameters = dict(backbone.named_parameters())
    side = 2 * max(backbone.spec.strides)
    images = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=backbone.device)
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
