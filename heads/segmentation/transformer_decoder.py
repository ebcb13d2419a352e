"""Define the masked-attention decoder: queries look at the maps within the mask they last predicted.

Module names are those of the released Mask2Former checkpoints (`sem_seg_head.predictor.*`), so that their weights fit.

Shapes: B images, Q queries, C channels, K classes, H W size of the finest map, h w of a coarser one, A heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.heads.segmentation.config import TransformerDecoderConfig
from permafrost.heads.segmentation.positions import sine_positions


@dataclass
class Prediction:
    """The queries' answer after one block.

    Attributes:
        classes: (B, Q, K + 1) logits, the last one for no segment; in the parameters' precision.
        masks: (B, Q, H, W) logits, likewise.
    """

    classes: Tensor
    masks: Tensor


class CrossAttention(nn.Module):
    """Queries attend to the cells of one map inside their masks."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, code: Tensor, cells: Tensor, places: Tensor, hidden: Tensor) -> Tensor:
        """Return (B, Q, C): the queries with what they see of one map.

        Args:
            x: (B, Q, C).
            code: (Q, C), added to the queries.
            cells: (B, h * w, C).
            places: (h * w, C), added to the keys.
            hidden: (B * A, Q, h * w) bool, True where a query does not look.
        """
        seen, _ = self.multihead_attn(x + code, cells + places, cells, attn_mask=hidden, need_weights=False)
        return self.norm(x + seen)


class SelfAttention(nn.Module):
    """Queries attend to one another."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """Map (B, Q, C) to the same shape; `code` (Q, C) is added to queries and keys."""
        coded = x + code
        seen, _ = self.self_attn(coded, coded, x, need_weights=False)
        return self.norm(x + seen)


class FeedForward(nn.Module):
    """Two layers."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, hidden_channels)
        self.linear2 = nn.Linear(hidden_channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, Q, C) to the same shape."""
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class MaskEmbedding(nn.Module):
    """Three layers from a query to what its mask's cells look like."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(channels, channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, Q, C) to the same shape."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def _rows(table: nn.Embedding) -> Tensor:
    """Return all rows of a table, by a call of it: ZeRO 3 brings a module's parameters only while it is called."""
    return table(torch.arange(table.num_embeddings, device=table.weight.device))


class TransformerDecoder(nn.Module):
    """num_blocks blocks of masked cross-attention, self-attention and two layers; a prediction before the first and after each.

    Args:
        channels: C.
        num_levels: maps that take turns in being attended to.
        num_classes: K.
        config: queries, blocks and widths.
    """

    def __init__(self, *, channels: int, num_levels: int, num_classes: int, config: TransformerDecoderConfig) -> None:
        super().__init__()
        blocks, heads = range(config.num_blocks), config.num_heads
        self.num_heads = heads
        self.transformer_cross_attention_layers = nn.ModuleList(CrossAttention(channels, heads) for _ in blocks)
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttention(channels, heads) for _ in blocks)
        self.transformer_ffn_layers = nn.ModuleList(FeedForward(channels, config.ffn_channels) for _ in blocks)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        self.decoder_norm = nn.LayerNorm(channels)
        self.query_feat = nn.Embedding(config.num_queries, channels)
        self.query_embed = nn.Embedding(config.num_queries, channels)
        self.level_embed = nn.Embedding(num_levels, channels)
        self.class_embed = nn.Linear(channels, num_classes + 1)
        self.mask_embed = MaskEmbedding(channels)

    def forward(self, mask_features: Tensor, maps: Sequence[Tensor]) -> list[Prediction]:
        """Return num_blocks + 1 predictions, the last one the head's answer.

        Args:
            mask_features: (B, C, H, W).
            maps: (B, C, h, w) each, coarsest first.
        """
        batch, channels = mask_features.shape[:2]
        sizes = [(level.shape[-2], level.shape[-1]) for level in maps]
        places = [sine_positions(*size, channels, like=mask_features) for size in sizes]
        cells = [level.flatten(2).mT + own for level, own in zip(maps, _rows(self.level_embed), strict=True)]
        x = _rows(self.query_feat).expand(batch, -1, -1)  # (B, Q, C)
        code = _rows(self.query_embed)  # (Q, C)
        predictions = [self._predict(x, mask_features)]
        blocks = zip(
            self.transformer_cross_attention_layers, self.transformer_self_attention_layers, self.transformer_ffn_layers
        )
        for number, (look, talk, think) in enumerate(blocks):
            level = number % len(maps)
            hidden = self._hidden(predictions[-1].masks, sizes[level])  # (B * A, Q, h * w)
            x = think(talk(look(x, code, cells[level], places[level], hidden), code))
            predictions.append(self._predict(x, mask_features))
        return predictions

    def _predict(self, x: Tensor, mask_features: Tensor) -> Prediction:
        precise = self.decoder_norm.weight.dtype
        x = self.decoder_norm(x)
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(x), mask_features)
        return Prediction(self.class_embed(x).to(precise), masks.to(precise))

    @torch.no_grad()
    def _hidden(self, masks: Tensor, size: tuple[int, int]) -> Tensor:
        """Return (B * A, Q, h * w) bool: cells outside each query's mask; a query whose mask is empty sees everything."""
        # A probability below a half is a logit below zero.
        outside = F.interpolate(masks.detach(), size=size, mode="bilinear", align_corners=False).flatten(2) < 0
        outside &= ~outside.all(dim=2, keepdim=True)
        return outside.repeat_interleave(self.num_heads, dim=0)
