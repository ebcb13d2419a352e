"""Define what Swin V1 and SwinV2 have in common: windows, their shift, the stages, and the way through them.

The two differ in how tokens attend (`ShiftedWindowAttention` leaves that open), where a block and the step between
stages normalise, and where the position bias comes from; see permafrost.model.swin.v1 and permafrost.model.swin.v2.

Shapes: B batch, H W map size, C channels, N windows, L tokens per window (window * window), A attention heads, D head
dim. Maps travel as (B, H, W, C); the four outputs are (B, C, H, W) views in channels_last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost._modules import module_list
from permafrost.model.errors import BackboneError, KernelError
from permafrost.model.fp8 import linear_with
from permafrost.model.kernels.linear_gelu import check_dtype as check_epilogue, linear_gelu
from permafrost.model.kernels.selection import Choice, choose_kernel
from permafrost.model.kernels.window_attention import Kernel, window_attention
from permafrost.model.kernels.window_attention.reference import SHIFT_PENALTY
from permafrost.model.network import Network
from permafrost.model.precision import full_precision
from permafrost.model.spec import PATCH_SIZE, SwinSize, per_stage
from permafrost.model.swin.drop_path import Generators, draw_kept, run_again_in_backward

if TYPE_CHECKING:
    from permafrost.model.config import BackboneConfig

MLP_RATIO = 4
# Of the continuous position bias and the logit scale (SwinV2), and the position tables (Swin V1): the official code decays
# none of them.
NO_DECAY = ("cpb_mlp", "logit_scale", "relative_position_bias_table")
# CUDA's attention kernels put the batch on a grid axis, which ends here.
MAX_WINDOWS_PER_CALL = 65_535


@lru_cache(maxsize=64)
def relative_position_index(window: int, device: torch.device) -> Tensor:
    """Return the entry of each pair of tokens in a table over all relative offsets.

    Returns:
        (L * L,) int64, query-major: row of the ((2 * window - 1) ** 2)-entry table for (query, key).
    """
    with torch.inference_mode(False):
        axis = torch.arange(window, device=device)
        offset = axis[:, None] - axis[None, :] + window - 1
        rows = offset[:, None, :, None].expand(window, window, window, window)
        columns = offset[None, :, None, :].expand(window, window, window, window)
        return (rows * (2 * window - 1) + columns).reshape(-1)


@lru_cache(maxsize=64)
def shift_penalties(window: int, shift: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return what the cyclic shift adds to the logits, for the four kinds of window it creates.

    Rolling a map by `shift` leaves every window whole except those of the last row, whose lowest `shift` rows came from
    the top of the map, and those of the last column, likewise. Tokens of different origin are penalised.

    Returns:
        (2, 2, L, L), indexed by (is in the last row of windows, is in the last column).
    """
    with torch.inference_mode(False):
        wrapped = torch.arange(window, device=device) >= window - shift
        none = torch.zeros_like(wrapped)
        penalties = torch.empty(2, 2, window**2, window**2, device=device, dtype=dtype)
        for last_row, rows in enumerate((none, wrapped)):
            for last_column, columns in enumerate((none, wrapped)):
                origin = (2 * rows[:, None] + columns[None, :].long()).reshape(-1)
                penalties[last_row, last_column] = SHIFT_PENALTY * (origin[:, None] != origin[None, :])
        return penalties


class ShiftedWindowAttention(nn.Module):
    """Self-attention within (shifted) windows of a map. A subclass adds the parameters and two methods.

    Args:
        num_heads: heads A.
    """

    qkv: nn.Linear
    proj: nn.Module
    cosine: bool
    """True if queries and keys are scaled to length 1."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        # None: PyTorch's own operators, by `attend`. Else what window_attention is to use.
        self.kernel: Kernel | None = None
        # None: the constants are recomputed in each forward, with gradients. A dict: folded, see Swin.fold.
        self.folded: dict[int, tuple[Tensor, Tensor | float, Tensor]] | None = None

    def compute_constants(self, window: int) -> tuple[Tensor, Tensor | float, Tensor]:
        """Compute all that depends on the parameters but not on the image.

        Args:
            window: side of the window that is used, which may be smaller than the configured one.

        Returns:
            The bias of q, k, v (3 * C,); the logit scale, a number or (A, 1, 1); the position bias of every offset
            (A, (2 * window - 1) ** 2), in float32 or better.
        """
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: Tensor | float, bias: Tensor) -> Tensor:
        """Attend within each window: q, k, v (N, A, L, D), bias (1, A, L, L) in their dtype -> (N, A, L, D)."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        # Whatever moves the parameters leaves constants folded from the old ones behind.
        if self.folded:
            self.folded.clear()
        return super()._apply(fn, recurse)

    def constants(self, window: int) -> tuple[Tensor, Tensor | float, Tensor]:
        """Return what `compute_constants` says, kept after the first time once folded."""
        if self.folded is not None and window in self.folded:
            return self.folded[window]
        with full_precision(self.qkv.weight.device):
            bias, scale, table = self.compute_constants(window)
            if self.kernel is not None and not isinstance(scale, Tensor):
                # What kernels take is made once, too.
                scale = torch.full((self.num_heads,), scale, dtype=table.dtype, device=table.device)
            constants = (bias, scale, table)
        if self.folded is not None:
            self.folded[window] = constants
        return constants

    def forward(self, x: Tensor, window: int, shift: int) -> Tensor:
        """Attend within windows.

        The map is padded at the bottom and the right to whole windows and only then rolled. Padded tokens are zero on
        entry, so their query, key and value are the biases of these; they take part like any other token.

        Args:
            x: (B, H, W, C).
            window: side of a window.
            shift: cyclic shift of the windows; needs H and W above `window`.

        Returns:
            (B, H, W, C).
        """
        if self.kernel is not None:
            constants = self.constants(window)
            qkv = linear_with(self.qkv, x, constants[0])
            return self.proj(
                window_attention(qkv, *constants, window=window, shift=shift, cosine=self.cosine, kernel=self.kernel)
            )
        height, width = x.shape[1:3]
        pad_bottom, pad_right = -height % window, -width % window
        if pad_bottom or pad_right:
            x = F.pad(x, (0, 0, 0, pad_right, 0, pad_bottom))
        if shift:
            x = torch.roll(x, (-shift, -shift), dims=(1, 2))

        qkv_bias, scale, table = self.constants(window)
        qkv = linear_with(self.qkv, x, qkv_bias)
        bias = table[:, relative_position_index(window, table.device)].view(self.num_heads, window**2, window**2)
        if not shift:
            x = self._attend_windows(qkv, window, scale, bias)
        else:
            # One call per kind of window keeps the bias at (A, L, L): a mask per window would be as large as the
            # logits themselves.
            penalties = shift_penalties(window, shift, bias.device, bias.dtype)
            bottom, right = qkv.shape[1] - window, qkv.shape[2] - window
            rows = []
            for last_row, strip in enumerate((qkv[:, :bottom], qkv[:, bottom:])):
                left_and_right = (strip[:, :, :right], strip[:, :, right:])
                parts = [
                    self._attend_windows(part, window, scale, bias + penalties[last_row, last_column])
                    for last_column, part in enumerate(left_and_right)
                ]
                rows.append(torch.cat(parts, dim=2))
            x = torch.roll(torch.cat(rows, dim=1), (shift, shift), dims=(1, 2))
        return self.proj(x[:, :height, :width])

    def attempt(self, kernel: Kernel, window: int, dtype: torch.dtype) -> None:
        """Attend to a window of zeros with a kernel of window_attention.

        Raises:
            Exception: of any kind, if it cannot.
        """
        device = self.qkv.weight.device
        channels = self.qkv.out_features
        qkv, bias = (torch.zeros(*shape, channels, dtype=dtype, device=device) for shape in ((1, window, window), ()))
        table = torch.zeros(self.num_heads, (2 * window - 1) ** 2, device=device)
        scale = torch.ones(self.num_heads, device=device)
        window_attention(qkv, bias, scale, table, window=window, cosine=self.cosine, kernel=kernel)

    def _attend_windows(self, qkv: Tensor, window: int, scale: Tensor | float, bias: Tensor) -> Tensor:
        """Attend within windows that share one bias: qkv (B, H, W, 3 * C) in whole windows, bias (A, L, L)."""
        batch, height, width, _ = qkv.shape
        grid = (batch, height // window, width // window)
        qkv = qkv.reshape(batch, grid[1], window, grid[2], window, 3, self.num_heads, -1)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, math.prod(grid), self.num_heads, window**2, -1)
        bias = bias.to(qkv.dtype)[None]
        chunks = zip(*(tensor.split(MAX_WINDOWS_PER_CALL) for tensor in qkv), strict=True)
        parts = [self.attend(q, k, v, scale, bias) for q, k, v in chunks]
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        x = x.view(*grid, self.num_heads, window, window, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(batch, height, width, -1)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2: nn.Module = nn.Linear(MLP_RATIO * dim, dim)
        self.has_epilogue = False

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(linear_gelu(x, self.fc1) if self.has_epilogue else F.gelu(self.fc1(x)))

    @torch.no_grad()
    def attempt(self, dtype: torch.dtype) -> None:
        """Compute the hidden channels of a token with the GELU in the epilogue.

        Raises:
            Exception: of any kind, if that cannot be done.
        """
        check_epilogue(dtype)
        if not isinstance(self.fc1, nn.Linear):
            raise KernelError("quantised products (backbone.fp8) have no such epilogue")
        linear_gelu(torch.zeros(1, self.fc1.in_features, dtype=dtype, device=self.fc1.weight.device), self.fc1)


class PatchEmbed(nn.Module):
    """Turns each patch of 4 x 4 pixels into a token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)
        self.norm = nn.LayerNorm(dim)

    def inflate(self, num_frames: int) -> None:
        """Take (B, 3 * num_frames, H, W) from now on: weights repeated over the frames and divided by their number."""
        weight = self.proj.weight
        inflated = weight.detach().repeat(1, num_frames, 1, 1) / num_frames
        self.proj.weight = nn.Parameter(inflated, requires_grad=weight.requires_grad)
        self.proj.in_channels = inflated.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to (B, ceil(H / 4), ceil(W / 4), C)."""
        height, width = images.shape[2:]
        if height % PATCH_SIZE or width % PATCH_SIZE:
            images = F.pad(images, (0, -width % PATCH_SIZE, 0, -height % PATCH_SIZE))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


def join_neighbours(x: Tensor) -> Tensor:
    """Join the channels of each 2 x 2 neighbours; an odd side is padded with zeros first.

    Args:
        x: (B, H, W, C).

    Returns:
        (B, ceil(H / 2), ceil(W / 2), 4 * C), the four ordered column by column as in the released models.
    """
    height, width = x.shape[1:3]
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    return torch.cat((x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]), dim=-1)


def stage_windows(
    default: int, window_size: int | Sequence[int] | None, pretrained_window_size: int | Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return per stage the window, and the one that the position bias belongs to: the same unless it is given.

    Raises:
        BackboneError: if one is neither an integer of at least 1 nor one per stage.
    """
    windows = per_stage(default if window_size is None else window_size, field="window_size")
    if pretrained_window_size is None:
        return windows, windows
    return windows, per_stage(pretrained_window_size, field="pretrained_window_size")


class Stage(nn.Module):
    """Blocks of one resolution, then the step to the next.

    Args:
        blocks: the blocks; every second one shifts its windows.
        downsample: the step to the next resolution; None in the last stage.
        window_size: side of a window on maps larger than it.
    """

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None, *, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.blocks = module_list(blocks)
        self.downsample = downsample
        # Whether a backward computes each block again from its input.
        self.checkpoint_activations = False

    def window_and_shift(self, height: int, width: int) -> tuple[int, int]:
        """Return window and shift of the odd blocks on a map of this size: a map no larger than a window is not shifted."""
        if min(height, width) <= self.window_size:
            return min(height, width), 0
        return self.window_size, self.window_size // 2

    def forward(self, x: Tensor, branch_scales: Sequence[Tensor | None]) -> Tensor:
        """Map (B, H, W, C) to the same shape, before the step to the next resolution."""
        window, shift = self.window_and_shift(*x.shape[1:3])
        for index, (block, branch_scale) in enumerate(zip(self.blocks, branch_scales, strict=True)):
            arguments = (x, window, shift if index % 2 else 0, branch_scale)
            recomputed = self.checkpoint_activations and torch.is_grad_enabled()
            x = run_again_in_backward(block, *arguments) if recomputed else block(*arguments)
        return x


class Swin(Network):
    """The way of an image through the four stages: normalised images in, four raw feature maps out.

    It trains like any module. For frozen use `fold` keeps what never changes; FrozenBackbone does that. Parameter names
    are those of the official checkpoints, so a published state dict loads without renaming; nothing else is stored.

    Args:
        size: row of the table of sizes.
        layers: the four stages.
        window_size: side of a window, per stage.
        pretrained_window_size: window that the parameters of the position bias belong to, per stage.
        drop_path_rate: probability of dropping a residual branch of an image in the last block, rising linearly from 0
            in the first; in training mode only.

    Raises:
        BackboneError: if a value is out of range.
    """

    min_image_size = PATCH_SIZE

    def __init__(
        self,
        size: SwinSize,
        layers: Iterable[Stage],
        *,
        window_size: tuple[int, ...],
        pretrained_window_size: tuple[int, ...],
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= drop_path_rate < 1.0:
            raise BackboneError(f"drop_path_rate must be at least 0 and below 1, found {drop_path_rate}.")
        self.size = size
        self.spec = size.spec
        self.window_size = window_size
        self.pretrained_window_size = pretrained_window_size
        self.drop_path_rate = drop_path_rate
        self.is_folded = False
        self.attention = Choice("sdpa", "the default")
        self.gelu = Choice("exact", "the default")
        self.patch_embed = PatchEmbed(size.embed_dim)
        self.layers = module_list(layers)

    def describe(self) -> dict[str, Any]:
        """Return the windows, and what attends, for the start-up lines and the run folder."""
        return {
            "window_size": self.window_size,
            "pretrained_window_size": self.pretrained_window_size,
            "attention": str(self.attention),
            "gelu": str(self.gelu),
        }

    def choose_kernels(self, config: BackboneConfig, *, dtype: torch.dtype) -> None:
        """Choose what computes, for all blocks alike; permafrost.model.kernels.selection says how.

        Args:
            config: which kernels are asked for, and whether the network learns.
            dtype: what the network computes in.

        Raises:
            KernelError: if a kernel that is asked for cannot run here.
        """
        blocks = [(module, stage) for stage in self.layers for module in stage.modules()]
        attentions = [(one, stage.window_size) for one, stage in blocks if isinstance(one, ShiftedWindowAttention)]
        # One of each kind: blocks of a stage are alike.
        kinds = {(one.num_heads, one.qkv.out_features, window): one for one, window in attentions}

        def attempt(kernel: Kernel) -> None:
            for (*_, window), one in kinds.items():
                one.attempt(kernel, window, dtype)

        device = attentions[0][0].qkv.weight.device
        choose = partial(choose_kernel, dtype=dtype, device=device, learns=not config.frozen)
        self.attention = choose(
            config.attention,
            field="backbone.attention",
            op="window_attention",
            plain="sdpa",
            attempt=attempt,
        )
        kernel = None if self.attention.kernel == "sdpa" else cast("Kernel", self.attention.kernel)
        for one, _ in attentions:
            one.kernel = kernel
        mlps = [module for module in self.modules() if isinstance(module, Mlp)]

        def attempt_gelu(kernel: str) -> None:
            for one in {mlp.fc1.in_features: mlp for mlp in mlps}.values():
                one.attempt(dtype)

        self.gelu = choose(config.gelu, field="backbone.gelu", op="linear_gelu", plain="exact", attempt=attempt_gelu)
        for mlp in mlps:
            mlp.has_epilogue = self.gelu.kernel == "epilogue"

    def fold(self) -> None:
        """Keep everything that depends on the parameters alone after the first forward that needs it.

        Per block and window that is what `ShiftedWindowAttention.constants` gives, with the position bias in its
        compact form (one row of all offsets per head). Moving or casting the module drops what was kept; changing a
        parameter in place does not, so this is for networks that never change.
        """
        self.is_folded = True
        for module in self.modules():
            if isinstance(module, ShiftedWindowAttention):
                module.folded = {}

    def set_training(self, config: BackboneConfig) -> dict[str, Any]:
        """Set drop path and recomputation, as permafrost.model.network.Network says."""
        self.drop_path_rate = config.drop_path_rate
        for stage in self.layers:
            stage.checkpoint_activations = config.checkpoint_activations
        return {"drop_path_rate": config.drop_path_rate, "checkpoint_activations": config.checkpoint_activations}

    @property
    def no_decay(self) -> tuple[str, ...]:
        """Parts of the names of parameters that weight decay would harm, norms and biases aside."""
        return NO_DECAY

    def forward(self, images: Tensor, *, generator: Generators = None) -> tuple[Tensor, ...]:
        """Compute the raw output of every stage, before the step to the next resolution.

        Args:
            images: (B, 3, H, W), normalised, of any size from one patch (4 x 4) up.
            generator: CPU generator that drop path draws from, or one per sample (see draw_kept); None: the global one.

        Returns:
            Four maps (B, C_i, ceil(H / s_i), ceil(W / s_i)) in channels_last.

        Raises:
            BackboneError: if the images are not (B, 3, H, W) or smaller than a patch.
        """
        channels = self.patch_embed.proj.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise BackboneError(f"Images must have shape (B, {channels}, H, W), found {tuple(images.shape)}.")
        if min(images.shape[2:]) < PATCH_SIZE:
            raise BackboneError(
                f"Images of {images.shape[2]} x {images.shape[3]} pixels are smaller than one patch "
                f"({PATCH_SIZE} x {PATCH_SIZE}); resize or pad them."
            )
        branch_scales = self._draw_branch_scales(images, generator)
        x = self.patch_embed(images)
        features = []
        first = 0
        for stage in self.layers:
            x = stage(x, branch_scales[first : first + len(stage.blocks)])
            first += len(stage.blocks)
            features.append(x.permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return tuple(features)

    def _draw_branch_scales(self, images: Tensor, generator: Generators) -> Sequence[Tensor | None]:
        """Draw stochastic depth (Huang et al., ECCV 2016) per image for all blocks at once.

        Drawn on the CPU, so that a seed means the same on every device.

        Returns:
            Per block None, or (2, B, 1, 1, 1): 0 for a dropped branch and 1 / (1 - rate) for a kept one.
        """
        num_blocks = sum(self.size.depths)
        if not self.training or self.drop_path_rate == 0.0:
            return [None] * num_blocks
        keep = 1.0 - torch.linspace(0.0, self.drop_path_rate, num_blocks)[:, None, None]
        kept = draw_kept(keep.expand(-1, 2, -1), images.shape[0], generator)
        scales = (kept / keep).to(images.device, images.dtype, non_blocking=True)
        return list(scales[..., None, None, None])
