"""SwinV2: a hierarchical vision transformer with shifted windows, dense on any input size.

Follows "Swin Transformer V2: Scaling Up Capacity and Resolution" (Liu et al., CVPR 2022): cosine attention, a position
bias computed from log-spaced coordinates, normalisation after each residual branch. Parameter names are those of the
official checkpoints, so a published state dict loads without renaming; nothing else is stored in a state dict.

Shapes: B batch, H W map size, C channels, N windows, L tokens per window (window * window), A attention heads, D head
dim. Maps travel as (B, H, W, C); the four outputs are (B, C, H, W) views in channels_last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.model.errors import BackboneError
from permafrost.model.precision import full_precision
from permafrost.model.spec import PATCH_SIZE, SWINV2_SIZES, FeatureSpec, SwinV2Size, per_stage

MAX_LOGIT_SCALE = math.log(100.0)
INITIAL_LOGIT_SCALE = math.log(10.0)
POSITION_BIAS_HIDDEN = 512
# Added to the logits between tokens that are neighbours only because of the cyclic shift. Finite, as in the released
# models: with a logit scale of up to 100 it weighs against them without always removing them.
SHIFT_PENALTY = -100.0
MLP_RATIO = 4
# CUDA's attention kernels put the batch on a grid axis, which ends here.
MAX_WINDOWS_PER_CALL = 65_535


@lru_cache(maxsize=64)
def relative_position_index(window: int, device: torch.device) -> Tensor:
    """Where each pair of tokens finds its entry in a table over all relative offsets.

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
def log_spaced_coordinates(window: int, pretrained_window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Relative offsets on the scale the position bias was learned on (equation 4 of the SwinV2 paper).

    Offsets are divided by the largest offset of the *pretrained* window and stretched to [-8, 8] before the logarithm,
    so a larger window extrapolates smoothly. A window of 1 has the single offset 0.

    Returns:
        ((2 * window - 1) ** 2, 2): row and column coordinate of every offset.
    """
    with torch.inference_mode(False):
        offset = torch.arange(1 - window, window, device=device, dtype=dtype) * (8.0 / max(pretrained_window - 1, 1))
        axis = torch.sign(offset) * torch.log2(offset.abs() + 1.0) / math.log2(8.0)
        return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)


@lru_cache(maxsize=64)
def shift_penalties(window: int, shift: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What the cyclic shift adds to the logits, for the four kinds of window it creates.

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


def scale_to_length(x: Tensor, length: Tensor | float) -> Tensor:
    """Scales vectors (..., D) to a length; zero stays zero, and has no gradient. Norms are at least in float32."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(precise, dim=-1, keepdim=True)
    return (precise * (length / norm.clamp_min(1e-12) * (norm > 0))).to(x.dtype)


class WindowAttention(nn.Module):
    """Cosine self-attention within (shifted) windows of a map, with a continuous position bias.

    Args:
        dim: Channels C.
        num_heads: Heads A.
        pretrained_window: Window whose largest offset scales the coordinates of the position bias.
    """

    def __init__(self, dim: int, num_heads: int, pretrained_window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.pretrained_window = pretrained_window
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), INITIAL_LOGIT_SCALE))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, POSITION_BIAS_HIDDEN), nn.ReLU(), nn.Linear(POSITION_BIAS_HIDDEN, num_heads, bias=False)
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        # None: everything below is recomputed in each forward, with gradients. A dict: folded, see SwinV2.fold.
        self.folded: dict[int, tuple[Tensor, Tensor, Tensor]] | None = None

    def _apply(self, fn, recurse=True):
        # Whatever moves the parameters leaves constants folded from the old ones behind.
        if self.folded:
            self.folded.clear()
        return super()._apply(fn, recurse)

    def constants(self, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """All that depends on the parameters but not on the image.

        Returns:
            The bias of q, k, v (3 * C,), where k has none; the logit scale (A, 1, 1); the position bias
            16 * sigmoid(MLP(coordinates)) of every offset (A, (2 * window - 1) ** 2). Scale and position bias are in
            the dtype of their parameters.
        """
        if self.folded is not None and window in self.folded:
            return self.folded[window]
        with full_precision(self.logit_scale.device):
            qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
            scale = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
            weight = self.cpb_mlp[0].weight
            coordinates = log_spaced_coordinates(window, self.pretrained_window, weight.device, weight.dtype)
            table = 16.0 * torch.sigmoid(self.cpb_mlp(coordinates)).t().contiguous()
        if self.folded is not None:
            self.folded[window] = (qkv_bias, scale, table)
        return qkv_bias, scale, table

    def forward(self, x: Tensor, window: int, shift: int) -> Tensor:
        """Attends within windows.

        The map is padded at the bottom and the right to whole windows and only then rolled. Padded tokens are zero on
        entry, so their key is zero and their value is the bias; they take part like any other token.

        Args:
            x: (B, H, W, C).
            window: Side of a window.
            shift: Cyclic shift of the windows; needs H and W above `window`.

        Returns:
            (B, H, W, C).
        """
        height, width = x.shape[1:3]
        pad_bottom, pad_right = -height % window, -width % window
        if pad_bottom or pad_right:
            x = F.pad(x, (0, 0, 0, pad_right, 0, pad_bottom))
        if shift:
            x = torch.roll(x, (-shift, -shift), dims=(1, 2))

        qkv_bias, scale, table = self.constants(window)
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        bias = table[:, relative_position_index(window, table.device)].view(self.num_heads, window**2, window**2)
        if not shift:
            x = self._attend(qkv, window, scale, bias)
        else:
            # One call per kind of window keeps the bias at (A, L, L): a mask per window would be as large as the
            # logits themselves.
            penalties = shift_penalties(window, shift, bias.device, bias.dtype)
            bottom, right = qkv.shape[1] - window, qkv.shape[2] - window
            rows = []
            for last_row, strip in enumerate((qkv[:, :bottom], qkv[:, bottom:])):
                left_and_right = (strip[:, :, :right], strip[:, :, right:])
                parts = [
                    self._attend(part, window, scale, bias + penalties[last_row, last_column])
                    for last_column, part in enumerate(left_and_right)
                ]
                rows.append(torch.cat(parts, dim=2))
            x = torch.roll(torch.cat(rows, dim=1), (shift, shift), dims=(1, 2))
        return self.proj(x[:, :height, :width])

    def _attend(self, qkv: Tensor, window: int, scale: Tensor, bias: Tensor) -> Tensor:
        """Attends within windows that share one bias: qkv (B, H, W, 3 * C) in whole windows, bias (A, L, L)."""
        batch, height, width, _ = qkv.shape
        grid = (batch, height // window, width // window)
        qkv = qkv.reshape(batch, grid[1], window, grid[2], window, 3, self.num_heads, -1)
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, math.prod(grid), self.num_heads, window**2, -1)
        q, k = scale_to_length(q, scale), scale_to_length(k, 1.0)
        bias = bias.to(v.dtype)[None]
        chunks = zip(*(tensor.split(MAX_WINDOWS_PER_CALL) for tensor in (q, k, v)), strict=True)
        parts = [F.scaled_dot_product_attention(*chunk, attn_mask=bias, scale=1.0) for chunk in chunks]
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        x = x.view(*grid, self.num_heads, window, window, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(batch, height, width, -1)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each normalised *after* its branch (res-post-norm).

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        pretrained_window: See WindowAttention.
        extra_norm: Also normalise the main branch at the end of the block.
    """

    def __init__(self, dim: int, num_heads: int, pretrained_window: int, *, extra_norm: bool) -> None:
        super().__init__()
        self.attn = WindowAttention(dim, num_heads, pretrained_window)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.enorm = nn.LayerNorm(dim) if extra_norm else None

    def forward(self, x: Tensor, window: int, shift: int, branch_scale: Tensor | None = None) -> Tensor:
        """Maps (B, H, W, C) to the same shape; `branch_scale` (2, B, 1, 1, 1) is drop path's factor of each branch."""
        attention = self.norm1(self.attn(x, window, shift))
        x = x + (attention if branch_scale is None else attention * branch_scale[0])
        hidden = self.norm2(self.mlp(x))
        x = x + (hidden if branch_scale is None else hidden * branch_scale[1])
        return x if self.enorm is None else self.enorm(x)


class PatchMerging(nn.Module):
    """Halves a map and doubles its channels; an odd side is padded with zeros first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 * C)."""
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # The released models order the four neighbours column by column.
        corners = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        return self.norm(self.reduction(torch.cat(corners, dim=-1)))


class PatchEmbed(nn.Module):
    """Turns each patch of 4 x 4 pixels into a token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised images (B, 3, H, W) to (B, ceil(H / 4), ceil(W / 4), C)."""
        height, width = images.shape[2:]
        if height % PATCH_SIZE or width % PATCH_SIZE:
            images = F.pad(images, (0, -width % PATCH_SIZE, 0, -height % PATCH_SIZE))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks of one resolution, then the step to the next.

    Args:
        dim: Channels C.
        depth: Number of blocks; every second one shifts its windows.
        num_heads: Attention heads.
        window_size: Side of a window on maps larger than it.
        pretrained_window: See WindowAttention.
        extra_norm_interval: An extra norm after every so many blocks of this stage; 0: none.
        last: Whether no stage follows.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        window_size: int,
        pretrained_window: int,
        extra_norm_interval: int,
        last: bool,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.blocks = nn.ModuleList(
            Block(
                dim,
                num_heads,
                pretrained_window,
                extra_norm=extra_norm_interval > 0 and (index + 1) % extra_norm_interval == 0,
            )
            for index in range(depth)
        )
        self.downsample = None if last else PatchMerging(dim)

    def window_and_shift(self, height: int, width: int) -> tuple[int, int]:
        """Window and shift of the odd blocks on a map of this size: a map no larger than a window is not shifted."""
        if min(height, width) <= self.window_size:
            return min(height, width), 0
        return self.window_size, self.window_size // 2

    def forward(self, x: Tensor, branch_scales: Sequence[Tensor | None]) -> Tensor:
        """Maps (B, H, W, C) to the same shape, before the step to the next resolution."""
        window, shift = self.window_and_shift(*x.shape[1:3])
        for index, (block, branch_scale) in enumerate(zip(self.blocks, branch_scales, strict=True)):
            x = block(x, window, shift if index % 2 else 0, branch_scale)
        return x


class SwinV2(nn.Module):
    """The SwinV2 network: normalised images in, four raw feature maps out.

    It trains like any module. For frozen use `fold` keeps what never changes; FrozenBackbone does that.

    Args:
        size: Name in the table of sizes, or a row of its own.
        window_size: Side of a window, for all stages or one per stage; None takes the table's. On a map no larger than
            the window a stage uses one window as large as the map's shorter side, unshifted.
        pretrained_window_size: Window that scales the coordinates of the position bias, for all stages or one per
            stage. It belongs to the weights: the window each stage really had when they were trained. None: equal to
            `window_size`, which is right for training from scratch.
        extra_norm_interval: Overrides the table's.
        drop_path_rate: Probability of dropping a residual branch of an image in the last block, rising linearly from 0
            in the first; in training mode only.

    Raises:
        BackboneError: If a value is out of range or the name is not in the table.
    """

    min_image_size = PATCH_SIZE

    def __init__(
        self,
        size: str | SwinV2Size,
        *,
        window_size: int | Sequence[int] | None = None,
        pretrained_window_size: int | Sequence[int] | None = None,
        extra_norm_interval: int | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(size, str):
            if size not in SWINV2_SIZES:
                raise BackboneError(f"No SwinV2 is called {size!r}; the sizes are {', '.join(SWINV2_SIZES)}.")
            size = SWINV2_SIZES[size]
        if not 0.0 <= drop_path_rate < 1.0:
            raise BackboneError(f"drop_path_rate must be at least 0 and below 1, found {drop_path_rate}.")
        windows = per_stage(size.window_size if window_size is None else window_size, field="window_size")
        pretrained = windows
        if pretrained_window_size is not None:
            pretrained = per_stage(pretrained_window_size, field="pretrained_window_size")
        interval = size.extra_norm_interval if extra_norm_interval is None else extra_norm_interval
        if interval < 0:
            raise BackboneError(f"extra_norm_interval must be at least 0, found {interval}.")

        self.size = size
        self.window_size = windows
        self.pretrained_window_size = pretrained
        self.extra_norm_interval = interval
        self.drop_path_rate = drop_path_rate
        self.patch_embed = PatchEmbed(size.embed_dim)
        self.layers = nn.ModuleList(
            Stage(
                channels,
                size.depths[stage],
                size.num_heads[stage],
                window_size=windows[stage],
                pretrained_window=pretrained[stage],
                extra_norm_interval=interval,
                last=stage == len(size.depths) - 1,
            )
            for stage, channels in enumerate(size.channels)
        )
        self.init_weights()

    @property
    def spec(self) -> FeatureSpec:
        """Channels and strides of the four maps."""
        return self.size.spec

    def describe(self) -> dict[str, Any]:
        """The windows, for the start-up lines and the run folder."""
        return {"window_size": self.window_size, "pretrained_window_size": self.pretrained_window_size}

    def init_weights(self) -> None:
        """Initial values for training from scratch: every block starts as the identity (its norms are zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Block):
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)

    def fold(self) -> None:
        """Keeps everything that depends on the parameters alone after the first forward that needs it.

        Per block and window that is the joined q, k, v bias, the logit scale and the position bias in its compact form
        (one row of all offsets per head). Moving or casting the module drops what was kept; changing a parameter in
        place does not, so this is for networks that never change.
        """
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.folded = {}

    def forward(self, images: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Computes the raw output of every stage, before the step to the next resolution.

        Args:
            images: (B, 3, H, W), normalised, of any size from one patch (4 x 4) up.
            generator: CPU generator that drop path draws from; None: the global one.

        Returns:
            Four maps (B, C_i, ceil(H / s_i), ceil(W / s_i)) in channels_last.

        Raises:
            BackboneError: If the images are not (B, 3, H, W) or smaller than a patch.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise BackboneError(f"Images must have shape (B, 3, H, W), found {tuple(images.shape)}.")
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

    def _draw_branch_scales(self, images: Tensor, generator: torch.Generator | None) -> Sequence[Tensor | None]:
        """Draws stochastic depth (Huang et al., ECCV 2016) per image for all blocks at once.

        Drawn on the CPU, so that a seed means the same on every device.

        Returns:
            Per block None, or (2, B, 1, 1, 1): 0 for a dropped branch and 1 / (1 - rate) for a kept one.
        """
        num_blocks = sum(self.size.depths)
        if not self.training or self.drop_path_rate == 0.0:
            return [None] * num_blocks
        keep = 1.0 - torch.linspace(0.0, self.drop_path_rate, num_blocks)[:, None, None]
        kept = torch.rand(num_blocks, 2, images.shape[0], generator=generator) < keep
        scales = (kept / keep).to(images.device, images.dtype, non_blocking=True)
        return list(scales[..., None, None, None])


class SwinV2Classifier(SwinV2):
    """SwinV2 with the final norm, mean pooling and a linear classifier: what pretraining trains.

    Args:
        size: See SwinV2.
        num_classes: Number of classes K.
        **kwargs: See SwinV2.
    """

    def __init__(self, size: str | SwinV2Size, *, num_classes: int, **kwargs) -> None:
        if num_classes < 1:
            raise BackboneError(f"num_classes must be at least 1, found {num_classes}.")
        super().__init__(size, **kwargs)
        self.norm = nn.LayerNorm(self.size.channels[-1])
        self.head = nn.Linear(self.size.channels[-1], num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward_features(self, images: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Computes the four raw maps, as SwinV2 does."""
        return super().forward(images, generator=generator)

    def forward(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Maps normalised images (B, 3, H, W) to logits (B, K)."""
        last = self.forward_features(images, generator=generator)[-1].permute(0, 2, 3, 1)
        return self.head(self.norm(last).mean(dim=(1, 2)))
