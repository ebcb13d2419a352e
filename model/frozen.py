"""Freeze a base network: it never changes, behind the contract the heads rely on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from permafrost.model.backbone import Backbone
from permafrost.model.compiled import CompiledNetwork
from permafrost.model.cuda_graph import CapturedNetwork, require_graphs
from permafrost.model.errors import BackboneError
from permafrost.model.network import Network
from permafrost.model.precision import full_precision

if TYPE_CHECKING:
    from permafrost.model.config import BackboneConfig


class FrozenBackbone(Backbone):
    """B: images in, feature maps out; it cannot be trained.

    Its forward runs without gradients (not in inference mode: a head saves the features for its backward), in its own
    dtype whatever autocast surrounds it. `train()` changes nothing, no parameter is trainable, and its dtype is
    fixed at loading; it can be moved between devices. Use `load_backbone` to make one. Arguments as for Backbone.
    """

    def __init__(self, network: Network, config: BackboneConfig, **source: Any) -> None:
        super().__init__(network, config, **source)
        for parameter in network.parameters():
            parameter.requires_grad = False
        network.fold()
        super().train(False)
        self._compiled: CompiledNetwork | None = None
        self._captured: CapturedNetwork | None = None
        self.max_images = config.max_images
        """Most images (of clips: frames, or pairs that become one map) in one pass through the network; None: all of a forward's."""

    def compile_forward(self) -> None:
        """Run its forward through torch.compile from now on, with a program for each size of images.

        It changes nothing else: parameters and their names stay, and copies and saved state know nothing of it.
        """
        self._compiled = CompiledNetwork(self.network)

    def capture_forward(self) -> None:
        """Replay its forward as a CUDA graph from now on, with one for each size of images; what is compiled stays compiled.

        Raises:
            BackboneError: if it is not on a GPU.
        """
        require_graphs(self.device)
        self._captured = CapturedNetwork(self._compute)

    @property
    def _compute(self) -> Network | CompiledNetwork:
        return self.network if self._compiled is None else self._compiled

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """Return the modules of Backbone.stages; none of a forward that is compiled, captured, or in several passes: it gives all maps at
        its end."""
        is_whole = self._compiled is None and self._captured is None and self.max_images is None
        return super().stages if is_whole else ()

    def describe(self) -> dict[str, Any]:
        """Return what Backbone.describe says, and whether it is compiled or captured."""
        described = super().describe()
        for run in (self._compiled, self._captured):
            described |= {} if run is None else run.describe()
        return described

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the raw feature maps, finest first.

        Args:
            images: (B, 3, H, W), RGB: uint8, or floating point in [0, 1]. Any size from one patch up (4 x 4 for a Swin).
                Clips are (B, T, 3, H, W), and each of their frames is an image, or each `patch_frames` of them are.

        Returns:
            Maps (B, C_i, ceil(H / s_i), ceil(W / s_i)) as `spec` says, channels_last, in the network's dtype; of clips
            (B, T, C_i, ...).

        Raises:
            BackboneError: if shape, dtype or range of the images are others.
        """
        self._check_images(images)
        return self._folded(images, self._maps)

    def _maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return maps of images (N, 3, H, W), in passes of at most `max_images`.

        Images do not depend on one another, so passes change rounding at most.
        """
        compute = self._compute if self._captured is None else self._captured
        size = self.max_images or len(images)
        maps: tuple[Tensor, ...] | None = None
        with full_precision(self.device):
            for start in range(0, len(images), size):
                part = compute(self._normalise(images[start : start + size]))
                if size >= len(images):
                    return part
                # Joined in place: a list of parts and their join at its end would hold all maps twice.
                if maps is None:
                    shapes = [(len(images), *one.shape[1:]) for one in part]
                    maps = tuple(
                        torch.empty(shape, dtype=one.dtype, device=one.device, memory_format=torch.channels_last)
                        for shape, one in zip(shapes, part)
                    )
                for whole, one in zip(maps, part):
                    whole[start : start + size] = one
        assert maps is not None
        return maps

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Do nothing: a frozen network has no training mode."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> FrozenBackbone:
        """Refuse to make parameters trainable.

        Raises:
            BackboneError: if `requires_grad` is true.
        """
        if requires_grad:
            raise BackboneError("A frozen backbone has no trainable parameters; load one with frozen=False.")
        return self

    def _apply(self, fn, recurse=True):
        # A cast would quietly compute other features than the ones a head was trained on.
        dtypes = {tensor.dtype for tensor in (*self.parameters(), *self.buffers())}
        if any(fn(torch.empty(0, dtype=dtype, device=self.device)).dtype != dtype for dtype in dtypes):
            raise BackboneError(f"The dtype of a frozen backbone ({self.dtype}) is chosen when it is loaded.")
        if self._captured is not None:
            self._captured.clear()
        return super()._apply(fn, recurse)
