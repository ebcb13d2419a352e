"""Replay a forward that never changes as CUDA graphs, one for each size of images.

A forward is a few thousand launches, each of which costs the CPU some microseconds. On small images the GPU waits for them; a
graph is launched once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from permafrost.model.compiled import MAX_COMPILED_SIZES
from permafrost.model.errors import BackboneError

MAX_CAPTURED_SIZES = MAX_COMPILED_SIZES
"""Each keeps the memory of a whole forward."""
_WARM_UPS = 3


def require_graphs(device: torch.device) -> None:
    """Check that graphs can be captured.

    Raises:
        BackboneError: if the device has none.
    """
    if device.type != "cuda":
        raise BackboneError(
            f"backbone.cuda_graph is True, but the backbone is on {device}: only GPUs have graphs; set it to False."
        )


class CapturedNetwork:
    """Calls a forward by replaying what it launched.

    Args:
        forward: of a folded network, or a CompiledNetwork of one: (B, 3, H, W) to feature maps, the same launches each time.
    """

    def __init__(self, forward: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self._forward = forward
        self._captured: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]] = {}
        # Graphs that are replayed one after the other share the memory of what is between their ends.
        self._pool: Any = None
        self._has_warned = False

    def __reduce__(self) -> Any:
        # A copy captures anew, for the copied network.
        return CapturedNetwork, (self._forward,)

    def describe(self) -> dict[str, str]:
        """Say that it is captured, for the start-up lines."""
        return {"cuda_graph": f"captured, for each size of images when it first comes, up to {MAX_CAPTURED_SIZES}"}

    def clear(self) -> None:
        """Forget the graphs: the network is elsewhere now."""
        self._captured.clear()
        self._pool = None

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the forward, without gradients. The first forward of a size runs it a few times.

        Maps are copies, so that they last as long as a head needs them. After MAX_CAPTURED_SIZES sizes further ones run as they
        are, and a warning says so.

        Raises:
            BackboneError: if it cannot be captured.
        """
        require_graphs(images.device)
        key = (*images.shape, images.get_device())
        if key not in self._captured:
            if len(self._captured) == MAX_CAPTURED_SIZES:
                if not self._has_warned:
                    warnings.warn(
                        f"backbone.cuda_graph: {MAX_CAPTURED_SIZES} sizes of images have graphs; others, like "
                        f"{tuple(images.shape)}, run without.",
                        stacklevel=2,
                    )
                    self._has_warned = True
                return self._forward(images)
            self._captured[key] = self._capture(images)
        graph, static, maps = self._captured[key]
        static.copy_(images)
        graph.replay()
        return tuple(one.clone(memory_format=torch.preserve_format) for one in maps)

    def _capture(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]:
        with torch.cuda.device(images.device):
            static = images.clone()
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                # Kernels are compiled, constants folded and libraries set up before anything is recorded.
                for _ in range(_WARM_UPS):
                    self._forward(static)
            torch.cuda.current_stream().wait_stream(aside)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads, such as one that pins memory for batches to come, may go on.
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    maps = self._forward(static)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise BackboneError(
                    f"The forward of {tuple(images.shape)} images cannot be captured ({str(error).splitlines()[0]}); set "
                    "backbone.cuda_graph to False."
                ) from error
        return graph, static, maps
