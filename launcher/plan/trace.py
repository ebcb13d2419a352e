"""Count the memory and FLOPs of real code without its cost, for `permafrost plan`.

The code runs under a dispatch mode that sees every operator below autograd. It keeps a tally of the storages that are
alive, and of what the operators compute. On the meta device nothing has memory. On a CPU, where a head must run for
real because its shapes depend on its data (proposals, samples), the few operators that cost time are not computed:
they return numbers of the right shape.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torchvision  # noqa: F401  (registers its operators)
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_NOT_COMPUTED = {
    *flop_registry,
    torch.ops.torchvision.roi_align,
    torch.ops.torchvision._roi_align_backward,
}
# What follows a forward's small results depends on them (which anchors are best, which boxes overlap), so they are
# random; nobody looks at the large ones, nor at gradients.
_MAX_RANDOM = 1 << 20
_RANDOM_SCALE = 0.1


class Trace(TorchDispatchMode):
    """Counts what runs inside.

    Args:
        device_type: "cpu" or "meta": storages on other devices are not counted. A CPU's trace may hold tensors on the
            meta device: they stand for another device's memory, of which zeros come back.
        dry: do not compute what is expensive; on the meta device nothing is computed anyway.

    Attributes:
        live: bytes alive now of storages made inside.
        peak: largest `live` so far, or since `take_peak`.
        flops: floating-point operations so far, two to a multiply-add; matrix products, convolutions and attention.
    """

    def __init__(self, device_type: str, *, dry: bool = False) -> None:
        super().__init__()
        self.device_type, self.dry = device_type, dry
        self.live = self.peak = self.flops = 0
        self._sizes: dict[int, int] = {}
        self._generator = torch.Generator().manual_seed(0)

    def watch(self, tensors: Iterable[Tensor]) -> int:
        """Know tensors that are there already; their bytes, each storage once, are returned and not part of `live`."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) not in self._sizes:
                total += storage.nbytes()
                self._enter(storage, 0)
        return total

    def take_peak(self) -> int:
        """Return the peak since the last call."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet is aten.copy_ and args[0].device != args[1].device:
            # Zeros, as what comes back may be an index.
            return args[0] if args[0].device.type == "meta" else args[0].zero_()
        is_computed = not (self.dry and packet in _NOT_COMPUTED)
        out = func(*args, **kwargs) if is_computed else self._shapes_of(func, args, kwargs)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device_type:
                storage = tensor.untyped_storage()
                if id(storage) not in self._sizes:
                    self._enter(storage, storage.nbytes())
        return out

    def _shapes_of(self, func: Any, args: Any, kwargs: Any) -> Any:
        def on_meta(tensor: Tensor) -> Tensor:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

        def filled(tensor: Tensor) -> Tensor:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            in_backward = torch._C._current_graph_task_id() != -1
            if in_backward or tensor.numel() > _MAX_RANDOM or not tensor.is_floating_point():
                return new.zero_()
            return new.normal_(std=_RANDOM_SCALE, generator=self._generator)

        out = func(*tree_map_only(Tensor, on_meta, args), **tree_map_only(Tensor, on_meta, kwargs))
        return tree_map_only(Tensor, filled, out)

    def _enter(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = id(storage)
        self._sizes[key] = num_bytes
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key).atexit = False

    def _leave(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class FusedAttention(TorchFunctionMode):
    """Attention as a GPU's fused kernel has it: an output, and no scores. Without a GPU it would be the plain formula.

    Args:
        trace: gets the FLOPs.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        return self.attend(query, key, value)

    def with_gradients(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output (..., L, D), whose backward counts the scores again and, of a bias, the gradient before it is summed."""
        return _Attention.apply(query, key, value, bias, self._trace)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the output (..., L, D) alone."""
        length, dim = key.shape[-2:]
        # Scores and their weighted sum: a multiply-add each for every query, key and channel.
        self._trace.flops += 2 * query.numel() * length + 2 * query.numel() // dim * length * value.shape[-1]
        return query.new_empty(*query.shape[:-1], value.shape[-1])


class _Attention(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps for its backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, trace: Trace) -> Tensor:
        out = FusedAttention(trace).attend(query, key, value)
        normalisers = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, normalisers)
        ctx.trace = trace
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, bias, _, _ = ctx.saved_tensors
        # Scores again, then a product for each of four gradients.
        ctx.trace.flops += 5 * 2 * query.numel() * key.shape[-2]
        of_bias = None
        if bias is not None and bias.requires_grad:
            of_bias = query.new_empty(*query.shape[:-1], key.shape[-2]).sum_to_size(bias.shape)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), of_bias, None
