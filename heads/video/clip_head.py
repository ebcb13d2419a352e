"""Define what all video heads share: norm of the last map, whatever mixes its tokens, average pool, dropout, classifier, loss.

Shapes: B clips, T frames, h w map size, L = h * w cells, C channels of the map, D channels of the head, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from permafrost.data.types import Batch, SampleKey
from permafrost.data.video.types import ClipResult
from permafrost.heads.base import Head, LossCounts, world_mean_counts
from permafrost.heads.errors import HeadError
from permafrost.heads.video.config import LinearVideoConfig
from permafrost.model.spec import FeatureSpec


class ClipHead(Head):
    """Classifies clips from the backbone's last map of every frame.

    Args:
        spec: the backbone's maps.
        classes: names of the K classes.
        config: norm and dropout.
        width: D, channels that `mix` gives.

    Raises:
        HeadError: fewer than two classes.
    """

    def __init__(self, *, spec: FeatureSpec, classes: Sequence[str], config: LinearVideoConfig, width: int) -> None:
        super().__init__()
        if len(classes) < 2:
            raise HeadError(f"a video head was given {len(classes)} classes: it takes at least 2 to tell clips apart")
        channels = spec.channels[-1]
        self.dropout = config.dropout
        self.level_norm = nn.LayerNorm(channels, eps=1e-5) if config.level_norm else nn.Identity()
        self.classifier = nn.Linear(width, len(classes))
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def mix(self, tokens: Tensor, map_size: tuple[int, int], keys: Sequence[SampleKey]) -> Tensor:
        """Map (B, T, L, C) tokens to (B, T, L, D); a head that looks at no order returns them as they are."""
        raise NotImplementedError

    def logits(self, features: Sequence[Tensor], keys: Sequence[SampleKey]) -> Tensor:
        """Return (B, K) logits, float32 (float64 for a float64 head).

        Args:
            features: one (B, T, C_i, h_i, w_i) map per level; the last one is read.
            keys: one per clip; what training drops is drawn from them.

        Raises:
            HeadError: the maps are not those of clips.
        """
        clip = features[-1]
        if clip.ndim != 5:
            raise HeadError(
                f"a video head takes maps of clips, (B, T, C, h, w), and was given {tuple(clip.shape)}: its data must be clips"
            )
        weight = self.classifier.weight
        tokens = clip.permute(0, 1, 3, 4, 2).flatten(2, 3)
        tokens = self.level_norm(tokens.to(weight.dtype))
        tokens = self.mix(tokens, (clip.shape[-2], clip.shape[-1]), keys)
        # The mean of thousands of tokens, in the parameters' precision whatever autocast made of them.
        pooled = tokens.to(weight.dtype).mean(dim=(1, 2))
        if self.training and self.dropout > 0:
            pooled = pooled * self._kept_channels(keys, pooled)
        return self.classifier(pooled).to(weight.dtype)

    def _kept_channels(self, keys: Sequence[SampleKey], like: Tensor) -> Tensor:
        """Return (B, D): 0 for a dropped channel, 1 / (1 - dropout) for a kept one, drawn from each clip's own key."""
        draws = [torch.rand(like.shape[1], generator=key.generator("video/dropout")) for key in keys]
        kept = (torch.stack(draws) >= self.dropout).to(like.dtype) / (1 - self.dropout)
        return kept.to(like.device, non_blocking=True)

    def forward(
        self, features: Sequence[Tensor], batch: Batch, counts: LossCounts = world_mean_counts
    ) -> dict[str, Tensor] | list[ClipResult]:
        """Return what `Head` says: in training the cross-entropy summed over this rank's clips and divided by their global count."""
        logits = self.logits(features, batch.keys)
        if not self.training:
            scores = logits.float().softmax(dim=1)
            return [
                ClipResult(target.video_id, target.view, score, target.is_readable)
                for target, score in zip(batch.targets, scores)
            ]
        labels = torch.stack([target.label for target in batch.targets])
        num_clips = counts("clips", torch.tensor(float(len(labels)), device=logits.device))
        return {"classification": F.cross_entropy(logits, labels, reduction="sum") / num_clips}
