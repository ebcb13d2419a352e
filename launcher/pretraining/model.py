"""Build the network of pretraining: a classifier, its starting values, and read-outs that are thrown away afterwards.

The label is one per picture, but it is also asked for place by place: which places of the fine maps belong to the
figure, and which class the places of the third map show. Measured on the nano network: from the picture's label alone,
SwinV2's own starting values and no curriculum it was still at chance after 64,000 pictures; with read-outs, the
starting values below and easy pictures first it left chance after 10,000.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.launcher.pretraining.config import PretrainExperiment
from permafrost.model.spec import FeatureSpec
from permafrost.model.swin.v2 import Block, SwinV2Classifier

# Per-channel statistics (RGB, [0, 1]) that the network's input is normalised with: ImageNet's, as for every Swin.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# A place of the third map shows the figure when it covers at least this share of it.
_FIGURE_SHARE = 0.25


def build_classifier(experiment: PretrainExperiment, num_classes: int) -> SwinV2Classifier:
    """Build a network with the windows it will really have at the recipe's image size, ready to be trained in a short run.

    SwinV2's own starting values make every block the identity and let it in slowly, over hundreds of epochs. Here the
    blocks count from the first step: unit norms, and linear layers that keep the variance of their input.
    """
    model = SwinV2Classifier(
        experiment.backbone,
        num_classes=num_classes,
        window_size=experiment.windows,
        pretrained_window_size=experiment.windows,
        drop_path_rate=experiment.drop_path_rate,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.head:
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, Block):
            nn.init.ones_(module.norm1.weight)
            nn.init.ones_(module.norm2.weight)
    return model


class Readouts(nn.Module):
    """Linear read-outs of the first three maps: figure or ground (strides 4 and 8), class or ground (stride 16).

    Args:
        spec: channels and strides of the maps.
        num_classes: number of classes K; label K is the ground.
    """

    def __init__(self, spec: FeatureSpec, num_classes: int) -> None:
        super().__init__()
        self.strides = spec.strides[:3]
        self.num_classes = num_classes
        outputs = (1, 1, num_classes + 1)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, count))
            for channels, count in zip(spec.channels[:3], outputs, strict=True)
        )

    def forward(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        """Return logits (B, H_i, W_i, 1 or K + 1) of the first three maps (B, C_i, H_i, W_i)."""
        return [level(x.permute(0, 2, 3, 1)).float() for level, x in zip(self.levels, features[:3], strict=True)]

    def loss(self, logits: list[Tensor], coverage: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """Return the mean binary cross-entropy of the two fine maps plus the cross-entropy of the third.

        Args:
            logits: what `forward` returned.
            coverage: (B, S, S), the visible figure in [0, 1].
            labels: (B,).
            label_smoothing: of the class.

        Returns:
            a scalar. In the class term figure and ground weigh the same, whatever the figure's size.
        """
        shares = [F.avg_pool2d(coverage[:, None], stride)[:, 0] for stride in self.strides]
        fine = [
            F.binary_cross_entropy_with_logits(level[..., 0], share)
            for level, share in zip(logits[:2], shares[:2], strict=True)
        ]
        figure = shares[2] >= _FIGURE_SHARE
        target = torch.where(figure, labels[:, None, None], self.num_classes)
        places = F.cross_entropy(
            logits[2].permute(0, 3, 1, 2), target, reduction="none", label_smoothing=label_smoothing
        )
        halves = [(places * part).sum() / part.sum().clamp(min=1) for part in (figure, ~figure)]
        return (fine[0] + fine[1]) / 2 + (halves[0] + halves[1]) / 2


def forward_all(
    model: SwinV2Classifier, readouts: Readouts, images: Tensor, generator: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """Return image logits (B, K) float32 and the read-outs of images (B, 3, S, S) in [0, 1], through one forward."""
    features = model.forward_features(normalise(images), generator=generator)
    pooled = model.norm(features[-1].permute(0, 2, 3, 1)).mean(dim=(1, 2))
    return model.head(pooled).float(), readouts(features)


def normalise(images: Tensor) -> Tensor:
    """Normalise images (B, 3, H, W) in [0, 1] by the network's statistics."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def build_optimizer(modules: tuple[nn.Module, ...], experiment: PretrainExperiment) -> torch.optim.AdamW:
    """Build AdamW with two groups: matrices are decayed; norms, biases, logit scales and the position bias MLP are not."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            plain = parameter.ndim < 2 or "logit_scale" in name or "cpb_mlp" in name
            (others if plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": experiment.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=experiment.learning_rate, betas=(0.9, 0.98), fused=True)
