"""Run a network that never changes through torch.compile: one program for each size of images."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from permafrost.model.errors import BackboneError

MAX_COMPILED_SIZES = 8
"""Training and evaluation have a size each, and the last batch of an evaluation another; more is no run of few sizes."""


class CompiledNetwork:
    """Calls a folded network's compiled forward.

    Sizes are static. With symbolic sizes the compiler did not come to an end in ten minutes on the tiny SwinV2, whose
    padding and windows depend on them.

    Args:
        network: on the device and in the dtype it stays in. It is not changed: its parameters, names and hooks are as
            before, but hooks do not run in a compiled forward.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._compiled = torch.compile(network.forward, dynamic=False)
        self._sizes: set[tuple[int, ...]] = set()
        self._has_warned = False

    def __reduce__(self) -> Any:
        # A copy compiles anew, for the copied network.
        return CompiledNetwork, (self._network,)

    def describe(self) -> dict[str, str]:
        """Say that it is compiled, for the start-up lines."""
        return {"compile": f"torch.compile, for each size of images when it first comes, up to {MAX_COMPILED_SIZES}"}

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the network's forward, without gradients.

        The first forward of a size compiles, for seconds on a GPU and up to minutes on a CPU. After MAX_COMPILED_SIZES of them
        further ones run as they are, and a warning says so.

        Raises:
            BackboneError: if it cannot be compiled here.
        """
        size = (*images.shape, images.get_device())
        if size in self._sizes:
            return self._run(images)
        if len(self._sizes) == MAX_COMPILED_SIZES:
            if not self._has_warned:
                warnings.warn(
                    f"backbone.compile: {MAX_COMPILED_SIZES} sizes of images have been compiled; others, like "
                    f"{tuple(images.shape)}, run without.",
                    stacklevel=2,
                )
                self._has_warned = True
            return self._network(images)
        # Constants that are kept after the first forward are then there, and are not taken for its results.
        self._network(images)
        with warnings.catch_warnings():
            # It looks through the cache of a function without side effects, whose tables are arithmetic to it.
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
            maps = self._run(images)
        self._sizes.add(size)
        return maps

    def _run(self, images: Tensor) -> tuple[Tensor, ...]:
        from torch._dynamo import config, exc

        try:
            # The limit counts for all networks of a class.
            with config.patch(recompile_limit=16 * MAX_COMPILED_SIZES):
                return self._compiled(images)
        except exc.TorchDynamoException as error:
            # The backend's own error follows a line that says which backend it was.
            lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("backend=")]
            reason = lines[0] if lines else type(error).__name__
            raise BackboneError(
                f"torch.compile failed on the backbone for images of {tuple(images.shape)} on {images.device}: {reason}. "
                "On a CPU it needs a C++ compiler, on a GPU Triton; set backbone.compile to False to do without."
            ) from error
