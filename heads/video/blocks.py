"""Define Transformer blocks over the tokens of a clip, and the head made of them.

Shapes: B clips, T frames, L cells, S tokens that attend to one another, N sequences of one clip (N * S = T * L), A
attention heads, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.data.types import SampleKey
from permafrost.heads.errors import HeadError
from permafrost.heads.video.clip_head import ClipHead
from permafrost.heads.video.config import BlocksVideoConfig
from permafrost.heads.video.positions import make_positions
from permafrost.model.spec import FeatureSpec


class Block(nn.Module):
    """A pre-norm Transformer block (Vaswani et al. 2017; Dosovitskiy et al. 2021).

    Args:
        channels: D.
        num_heads: A.
        mlp_ratio: hidden channels of the MLP over D.
    """

    def __init__(self, channels: int, *, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        hidden = int(channels * mlp_ratio)
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """Let the S tokens of each sequence attend to one another.

        Args:
            x: (B, N, S, D).
            scales: (2, B), what the two residual branches of each clip are multiplied by; None: 1.
        """
        attention, mlp = (None, None) if scales is None else scales.view(2, -1, 1, 1, 1)
        x = _add(x, self._attend(self.norm1(x)), attention)
        return _add(x, self.mlp(self.norm2(x)), mlp)

    def _attend(self, x: Tensor) -> Tensor:
        num_clips, num_sequences, length, channels = x.shape
        qkv = self.qkv(x).view(num_clips * num_sequences, length, 3, self.num_heads, channels // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.projection(mixed.transpose(1, 2).reshape(num_clips, num_sequences, length, channels))


def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    return x + branch if scale is None else x + branch * scale.to(branch.dtype)


class BlocksHead(ClipHead):
    """A clip head whose tokens pass position codes, n blocks and a last norm.

    Args:
        spec: the backbone's maps.
        classes: names of the K classes.
        config: blocks, codes, norm and dropout.
        axes: which of "frames", "rows", "columns" the position codes tell apart.

    Raises:
        HeadError: the width does not divide into attention heads.
    """

    def __init__(
        self, *, spec: FeatureSpec, classes: Sequence[str], config: BlocksVideoConfig, axes: Sequence[str]
    ) -> None:
        channels = spec.channels[-1]
        width = channels if config.width is None else config.width
        if width % config.head_channels:
            raise HeadError(
                f"width is {width} and head_channels {config.head_channels}: the blocks' channels must be a multiple of "
                f"the channels of an attention head; the backbone's last map has {channels}"
            )
        super().__init__(spec=spec, classes=classes, config=config, width=width)
        self.embed = nn.Identity() if config.width is None else nn.Linear(channels, width)
        self.positions = make_positions(
            config.position, width, axes, num_frames=config.num_frames, map_side=config.map_side
        )
        self.blocks = nn.ModuleList(
            Block(width, num_heads=width // config.head_channels, mlp_ratio=config.mlp_ratio)
            for _ in range(config.num_blocks)
        )
        self.norm = nn.LayerNorm(width)
        last = max(1, config.num_blocks - 1)
        self.drop_rates = [config.drop_path * index / last for index in range(config.num_blocks)]
        for part in (self.embed, *self.blocks):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)

    def fold(self, tokens: Tensor) -> Tensor:
        """Fold (B, T, L, D) tokens to (B, N, S, D): the S of a sequence attend to one another."""
        raise NotImplementedError

    def unfold(self, sequences: Tensor, num_frames: int) -> Tensor:
        """Undo `fold`: (B, N, S, D) to (B, T, L, D)."""
        raise NotImplementedError

    def mix(self, tokens: Tensor, map_size: tuple[int, int], keys: Sequence[SampleKey]) -> Tensor:
        """Map (B, T, L, C) tokens to (B, T, L, D)."""
        num_frames = tokens.shape[1]
        tokens = self.embed(tokens)
        if self.positions is not None:
            codes = self.positions((num_frames, *map_size))
            tokens = tokens + codes.flatten(1, 2).to(tokens.dtype)
        x = self.fold(tokens)
        scales = self._drop_scales(keys, x)
        for index, block in enumerate(self.blocks):
            x = block(x, None if scales is None else scales[index])
        return self.unfold(self.norm(x), num_frames)

    def _drop_scales(self, keys: Sequence[SampleKey], like: Tensor) -> Tensor | None:
        """Draw (blocks, 2, B) of stochastic depth (Huang et al. 2016) from each clip's own key; a dropped branch is still computed."""
        if not self.training or not any(self.drop_rates):
            return None
        keep = 1 - torch.tensor(self.drop_rates).view(-1, 1)
        draws = [torch.rand(len(self.drop_rates), 2, generator=key.generator("video/drop_path")) for key in keys]
        kept = torch.stack([(draw < keep) / keep for draw in draws], dim=-1)
        return kept.to(like.device, like.dtype, non_blocking=True)
