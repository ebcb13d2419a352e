"""Define SwinV2: a hierarchical vision transformer with shifted windows, dense on any input size.

Follows "Swin Transformer V2: Scaling Up Capacity and Resolution" (Liu et al., CVPR 2022): cosine attention, a position
bias computed from log-spaced coordinates, normalisation after each residual branch. What it shares with Swin V1, and
the legend of the shapes, is in permafrost.model.swin.parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.model.errors import BackboneError
from permafrost.model.kernels.residual_norm import Kernel, residual_norm
from permafrost.model.kernels.selection import Choice, choose_kernel
from permafrost.model.kernels.window_attention.reference import scale_to_length
from permafrost.model.spec import SWINV2_SIZES, SwinV2Size
from permafrost.model.swin.drop_path import Generators
from permafrost.model.swin.parts import Mlp, ShiftedWindowAttention, Stage, Swin, join_neighbours, stage_windows

if TYPE_CHECKING:
    from permafrost.model.config import BackboneConfig

MAX_LOGIT_SCALE = math.log(100.0)
INITIAL_LOGIT_SCALE = math.log(10.0)
POSITION_BIAS_HIDDEN = 512


@lru_cache(maxsize=64)
def log_spaced_coordinates(window: int, pretrained_window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return relative offsets on the scale the position bias was learned on (equation 4 of the SwinV2 paper).

    Offsets are divided by the largest offset of the *pretrained* window and stretched to [-8, 8] before the logarithm,
    so a larger window extrapolates smoothly. A window of 1 has the single offset 0.

    Returns:
        ((2 * window - 1) ** 2, 2): row and column coordinate of every offset.
    """
    with torch.inference_mode(False):
        offset = torch.arange(1 - window, window, device=device, dtype=dtype) * (8.0 / max(pretrained_window - 1, 1))
        axis = torch.sign(offset) * torch.log2(offset.abs() + 1.0) / math.log2(8.0)
        return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)


class WindowAttention(ShiftedWindowAttention):
    """Cosine self-attention within (shifted) windows of a map, with a continuous position bias.

    Args:
        dim: channels C.
        num_heads: heads A.
        pretrained_window: window whose largest offset scales the coordinates of the position bias.
    """

    cosine = True

    def __init__(self, dim: int, num_heads: int, pretrained_window: int) -> None:
        super().__init__(num_heads)
        self.pretrained_window = pretrained_window
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), INITIAL_LOGIT_SCALE))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, POSITION_BIAS_HIDDEN), nn.ReLU(), nn.Linear(POSITION_BIAS_HIDDEN, num_heads, bias=False)
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def compute_constants(self, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compute all that depends on the parameters but not on the image.

        Returns:
            The bias of q, k, v (3 * C,), where k has none; the logit scale (A, 1, 1); the position bias
            16 * sigmoid(MLP(coordinates)) of every offset (A, (2 * window - 1) ** 2). Scale and position bias are in
            the dtype of their parameters.
        """
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        scale = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        weight = self.cpb_mlp[0].weight
        coordinates = log_spaced_coordinates(window, self.pretrained_window, weight.device, weight.dtype)
        table = 16.0 * torch.sigmoid(self.cpb_mlp(coordinates)).t().contiguous()
        return qkv_bias, scale, table

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]  # its own constant
        """Attend by cosine within each window: q, k, v (N, A, L, D), bias (1, A, L, L) -> (N, A, L, D)."""
        q, k = scale_to_length(q, scale), scale_to_length(k, 1.0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


class Block(nn.Module):
    """Attention and MLP, each normalised *after* its branch (res-post-norm).

    Args:
        dim: channels C.
        num_heads: attention heads.
        pretrained_window: as in WindowAttention.
        extra_norm: also normalise the main branch at the end of the block.
    """

    def __init__(self, dim: int, num_heads: int, pretrained_window: int, *, extra_norm: bool) -> None:
        super().__init__()
        self.attn = WindowAttention(dim, num_heads, pretrained_window)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.enorm = nn.LayerNorm(dim) if extra_norm else None
        # None: PyTorch's own operators. Else what residual_norm is to use.
        self.kernel: Kernel | None = None

    def forward(self, x: Tensor, window: int, shift: int, branch_scale: Tensor | None = None) -> Tensor:
        """Map (B, H, W, C) to the same shape; `branch_scale` (2, B, 1, 1, 1) is drop path's factor of each branch."""
        if self.kernel is not None:
            assert branch_scale is None, "a network that learns has no such kernel"
            x = residual_norm(x, self.attn(x, window, shift), self.norm1, kernel=self.kernel)
            return residual_norm(x, self.mlp(x), self.norm2, self.enorm, kernel=self.kernel)
        attention = self.norm1(self.attn(x, window, shift))
        x = x + (attention if branch_scale is None else attention * branch_scale[0])
        hidden = self.norm2(self.mlp(x))
        x = x + (hidden if branch_scale is None else hidden * branch_scale[1])
        return x if self.enorm is None else self.enorm(x)

    @torch.no_grad()
    def attempt(self, kernel: Kernel, dtype: torch.dtype) -> None:
        """Add a branch of a token with a kernel of residual_norm.

        Raises:
            Exception: of any kind, if it cannot.
        """
        x = torch.zeros(1, *self.norm1.normalized_shape, dtype=dtype, device=self.norm1.weight.device)
        residual_norm(x, x, self.norm2, self.enorm, kernel=kernel)


class PatchMerging(nn.Module):
    """Halves a map and doubles its channels; an odd side is padded with zeros first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction: nn.Module = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 * C)."""
        return self.norm(self.reduction(join_neighbours(x)))


def build_stage(
    dim: int,
    depth: int,
    num_heads: int,
    *,
    window_size: int,
    pretrained_window: int,
    extra_norm_interval: int,
    last: bool,
) -> Stage:
    """Build the blocks of one resolution and the step to the next.

    Args:
        dim: channels C.
        depth: number of blocks.
        num_heads: attention heads.
        window_size: side of a window on maps larger than it.
        pretrained_window: as in WindowAttention.
        extra_norm_interval: an extra norm after every so many blocks of this stage; 0: none.
        last: whether no stage follows.
    """
    blocks = (
        Block(
            dim,
            num_heads,
            pretrained_window,
            extra_norm=extra_norm_interval > 0 and (index + 1) % extra_norm_interval == 0,
        )
        for index in range(depth)
    )
    return Stage(blocks, None if last else PatchMerging(dim), window_size=window_size)


class SwinV2(Swin):
    """The SwinV2 network: normalised images in, four raw feature maps out.

    Args:
        size: name in the table of sizes, or a row of its own.
        window_size: side of a window, for all stages or one per stage; None takes the table's. On a map no larger than
            the window a stage uses one window as large as the map's shorter side, unshifted.
        pretrained_window_size: window that scales the coordinates of the position bias, for all stages or one per
            stage. It belongs to the weights: the window each stage really had when they were trained. None: equal to
            `window_size`, which is right for training from scratch.
        extra_norm_interval: overrides the table's.
        **options: as of Swin.

    Raises:
        BackboneError: if a value is out of range or the name is not in the table.
    """

    size: SwinV2Size

    def __init__(
        self,
        size: str | SwinV2Size,
        *,
        window_size: int | Sequence[int] | None = None,
        pretrained_window_size: int | Sequence[int] | None = None,
        extra_norm_interval: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(size, str):
            if size not in SWINV2_SIZES:
                raise BackboneError(f"No SwinV2 is called {size!r}; the sizes are {', '.join(SWINV2_SIZES)}.")
            size = SWINV2_SIZES[size]
        windows, pretrained = stage_windows(size.window_size, window_size, pretrained_window_size)
        interval = size.extra_norm_interval if extra_norm_interval is None else extra_norm_interval
        if interval < 0:
            raise BackboneError(f"extra_norm_interval must be at least 0, found {interval}.")
        stages = (
            build_stage(
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
        super().__init__(size, stages, window_size=windows, pretrained_window_size=pretrained, **options)
        self.extra_norm_interval = interval
        self.residual_norm = Choice("torch", "the default")
        self.init_weights()

    def describe(self) -> dict[str, Any]:
        """Return the windows and what is folded, for the start-up lines and the run folder."""
        described = super().describe()
        folded = "; position bias, logit scale and q, v biases folded" if self.is_folded else ""
        return described | {
            "attention": described["attention"] + folded,
            "residual_norm": str(self.residual_norm),
            "extra_norm_interval": self.extra_norm_interval,
        }

    def choose_kernels(self, config: BackboneConfig, *, dtype: torch.dtype) -> None:
        """Choose as Swin does, and what adds the normalised branches."""
        super().choose_kernels(config, dtype=dtype)
        blocks = [module for module in self.modules() if isinstance(module, Block)]

        def attempt(kernel: Kernel) -> None:
            for one in {(block.norm1.normalized_shape, block.enorm is not None): block for block in blocks}.values():
                one.attempt(kernel, dtype)

        self.residual_norm = choose_kernel(
            "torch" if config.residual_norm == "reference" and not config.frozen else config.residual_norm,
            field="backbone.residual_norm",
            op="residual_norm",
            plain="torch",
            device=blocks[0].norm1.weight.device,
            attempt=attempt,
            dtype=dtype,
            learns=not config.frozen,
        )
        for block in blocks:
            block.kernel = None if self.residual_norm.kernel == "torch" else cast("Kernel", self.residual_norm.kernel)

    def init_weights(self) -> None:
        """Set initial values for training from scratch: every block starts as the identity (its norms are zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Block):
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)


class SwinV2Classifier(SwinV2):
    """SwinV2 with the final norm, mean pooling and a linear classifier: what pretraining trains.

    Args:
        size: as in SwinV2.
        num_classes: number of classes K.
        **kwargs: as in SwinV2.
    """

    def __init__(self, size: str | SwinV2Size, *, num_classes: int, **kwargs) -> None:
        if num_classes < 1:
            raise BackboneError(f"num_classes must be at least 1, found {num_classes}.")
        super().__init__(size, **kwargs)
        self.norm = nn.LayerNorm(self.size.channels[-1])
        self.head = nn.Linear(self.size.channels[-1], num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward_features(self, images: Tensor, *, generator: Generators = None) -> tuple[Tensor, ...]:
        """Compute the four raw maps, as SwinV2 does."""
        return super().forward(images, generator=generator)

    def forward(self, images: Tensor, *, generator: Generators = None) -> Tensor:  # type: ignore[override]  # logits, no maps
        """Map normalised images (B, 3, H, W) to logits (B, K)."""
        last = self.forward_features(images, generator=generator)[-1].permute(0, 2, 3, 1)
        return self.head(self.norm(last).mean(dim=(1, 2)))
