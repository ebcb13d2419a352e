"""Define Swin V1: a hierarchical vision transformer with shifted windows, dense on any input size.

Follows "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (Liu et al., ICCV 2021): scaled dot
product attention with a table of position biases per block, normalisation before each residual branch and before the
reduction between stages. What it shares with SwinV2, and the legend of the shapes, is in permafrost.model.swin.parts.

The tables belong to one window. Two things can ask for another:

- A map smaller than the window. The stage then uses a window as large as the map's shorter side, as the released
  classifiers do, and of the table the offsets that occur in it: its middle.
- A configured window other than that of training. The table is resampled once for the configured window, as the
  released code does when its window changes, and a smaller map takes the middle of the resampled table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.model.errors import BackboneError
from permafrost.model.spec import SWIN_V1_SIZES, SwinV1Size
from permafrost.model.swin.parts import Mlp, ShiftedWindowAttention, Stage, Swin, join_neighbours, stage_windows


def resample_table(table: Tensor, window: int) -> Tensor:
    """Resample position biases for another window.

    Each head's (2P - 1) x (2P - 1) biases are a picture over the offsets, which is stretched to (2W - 1) x (2W - 1):
    offset d of the new window takes the value at d * (2P - 1) / (2W - 1) of the old. Between entries it is interpolated
    with cubic convolution (a = -0.75; at the border the outermost entry is repeated), which the released code uses as
    well. Computed in float32 or better.

    Args:
        table: (A, 2P - 1, 2P - 1), P being the window of training.
        window: the other window W.

    Returns:
        (A, 2W - 1, 2W - 1); the table itself if the window is its own.
    """
    if table.shape[-1] == 2 * window - 1:
        return table
    precise = table.to(torch.promote_types(table.dtype, torch.float32))
    return F.interpolate(precise[None], size=2 * window - 1, mode="bicubic", align_corners=False)[0]


class WindowAttention(ShiftedWindowAttention):
    """Scaled dot product self-attention within (shifted) windows of a map, with a table of position biases.

    Args:
        dim: channels C.
        num_heads: heads A.
        window_size: the configured window.
        pretrained_window: window the table belongs to.
    """

    cosine = False

    def __init__(self, dim: int, num_heads: int, window_size: int, pretrained_window: int) -> None:
        super().__init__(num_heads)
        self.window_size = window_size
        self.pretrained_window = pretrained_window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * pretrained_window - 1) ** 2, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def compute_constants(self, window: int) -> tuple[Tensor, float, Tensor]:
        """Compute all that depends on the parameters but not on the image.

        Args:
            window: side of the window that is used, at most the configured one.

        Returns:
            The bias of q, k, v (3 * C,); the logit scale 1 / sqrt(D); the position bias of every offset
            (A, (2 * window - 1) ** 2), in float32 or better.
        """
        table: Tensor = self.relative_position_bias_table
        side = 2 * self.pretrained_window - 1
        table = table.to(torch.promote_types(table.dtype, torch.float32)).t().reshape(self.num_heads, side, side)
        table = resample_table(table, self.window_size)
        # Offsets count from the middle.
        outside = self.window_size - window
        if outside:
            table = table[:, outside:-outside, outside:-outside]
        scale = 1.0 / math.sqrt(self.qkv.in_features // self.num_heads)
        return self.qkv.bias, scale, table.reshape(self.num_heads, -1).contiguous()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor) -> Tensor:  # type: ignore[override]  # its own constant
        """Attend by dot product within each window: q, k, v (N, A, L, D), bias (1, A, L, L) -> (N, A, L, D)."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


class Block(nn.Module):
    """Attention and MLP, each normalised *before* its branch.

    Args:
        dim: channels C.
        num_heads: attention heads.
        window_size, pretrained_window: as in WindowAttention.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, pretrained_window: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size, pretrained_window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, window: int, shift: int, branch_scale: Tensor | None = None) -> Tensor:
        """Map (B, H, W, C) to the same shape; `branch_scale` (2, B, 1, 1, 1) is drop path's factor of each branch."""
        # Normalised before it is padded: padded tokens are zero, not the norm's bias.
        attention = self.attn(self.norm1(x), window, shift)
        x = x + (attention if branch_scale is None else attention * branch_scale[0])
        hidden = self.mlp(self.norm2(x))
        return x + (hidden if branch_scale is None else hidden * branch_scale[1])


class PatchMerging(nn.Module):
    """Halves a map and doubles its channels; an odd side is padded with zeros first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 * C)."""
        return self.reduction(self.norm(join_neighbours(x)))


class SwinV1(Swin):
    """The Swin V1 network: normalised images in, four raw feature maps out.

    Args:
        size: name in the table of sizes, or a row of its own.
        window_size: side of a window, for all stages or one per stage; None takes the table's. On a map no larger than
            the window a stage uses one window as large as the map's shorter side, unshifted.
        pretrained_window_size: window that the position tables belong to, for all stages or one per stage; they are
            resampled where it is not `window_size`. None: equal to `window_size`.
        **options: as of Swin.

    Raises:
        BackboneError: if a value is out of range or the name is not in the table.
    """

    def __init__(
        self,
        size: str | SwinV1Size,
        *,
        window_size: int | Sequence[int] | None = None,
        pretrained_window_size: int | Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(size, str):
            if size not in SWIN_V1_SIZES:
                raise BackboneError(f"No Swin V1 is called {size!r}; the sizes are {', '.join(SWIN_V1_SIZES)}.")
            size = SWIN_V1_SIZES[size]
        windows, pretrained = stage_windows(size.window_size, window_size, pretrained_window_size)
        last = len(size.depths) - 1
        stages = (
            Stage(
                [Block(dim, size.num_heads[stage], windows[stage], pretrained[stage]) for _ in range(depth)],
                None if stage == last else PatchMerging(dim),
                window_size=windows[stage],
            )
            for stage, (dim, depth) in enumerate(zip(size.channels, size.depths, strict=True))
        )
        super().__init__(size, stages, window_size=windows, pretrained_window_size=pretrained, **options)
        self.init_weights()

    def describe(self) -> dict[str, Any]:
        """Return the windows, what was resampled and what is folded, for the start-up lines and the run folder."""
        pairs = enumerate(zip(self.pretrained_window_size, self.window_size, strict=True))
        resampled = [f"stage {stage + 1} from window {old} to {new}" for stage, (old, new) in pairs if old != new]
        described = super().describe()
        return described | {
            "position_tables": f"resampled (bicubic): {', '.join(resampled)}" if resampled else "as trained",
            "attention": described["attention"] + ("; position bias folded" if self.is_folded else ""),
        }

    def init_weights(self) -> None:
        """Set initial values for training from scratch."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
