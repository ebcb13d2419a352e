"""Activation offload: what a head saves for its backward waits in host memory.

A backward needs what its forward saved, much later. In between it may leave the device: every saved tensor is copied
to a (pinned, reused) host buffer on a stream of its own while the forward goes on, and comes back a few tensors ahead
of the backward. The maps of the frozen backbone are the largest of them, and the only ones that several heads share: in
host memory they exist once.

On a CPU the same code runs without streams. It saves nothing there; it is how equal gradients are shown without a GPU.
"""

from __future__ import annotations

import bisect
import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from permafrost.launcher.experiment import OffloadMode
    from permafrost.launcher.run.fine_tune import ImagesOn
    from permafrost.model.frozen import FrozenBackbone

# Below this a copy costs more than the memory is worth; masks and scales of norms stay.
_MIN_BYTES = 1 << 14
_LEAST_BUFFER = 1 << 16
SLACK = 1.25
"""Host memory is held up to this multiple of the most that was in use at once."""


@dataclass
class OffloadStatistics:
    """Bytes that heads saved for their backward, each storage once a forward, parameters and buffers of the head aside.

    Attributes:
        saved_bytes: all of it.
        offloaded_bytes: what left for host memory.
    """

    saved_bytes: int = 0
    offloaded_bytes: int = 0


class HostBuffers:
    """Host memory for copies, taken back when a copy is no longer needed; pinned if a GPU copies into it.

    What heads save changes in size from step to step (each number of positive regions is a size of its own), so buffers come in
    classes of size, a free one that is a little larger serves, and of what has been idle longest so much is let go that SLACK
    times the most that was ever in use at once is never exceeded.

    Args:
        pinned: whether the memory is page-locked, which asynchronous copies need.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.held_bytes = 0
        """What this object holds, in use or free."""
        self._in_use = self._most_in_use = 0
        # By size, then from the one that came back first: (size, when, buffer, the last copy that touches it).
        self._free: list[tuple[int, int, Tensor, torch.cuda.Event | None]] = []
        self._clock = itertools.count()

    def take(self, num_bytes: int) -> Tensor:
        """Return a uint8 buffer of at least so many bytes, which no copy uses any more."""
        size = self.size_of(num_bytes)
        place = bisect.bisect_left(self._free, (size,))
        if place < len(self._free) and self._free[place][0] <= (2 if self.pinned else SLACK) * size:
            size, _, buffer, event = self._free.pop(place)
            if event is not None:
                event.synchronize()
        else:
            self._make_room(size)
            buffer = self._allocate(size)
            self.held_bytes += size
        self._in_use += size
        self._most_in_use = max(self._most_in_use, self._in_use)
        return buffer

    def give_back(self, buffer: Tensor, event: torch.cuda.Event | None) -> None:
        """Take a buffer back; it is used again once `event`, the last copy from or to it, has happened."""
        self._in_use -= buffer.numel()
        bisect.insort(self._free, (buffer.numel(), next(self._clock), buffer, event))

    def size_of(self, num_bytes: int) -> int:
        """Return the class of size: eight to a doubling; pinned, the powers of two that torch's allocator takes anyway."""
        num_bytes = max(num_bytes, _LEAST_BUFFER)
        step = 1 << (num_bytes - 1).bit_length()
        if not self.pinned:
            step = max(1, step >> 4)
        return -(-num_bytes // step) * step

    def _allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)

    def _make_room(self, size: int) -> None:
        """Let go what has been idle longest, as far as the bound asks for before a buffer of this size is added."""
        bound = SLACK * max(self._most_in_use, self._in_use + size)
        idle = sorted(self._free, key=lambda entry: entry[1])
        gone = 0
        while idle and self.held_bytes + size > bound:
            entry = idle.pop(0)
            if entry[3] is not None:
                entry[3].synchronize()
            self._free.remove(entry)
            self.held_bytes -= entry[0]
            gone += 1
            del entry
        if gone and self.pinned:
            # torch keeps pinned blocks for good unless it is told not to.
            getattr(torch.accelerator, "empty_host_cache", torch._C._host_emptyCache)()


class HostCopy:
    """One storage's bytes in host memory, and the way back.

    Whole storages, because that is what a saved tensor keeps alive: all views of one share one copy.

    Args:
        storage: what to copy. It may be freed as soon as this returns.
        buffers: where the host memory comes from, and goes back to when this object dies.
        stream: the side stream of the copies; None copies in place, on a CPU.
    """

    def __init__(self, storage: torch.UntypedStorage, buffers: HostBuffers, stream: torch.cuda.Stream | None) -> None:
        self.device, self.num_bytes = storage.device, storage.nbytes()
        buffer = buffers.take(self.num_bytes)
        self._host = buffer[: self.num_bytes]
        self._stream = stream
        # The last copy that touches the buffer; shared with the finalizer, which must not hold this object.
        self._last: list[torch.cuda.Event | None] = [None]
        self._returning: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._returned: StorageWeakRef | None = None
        weakref.finalize(self, _give_back, buffers, buffer, self._last)
        source = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
        if stream is None:
            self._host.copy_(source)
            return
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._host.copy_(source, non_blocking=True)
            self._last[0] = stream.record_event()
        # The allocator must not hand the memory out before the copy has read it.
        source.record_stream(stream)

    def prefetch(self) -> None:
        """Start the way back, unless the bytes are on the device already."""
        if self._returning is not None or (self._returned is not None and not self._returned.expired()):
            return
        # Allocated for the stream that will use it; the side stream waits until that memory is really free.
        target = torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device)
        if self._stream is None:
            self._returning = (target.copy_(self._host), None)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(self._host, non_blocking=True)
            self._last[0] = self._stream.record_event()
        target.record_stream(self._stream)
        self._returning = (target, self._last[0])

    def fetch(self) -> torch.UntypedStorage:
        """Return the storage, on its device again; the current stream waits for it, the CPU does not."""
        self.prefetch()
        if self._returning is None:
            return torch.UntypedStorage._new_with_weak_ptr(self._returned.cdata)  # type: ignore[union-attr]  # not coming back: it is there
        (target, event), self._returning = self._returning, None
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        storage = target.untyped_storage()
        self._returned = StorageWeakRef(storage)
        return storage


@dataclass(frozen=True)
class SavedView:
    """A tensor as a view of a storage that is in host memory."""

    copy: HostCopy
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor, copy: HostCopy) -> SavedView:
        """Return the view that `tensor` is of its own storage, whose bytes `copy` holds."""
        return cls(copy, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def fetch(self) -> Tensor:
        """Return the tensor, on its device again."""
        storage = self.copy.fetch()
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(
            storage, self.offset, self.shape, self.stride
        )


@dataclass(frozen=True)
class _ParameterView:
    """A view of a parameter that ZeRO 3 has gathered; it is gathered again when the backward comes to its module."""

    parameter: nn.Parameter
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def fetch(self) -> Tensor:
        """Return the view, of the values that the parameter has now."""
        return self.parameter.detach().as_strided(self.shape, self.stride, self.offset)


def _gathered_parameter(sharded: Sequence[nn.Parameter], storage: torch.UntypedStorage) -> nn.Parameter | None:
    """Return the parameter that has its values in this storage now."""
    pointer = storage.data_ptr()
    return next((one for one in sharded if one.numel() and one.untyped_storage().data_ptr() == pointer), None)


class KeptFeatures:
    """The maps of one micro-batch between the backbone and the last head: on the device, or in host memory."""

    def __init__(self, maps: Sequence[Tensor], views: Sequence[SavedView] | None) -> None:
        self._maps = tuple(maps) if views is None else ()
        self.views = views

    def take(self) -> tuple[Tensor, ...]:
        """Return the maps, on the device."""
        if self.views is None:
            return self._maps
        for view in self.views:
            view.copy.prefetch()
        return tuple(view.fetch() for view in self.views)


class ActivationOffload:
    """Moves what heads save for their backward to host memory and back.

    Args:
        mode: "off"; "features": the backbone's maps only; "all": every saved tensor whose storage has 16 KiB or more,
            parameters and buffers of the head aside. Under autocast the head's weights are cast, and the casts,
            being no parameters, leave too.
        device: where the heads compute.
        num_ahead: how many storages the way back is ahead of the backward.
    """

    def __init__(self, mode: OffloadMode, device: torch.device, *, num_ahead: int = 3) -> None:
        self.mode, self.device, self.num_ahead = mode, device, num_ahead
        on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu and mode != "off" else None
        self.buffers = HostBuffers(pinned=on_gpu)
        self.statistics = OffloadStatistics()

    def forward(self, backbone: FrozenBackbone | ImagesOn, images: Tensor) -> KeptFeatures:
        """Compute the backbone's maps of one micro-batch; unless the mode is "off", they leave as its stages produce them.

        Args:
            backbone: its `stages`, if it names any, are watched.
            images: what it takes.
        """
        if self.mode == "off":
            return KeptFeatures(backbone(images), None)
        # Stage outputs on their way out before anybody asked for them, by storage and version.
        early: dict[tuple[int, int], tuple[StorageWeakRef, HostCopy]] = {}

        def leave(stage: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            early[_state(output)] = (StorageWeakRef(output.untyped_storage()), self._copy(output))

        hooks = [stage.register_forward_hook(leave) for stage in backbone.stages]
        try:
            maps = backbone(images)
        finally:
            for hook in hooks:
                hook.remove()
        copies = [early[_state(one)][1] if _state(one) in early else self._copy(one) for one in maps]
        return KeptFeatures(maps, [SavedView.of(one, copy) for one, copy in zip(maps, copies)])

    @contextmanager
    def saving(self, head: nn.Module, kept: KeptFeatures, maps: Sequence[Tensor]) -> Iterator[None]:
        """Offload what is saved for a backward inside this context, as the mode says.

        Args:
            head: its parameters and buffers stay.
            kept: where the maps came from.
            maps: what `kept.take` returned.
        """
        if self.mode == "off":
            yield
            return
        resident = {tensor.untyped_storage().data_ptr() for tensor in (*head.parameters(), *head.buffers())}
        # Under ZeRO 3 a parameter has its values only while its module computes, and other memory each time.
        sharded = [parameter for parameter in head.parameters() if hasattr(parameter, "ds_status")]
        # By storage and version: its copy and its place on the tape. The weak reference keeps the key unique.
        known: dict[tuple[int, int], tuple[StorageWeakRef, HostCopy, int]] = {}
        tape: list[weakref.ref[HostCopy]] = []
        counted: dict[int, StorageWeakRef] = {}

        def enter(tensor: Tensor, copy: HostCopy) -> None:
            known[_state(tensor)] = (StorageWeakRef(tensor.untyped_storage()), copy, len(tape))
            tape.append(weakref.ref(copy))

        for one, view in zip(maps, kept.views or ()):
            enter(one, view.copy)

        def pack(tensor: Tensor) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() in resident or storage.device.type != self.device.type:
                return tensor
            if (gathered := _gathered_parameter(sharded, storage)) is not None:
                return _ParameterView(gathered, int(tensor.storage_offset()), tensor.shape, tensor.stride())
            state = _state(tensor)
            leaves = state in known or (self.mode == "all" and storage.nbytes() >= _MIN_BYTES)
            if state[0] not in counted:
                counted[state[0]] = StorageWeakRef(storage)
                self.statistics.saved_bytes += storage.nbytes()
                self.statistics.offloaded_bytes += storage.nbytes() * leaves
            if not leaves:
                return tensor
            if state not in known:
                enter(tensor, self._copy(tensor))
            _, copy, place = known[state]
            return SavedView.of(tensor, copy), place

        def unpack(saved: Any) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            if isinstance(saved, _ParameterView):
                return saved.fetch()
            view, place = saved
            tensor = view.fetch()
            for reference in reversed(tape[max(0, place - self.num_ahead) : place]):
                if (earlier := reference()) is not None:
                    earlier.prefetch()
            return tensor

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                yield
        finally:
            # From here on the graph alone holds the copies, and frees each with its node.
            known.clear()
            counted.clear()

    def take_statistics(self) -> OffloadStatistics:
        """Return what was counted since the last call."""
        statistics, self.statistics = self.statistics, OffloadStatistics()
        return statistics

    def _copy(self, tensor: Tensor) -> HostCopy:
        return HostCopy(tensor.untyped_storage(), self.buffers, self.stream)


def _state(tensor: Tensor) -> tuple[int, int]:
    """Return a storage and its version; unique while a weak reference to the storage is held."""
    return tensor.untyped_storage()._cdata, tensor._version


def _give_back(buffers: HostBuffers, buffer: Tensor, last: list[torch.cuda.Event | None]) -> None:
    buffers.give_back(buffer, last[0])
