"""Define Mask2Former for semantic segmentation: the head, from a backbone's maps to losses or segments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from permafrost.data.segmentation.types import SegmentationResult
from permafrost.data.types import Batch
from permafrost.heads.base import Head, LossCounts, world_mean_counts
from permafrost.heads.errors import HeadError
from permafrost.heads.necks.level_norm import LevelNorm
from permafrost.heads.segmentation.config import Mask2FormerConfig
from permafrost.heads.segmentation.criterion import Criterion
from permafrost.heads.segmentation.pixel_decoder import PixelDecoder
from permafrost.heads.segmentation.transformer_decoder import Prediction, TransformerDecoder
from permafrost.model.spec import FeatureSpec

MAX_CLASSES = 255
"""Labels are bytes, of which one means that nobody knows."""


class Mask2Former(Head):
    """Masked-attention mask transformer (Cheng et al., CVPR 2022).

    The names of its parameters are those that follow `sem_seg_head.` in the released checkpoints, but for `level_norms`,
    which those keep as norms of the backbone.

    Args:
        spec: the backbone's maps.
        classes: names of the K classes.
        config: widths, blocks, losses and kernel.

    Raises:
        HeadError: one map only, or a number of classes that no label map can hold.
    """

    def __init__(self, *, spec: FeatureSpec, classes: Sequence[str], config: Mask2FormerConfig) -> None:
        super().__init__()
        if spec.num_levels < 2:
            raise HeadError(
                f"Mask2Former takes at least two maps, the backbone gives {spec.num_levels} with stride {spec.strides}: choose a "
                "backbone with several levels, or several of its layers at different strides"
            )
        if isinstance(classes, str) or not 1 <= len(classes) <= MAX_CLASSES:
            raise HeadError(f"classes is {classes!r}: give the names of 1 to {MAX_CLASSES} classes")
        self.num_classes = len(classes)
        self.level_norms = nn.ModuleList(
            LevelNorm(channels) if config.level_norm else nn.Identity() for channels in spec.channels
        )
        self.pixel_decoder = PixelDecoder(spec=spec, config=config.pixel_decoder)
        self.predictor = TransformerDecoder(
            channels=config.pixel_decoder.channels,
            num_levels=spec.num_levels - 1,
            num_classes=self.num_classes,
            config=config.transformer_decoder,
        )
        self.criterion = Criterion(num_classes=self.num_classes, config=config.loss)

    def predictions(self, features: Sequence[Tensor]) -> list[Prediction]:
        """Return what the queries say after every block, and before the first; the last is the answer."""
        features = [norm(level) for norm, level in zip(self.level_norms, features, strict=True)]
        return self.predictor(*self.pixel_decoder(features))

    def forward(
        self, features: Sequence[Tensor], batch: Batch, counts: LossCounts = world_mean_counts
    ) -> dict[str, Tensor] | list[SegmentationResult]:
        """Return what `Head` says: losses of all predictions, or the last one as segments."""
        predictions = self.predictions(features)
        if self.training:
            return self.criterion(predictions, batch, counts)
        last = predictions[-1]
        canvas = (batch.images.shape[-2], batch.images.shape[-1])
        scores = last.classes.softmax(dim=-1)[..., :-1].float()
        return [
            SegmentationResult(target.image_id, own, masks, canvas, target.size, target.original_size, target.view)
            for target, own, masks in zip(batch.targets, scores, last.masks.float())
        ]
