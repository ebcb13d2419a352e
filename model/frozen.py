"""FrozenBackbone: a base network that never changes, behind the contract the heads rely on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from permafrost.model.backbone import Backbone, Network
from permafrost.model.compiled import MAX_COMPILED_SIZES, CompiledNetwork
from permafrost.model.cuda_graph import MAX_CAPTURED_SIZES, CapturedNetwork, require_graphs
from permafrost.model.errors import BackboneError
from permafrost.model.fp8 import require_fp8
from permafrost.model.precision import check_dtype, full_precision
from permafrost.model.spec import TIMM_PREFIX, check_fields, check_name, given
from permafrost.model.split.degree import SPLIT_AND_FP8
from permafrost.model.swin.load import load_swin
from permafrost.model.weights.read import FLOATING_DTYPES


class FrozenBackbone(Backbone):
    """B: images in, feature maps out; it cannot be trained.

    Its forward runs without gradients (not in inference mode: a head saves the features for its backward), in its own
    dtype whatever autocast surrounds it. `train()` changes nothing, no parameter is trainable, and its dtype is
    fixed at loading; it can be moved between devices. Use `load_backbone` to make one. Arguments as for Backbone.
    """

    def __init__(self, network: Network, **source: Any) -> None:
        super().__init__(network, **source)
        for parameter in network.parameters():
            parameter.requires_grad = False
        network.fold()
        super().train(False)
        self._compiled: CompiledNetwork | None = None
        self._captured: CapturedNetwork | None = None
        self.max_images: int | None = None
        """Most images (of clips: frames, or pairs that become one map) in one pass through the network; None: all of a forward's."""

    def compile_forward(self) -> None:
        """Runs its forward through torch.compile from now on, with a program for each size of images.

        It changes nothing else: parameters and their names stay, and copies and saved state know nothing of it.
        """
        self._compiled = CompiledNetwork(self.network)

    def capture_forward(self) -> None:
        """Replays its forward as a CUDA graph from now on, with one for each size of images; what is compiled stays compiled.

        Raises:
            BackboneError: If it is not on a GPU.
        """
        require_graphs(self.device)
        self._captured = CapturedNetwork(self._compute)

    @property
    def _compute(self) -> Network | CompiledNetwork:
        return self.network if self._compiled is None else self._compiled

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """As of Backbone; none of a compiled or captured forward, or of one in several passes, which give all maps at their end."""
        is_whole = self._compiled is None and self._captured is None and self.max_images is None
        return super().stages if is_whole else ()

    def describe(self) -> dict[str, Any]:
        """As of Backbone, and whether it is compiled or captured."""
        when = "for each size of images when it first comes, up to"
        described = super().describe()
        if self._compiled is not None:
            described["compile"] = f"torch.compile, {when} {MAX_COMPILED_SIZES}"
        if self._captured is not None:
            described["cuda_graph"] = f"captured, {when} {MAX_CAPTURED_SIZES}"
        return described

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Computes the raw feature maps, finest first.

        Args:
            images: (B, 3, H, W), RGB: uint8, or floating point in [0, 1]. Any size from one patch up (4 x 4 for a Swin).
                Clips are (B, T, 3, H, W), and each of their frames is an image, or each `patch_frames` of them are.

        Returns:
            Maps (B, C_i, ceil(H / s_i), ceil(W / s_i)) as `spec` says, channels_last, in the network's dtype; of clips
            (B, T, C_i, ...).

        Raises:
            BackboneError: If shape, dtype or range of the images are others.
        """
        self._check_images(images)
        return self._folded(images, self._maps)

    def _maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps of images (N, 3, H, W), in passes of at most `max_images`.

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
        """Does nothing: a frozen network has no training mode."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> FrozenBackbone:
        """Refuses to make parameters trainable.

        Raises:
            BackboneError: If `requires_grad` is true.
        """
        if requires_grad:
            raise BackboneError("A frozen backbone has no trainable parameters; load_trainable loads one.")
        return self

    def _apply(self, fn, recurse=True):
        # A cast would quietly compute other features than the ones a head was trained on.
        dtypes = {tensor.dtype for tensor in (*self.parameters(), *self.buffers())}
        if any(fn(torch.empty(0, dtype=dtype, device=self.device)).dtype != dtype for dtype in dtypes):
            raise BackboneError(f"The dtype of a frozen backbone ({self.dtype}) is chosen when it is loaded.")
        if self._captured is not None:
            self._captured.clear()
        return super()._apply(fn, recurse)


def load_backbone(
    name: str,
    *,
    weights: str | os.PathLike[str],
    window_size: int | Sequence[int] | None = None,
    pretrained_window_size: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tensor_group: Any = None,
    prefix: str | None = None,
    weights_key: str | None = None,
    extra_norm_interval: int | None = None,
    taps: Sequence[int] | None = None,
    attention: str = "auto",
    residual_norm: str = "auto",
    gelu: str = "auto",
    fp8: bool = False,
) -> FrozenBackbone:
    """Loads a frozen base network.

    Args:
        name: A name in the table of sizes (permafrost.model.spec), or `timm/` and a timm model's.
        weights: A file or folder (see permafrost.model.weights.read), a known name, "random" ("random:SEED"), or, for a timm
            model, "pretrained".
        window_size: Window, for all stages or one per stage. None takes the file's configured window; another one
            than the file's also needs `pretrained_window_size`, and resamples the position tables of a Swin V1. See
            permafrost.model.weights.windows.
        pretrained_window_size: The window each stage had in training. None reads it from the file; if given it must
            be what the file says.
        dtype: The dtype to compute in; None: bfloat16 on CUDA, float32 elsewhere.
        device: Where to put it.
        tensor_group: TensorGroup (permafrost.model.split.fairscale_groups) to split the network over; loading and every
            forward are then collective over it, see permafrost.model.split.tensor_parallel. None: this process has all of it.
        prefix: Take only the file's tensors whose names start with this, without it; None finds the prefix.
        weights_key: The entry of a PyTorch checkpoint that holds the weights ("student"); None finds it.
        extra_norm_interval: Blocks between extra norms on the main branch of a SwinV2; None: as the file or the table
            says.
        taps: Layers of a timm model that are given out; see BackboneConfig.
        attention: What a Swin attends with: "auto", "triton", "cuda", "sdpa" or "reference"; see BackboneConfig.
        residual_norm: What a SwinV2 adds its normalised branches with: "auto", "triton", "torch" or "reference"; see BackboneConfig.
        gelu: How a Swin's MLPs compute their GELU: "auto", "epilogue" or "exact"; see BackboneConfig.
        fp8: Quantises the linear layers of a Swin; see BackboneConfig.

    Raises:
        BackboneError: If name, dtype, device, windows or taps make no sense, or the network cannot be split over the
            group.
        WeightsError: If the weights cannot be read or belong to another network, on any member of the group.
        KernelError: If `attention`, `residual_norm` or `gelu` names a kernel that cannot run here.
    """
    kind = FrozenBackbone
    if tensor_group is not None:
        # Only here: it imports fairscale.
        from permafrost.model.split.tensor_parallel import SplitBackbone as kind
    network, source = load_network(
        name,
        weights=weights,
        window_size=window_size,
        pretrained_window_size=pretrained_window_size,
        dtype=dtype,
        device=device,
        tensor_group=tensor_group,
        prefix=prefix,
        weights_key=weights_key,
        extra_norm_interval=extra_norm_interval,
        taps=taps,
        attention=attention,
        residual_norm=residual_norm,
        gelu=gelu,
        fp8=fp8,
    )
    return kind(network, **source)


def load_network(
    name: str,
    *,
    weights: str | os.PathLike[str],
    window_size: int | Sequence[int] | None = None,
    pretrained_window_size: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tensor_group: Any = None,
    prefix: str | None = None,
    weights_key: str | None = None,
    extra_norm_interval: int | None = None,
    taps: Sequence[int] | None = None,
    attention: str = "auto",
    residual_norm: str = "auto",
    gelu: str = "auto",
    fp8: bool = False,
    learns: bool = False,
) -> tuple[Network, dict[str, Any]]:
    """A network with its weights, and what Backbone takes besides it.

    Arguments as for `load_backbone`, and `learns`: whether it will be trained.
    """
    check_name(name)
    if tensor_group is not None:
        from permafrost.model.split.tensor_parallel import check_group, load_together

        check_group(name, tensor_group)
    device = _usable_device(device)
    dtype, reason = _usable_dtype(dtype, device)
    check_dtype(dtype, device)
    if fp8:
        require_fp8(device, dtype)
        if tensor_group is not None:
            raise BackboneError(SPLIT_AND_FP8)

    common = {"weights": weights, "prefix": prefix, "weights_key": weights_key, "dtype": dtype, "device": device}
    swin = {
        "window_size": window_size,
        "pretrained_window_size": pretrained_window_size,
        "extra_norm_interval": extra_norm_interval,
    }
    kernels = {"attention": attention, "residual_norm": residual_norm, "gelu": gelu}
    chosen = {field: given(value) for field, value in kernels.items()}
    check_fields(name, **swin, taps=taps, **chosen, fp8=fp8 or None)
    swin |= kernels | {"learns": learns, "fp8": fp8}
    if name.startswith(TIMM_PREFIX):
        # Imported where it is needed: a Swin does without timm.
        from permafrost.model.timm.backbone import load_timm

        network, source = load_timm(name, taps=taps, **common)
    elif tensor_group is None:
        network, source = load_swin(name, tensor_group=None, **swin, **common)
    else:
        load = partial(load_swin, name, tensor_group=tensor_group, **swin, **common)
        network, source = load_together(tensor_group, load)
    return network, {
        "mean": source["mean"],
        "std": source["std"],
        "fingerprint": source["fingerprint"],
        "choices": {
            "name": name,
            "weights": source["weights"],
            "dtype": str(dtype).removeprefix("torch."),
            "dtype_reason": reason,
            **source["choices"],
        },
    }


def _usable_device(device: torch.device | str) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise BackboneError(f"There is no device {device!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackboneError(
            f"The backbone is to run on {device}, but PyTorch sees {torch.cuda.device_count()} CUDA devices."
        )
    return device


def _usable_dtype(dtype: torch.dtype | None, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why."""
    if dtype is None:
        if device.type == "cuda":
            return torch.bfloat16, "default on CUDA"
        return torch.float32, f"default on {device.type}: bfloat16 is slower than float32 on most CPUs"
    if dtype not in FLOATING_DTYPES:
        raise BackboneError(f"dtype must be one of {', '.join(map(str, FLOATING_DTYPES))} or None, found {dtype!r}.")
    return dtype, "as asked for"
