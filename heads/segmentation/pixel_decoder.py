"""Define the pixel decoder: deformable attention mixes the coarser maps, and the finest is brought up to them.

Module names are those of the released Mask2Former checkpoints (`sem_seg_head.pixel_decoder.*`), so that their weights fit.

Shapes: B images, C channels, H W size of a map, N maps that attend (all but the finest), S cells of those maps, A heads,
D head dim, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost._modules import module_list
from permafrost.heads.necks.norms import make_norm
from permafrost.heads.segmentation.config import PixelDecoderConfig
from permafrost.heads.segmentation.positions import sine_positions
from permafrost.model.kernels.deformable_attention import deformable_attention
from permafrost.model.spec import FeatureSpec


class DeformableAttention(nn.Module):
    """Every cell reads a few points around itself, in every map (Zhu et al. 2021, section 4.1).

    Args:
        config: width, heads, points and kernel.
        num_levels: N.
    """

    def __init__(self, *, config: PixelDecoderConfig, num_levels: int) -> None:
        super().__init__()
        channels, heads, points = config.channels, config.num_heads, config.num_points
        self.shape = (heads, num_levels, points)
        self.kernel = config.kernel
        self.sampling_offsets = nn.Linear(channels, heads * num_levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * num_levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)

    def reset_parameters(self) -> None:
        """Let all queries look alike at first: head a towards an angle of its own, point p at a distance of p + 1 cells."""
        heads, num_levels, points = self.shape
        angle = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
        towards = torch.stack([angle.cos(), angle.sin()], dim=1)
        towards = towards / towards.abs().amax(dim=1, keepdim=True)
        distance = torch.arange(1, points + 1, dtype=torch.float32)
        start = (towards[:, None, None] * distance[:, None]).expand(-1, num_levels, -1, -1)
        for module in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(start.flatten())
        for module in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, positions: Tensor, centres: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Return (B, S, C): every token with what it reads of all maps.

        Args:
            tokens: (B, S, C).
            positions: (S, C), added to what offsets and weights are computed from.
            centres: (S, 2), x and y of each cell's centre in 0..1.
            sizes: (height, width) of each map.
        """
        batch, cells, channels = tokens.shape
        heads, num_levels, points = self.shape
        queries = tokens + positions
        # Offsets count cells of the map that is read.
        extents = tokens.new_tensor([[width, height] for height, width in sizes])
        offsets = self.sampling_offsets(queries).view(batch, cells, heads, num_levels, points, 2)
        locations = centres[:, None, None, None] + offsets / extents[:, None]
        weights = self.attention_weights(queries).view(batch, cells, heads, num_levels * points).softmax(dim=-1)
        weights = weights.view(batch, cells, heads, num_levels, points)
        value = self.value_proj(tokens).view(batch, cells, heads, channels // heads)
        return self.output_proj(deformable_attention(value, sizes, locations, weights, kernel=self.kernel))


class EncoderBlock(nn.Module):
    """Deformable attention and a two-layer network, each followed by the norm of its sum with what went in."""

    def __init__(self, *, config: PixelDecoderConfig, num_levels: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(config=config, num_levels=num_levels)
        self.norm1 = nn.LayerNorm(config.channels)
        self.linear1 = nn.Linear(config.channels, config.ffn_channels)
        self.linear2 = nn.Linear(config.ffn_channels, config.channels)
        self.norm2 = nn.LayerNorm(config.channels)

    def forward(self, tokens: Tensor, positions: Tensor, centres: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Map (B, S, C) tokens to the same shape; arguments are those of DeformableAttention.forward."""
        tokens = self.norm1(tokens + self.self_attn(tokens, positions, centres, sizes))
        return self.norm2(tokens + self.linear2(F.relu(self.linear1(tokens))))


class Encoder(nn.Module):
    """Blocks in a row; a module of its own for its name in checkpoints."""

    def __init__(self, *, config: PixelDecoderConfig, num_levels: int) -> None:
        super().__init__()
        self.layers = module_list(EncoderBlock(config=config, num_levels=num_levels) for _ in range(config.num_blocks))


class DeformableEncoder(nn.Module):
    """The maps as one row of tokens through all blocks."""

    def __init__(self, *, config: PixelDecoderConfig, num_levels: int) -> None:
        super().__init__()
        self.encoder = Encoder(config=config, num_levels=num_levels)
        self.level_embed = nn.Parameter(torch.empty(num_levels, config.channels))
        for parameter in self.encoder.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for block in self.encoder.layers:
            block.self_attn.reset_parameters()
        nn.init.normal_(self.level_embed)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map (B, C, H_i, W_i) maps to the same shapes."""
        sizes = [(level.shape[-2], level.shape[-1]) for level in maps]
        channels = maps[0].shape[1]
        tokens = torch.cat([level.flatten(2).mT for level in maps], dim=1)
        positions = torch.cat(
            [
                sine_positions(*size, channels, like=tokens) + own
                for size, own in zip(sizes, self.level_embed.to(tokens.dtype))
            ]
        )
        centres = torch.cat([cell_centres(*size, like=tokens) for size in sizes])
        for block in self.encoder.layers:
            tokens = block(tokens, positions, centres, sizes)
        parts = tokens.split([height * width for height, width in sizes], dim=1)
        return [part.mT.reshape(-1, channels, *size) for part, size in zip(parts, sizes)]


def cell_centres(height: int, width: int, *, like: Tensor) -> Tensor:
    """Return (H * W, 2) x and y of the cells' centres in 0..1, by rows."""
    y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
    x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=2).flatten(0, 1)


class ConvNorm(nn.Conv2d):
    """A convolution without bias and a group norm, which hangs below it, as in the released checkpoints."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = make_norm("group", out_channels)
        nn.init.kaiming_uniform_(self.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H, W)."""
        return self.norm(super().forward(x))


class PixelDecoder(nn.Module):
    """From the backbone's maps to the maps that queries attend to, and to an embedding of every cell of the finest.

    Computes in the parameters' precision whatever autocast says, as the released code does.

    Args:
        spec: the backbone's maps, at least two; the finest only enters at the end.
        config: widths, blocks and kernel.
    """

    def __init__(self, *, spec: FeatureSpec, config: PixelDecoderConfig) -> None:
        super().__init__()
        channels = config.channels
        coarse_first = spec.channels[:0:-1]
        self.input_proj = module_list(
            nn.Sequential(nn.Conv2d(own, channels, 1), make_norm("group", channels)) for own in coarse_first
        )
        for conv in (projection[0] for projection in self.input_proj):
            assert isinstance(conv, nn.Conv2d)
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        self.transformer = DeformableEncoder(config=config, num_levels=len(coarse_first))
        self.adapter_1 = ConvNorm(spec.channels[0], channels, 1)
        self.layer_1 = ConvNorm(channels, channels, 3)
        self.mask_features = nn.Conv2d(channels, channels, 1)
        nn.init.kaiming_uniform_(self.mask_features.weight, a=1)
        if self.mask_features.bias is not None:
            nn.init.zeros_(self.mask_features.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the (B, C, H, W) embedding of the finest map's cells, and the N other maps (B, C, H_i, W_i), coarsest first."""
        with torch.autocast(features[0].device.type, enabled=False):
            dtype = self.mask_features.weight.dtype
            maps = [level.to(dtype) for level in features]
            maps, finest = maps[:0:-1], maps[0]
            maps = self.transformer([project(level) for project, level in zip(self.input_proj, maps, strict=True)])
            lateral = self.adapter_1(finest)
            up = F.interpolate(maps[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            return self.mask_features(F.relu(self.layer_1(lateral + up))), maps
