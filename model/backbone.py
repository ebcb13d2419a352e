"""Hold what a frozen network (permafrost.model.frozen) shares with one that learns (permafrost.model.trainable)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from permafrost.model.errors import BackboneError
from permafrost.model.network import Network
from permafrost.model.spec import FeatureSpec
from permafrost.model.swin.parts import PatchEmbed

if TYPE_CHECKING:
    from permafrost.model.config import BackboneConfig

# Floats clearly outside [0, 1] are pixels in 0..255 or already normalised; resampling may overshoot a little.
PIXEL_RANGE = (-0.5, 1.5)
_CHECKSUM_CHUNK = 1 << 22


class Backbone(nn.Module):
    """Images in, feature maps out: a network with the statistics of its images, and where its weights come from.

    Args:
        network: the network (see Network), with its weights, in the dtype it is to compute in.
        config: what it was asked to be.
        mean: mean of the network's training images per channel, pixels in [0, 1].
        std: standard deviation likewise.
        fingerprint: hash of the source tensors.
        choices: what `describe` reports besides what the module knows itself.
    """

    mean: Tensor
    std: Tensor
    min_batch = 1
    """Images a forward takes at least."""
    patch_frames = 1
    """Frames of a clip that are embedded together and become one map."""

    def __init__(
        self,
        network: Network,
        config: BackboneConfig,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        fingerprint: str,
        choices: dict[str, Any],
    ) -> None:
        super().__init__()
        self.network = network
        device = self._patch_weight.device
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32, device=device), persistent=False)
        self._fingerprint = fingerprint
        self._choices = dict(choices)
        self._range_checked = False
        if config.patch_frames > 1:
            self.inflate_patches(config.patch_frames)

    @property
    def spec(self) -> FeatureSpec:
        """Channels and strides of the feature maps."""
        return self.network.spec

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """Modules whose outputs are the storages of the maps, where the network says so."""
        return tuple(getattr(self.network, "layers", ()))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the source tensors, the same on every device and in every dtype the network is loaded in."""
        return self._fingerprint

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in and the features have."""
        return self._patch_weight.dtype

    @property
    def device(self) -> torch.device:
        """Device the network is on, to which it moves the images."""
        return self._patch_weight.device

    @property
    def _patch_weight(self) -> Tensor:
        """The first convolution: what it computes in, the network computes in; constants may be more precise."""
        return next(module.weight for module in self.network.modules() if isinstance(module, nn.Conv2d))

    def inflate_patches(self, num_frames: int) -> None:
        """Embed `num_frames` consecutive frames of a clip together from now on, as Video-Swin does with 2.

        The weights are repeated over the frames and divided by their number (Carreira and Zisserman, CVPR 2017), so that frames which are
        all alike have the maps of one. It then takes clips only, of a multiple of as many frames.

        Raises:
            BackboneError: if it is not a Swin, or inflated already.
        """
        embed = next((module for module in self.network.modules() if isinstance(module, PatchEmbed)), None)
        if embed is None or self.patch_frames > 1:
            raise BackboneError(
                f"The patch embedding cannot be inflated over {num_frames} frames: "
                f"{'the network is not a Swin' if embed is None else 'it is inflated already'}."
            )
        embed.inflate(num_frames)
        self.patch_frames = num_frames
        self._choices["patch_frames"] = num_frames

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def checksum(self) -> str:
        """Hash what is resident now, to show that it has not changed.

        Cheap enough to run often: each tensor is reduced, on its device, to sums over its bit pattern. Unlike the
        fingerprint it depends on the dtype.
        """
        digest = hashlib.sha256()
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            digest.update(f"{name} {_bit_sums(tensor)}\n".encode())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what was chosen and why, as plain values for the start-up lines and the run folder."""
        return self._choices | {
            "fingerprint": self.fingerprint,
            "device": str(self.device),
            "num_parameters": self.num_parameters,
            **self.network.describe(),
            "mean": tuple(round(value, 6) for value in self.mean.tolist()),
            "std": tuple(round(value, 6) for value in self.std.tolist()),
        }

    def _check_images(self, images: Tensor) -> None:
        is_tensor = isinstance(images, Tensor) and images.ndim in (4, 5)
        if not is_tensor or images.shape[-3] != 3 or len(images) < self.min_batch or images.shape[1] == 0:
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise BackboneError(
                f"A backbone takes images of shape (B, 3, H, W) or clips of shape (B, T, 3, H, W), found {found}."
            )
        smallest = self.network.min_image_size
        if min(images.shape[-2:]) < smallest:
            raise BackboneError(
                f"Images of {images.shape[-2]} x {images.shape[-1]} pixels are smaller than one patch "
                f"({smallest} x {smallest}); resize or pad them."
            )
        if self.patch_frames > 1 and (images.ndim == 4 or images.shape[1] % self.patch_frames):
            raise BackboneError(
                f"backbone.patch_frames is {self.patch_frames}: clips (B, T, 3, H, W) of a multiple of as many frames are expected, "
                f"found {tuple(images.shape)}."
            )
        if images.dtype == torch.uint8:
            return
        if not images.is_floating_point():
            raise BackboneError(f"A backbone takes uint8 images, or floats in [0, 1]; found {images.dtype}.")
        if not self._range_checked and len(images):
            # Once: reading a value back stalls an accelerator, and pipelines do not change their range midway.
            low, high = (value.item() for value in images.float().aminmax())
            if not (low >= PIXEL_RANGE[0] and high <= PIXEL_RANGE[1]):
                raise BackboneError(
                    f"Float images must lie in [0, 1], found {low:.3g} to {high:.3g}; the backbone normalises itself: "
                    "give uint8, or divide by 255 and do nothing else."
                )
            self._range_checked = True

    def _folded(self, images: Tensor, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Call `compute` on images (N, 3, H, W), of clips (B, T, 3, H, W) on all their frames; return maps (B, T, C_i, ...) again.

        With P `patch_frames` above 1, on (N, 3 P, H, W), and with maps (B, T / P, C_i, ...).
        """
        if images.ndim == 4:
            return compute(images)
        shape, num_maps = images.shape, images.shape[1] // self.patch_frames
        # Frames that are embedded together lie beside one another in the channels.
        flat = images.reshape(shape[0] * num_maps, self.patch_frames * 3, *shape[3:])
        return tuple(one.unflatten(0, (shape[0], num_maps)) for one in compute(flat))

    def _normalise(self, images: Tensor) -> Tensor:
        """Bring images to the network's device, statistics and dtype."""
        precise = torch.promote_types(self.dtype, torch.float32)
        pixels = images.to(self.device, non_blocking=True).to(precise)
        if images.dtype == torch.uint8:
            pixels = pixels / 255.0
        mean, std = (each.to(precise).repeat(self.patch_frames)[:, None, None] for each in (self.mean, self.std))
        return ((pixels - mean) / std).to(self.dtype)


def _bit_sums(tensor: Tensor) -> tuple[int, int]:
    """Return the sum and the position-weighted sum of a tensor's bit patterns, modulo 2 ** 64."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total, weighted = 0, 0
    for number, chunk in enumerate(tensor.detach().reshape(-1).view(integer).split(_CHECKSUM_CHUNK)):
        bits = chunk.long()
        places = torch.arange(1, len(bits) + 1, device=bits.device)
        total += int(bits.sum())
        weighted += (number + 1) * int((bits * places).sum())
    return total % 2**64, weighted % 2**64
