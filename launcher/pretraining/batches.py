"""Make batches for pretraining: the curriculum over the glyphs world, and augmentation on tensors.

Everything is a function of (seed, step), so a resumed run sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.data.worlds import glyphs
from permafrost.launcher.pretraining.config import PretrainExperiment

# What a generator is for: one stream of random numbers per purpose and step.
SAMPLING, AUGMENTATION, DROP_PATH = range(3)


def generator(seed: int, purpose: int, step: int) -> torch.Generator:
    """Return a CPU generator of its own for each (seed, purpose, step)."""
    state = int(np.random.SeedSequence([seed, purpose, step]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state & (2**63 - 1))


def difficulty_limit(experiment: PretrainExperiment, step: int) -> float:
    """Return the highest difficulty drawn at a 0-based step; it rises linearly to 1 over the curriculum's share of the run."""
    end = experiment.curriculum * experiment.num_steps
    first = experiment.first_difficulty
    return 1.0 if step >= end else first + (1 - first) * step / end


def train_batches(
    split: glyphs.GlyphSplit, experiment: PretrainExperiment, first_step: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield augmented batches from a step on.

    Yields:
        the step, images (B, 3, S, S) float32 in [0, 1], coverage (B, S, S) float32 in [0, 1] of the visible figure,
        labels (B,) int64.
    """
    by_difficulty = np.argsort(split.difficulties, kind="stable")
    difficulties = split.difficulties[by_difficulty]
    for step in range(first_step, experiment.num_steps):
        limit = difficulty_limit(experiment, step)
        num_allowed = max(experiment.batch_size, int(np.searchsorted(difficulties, limit, side="right")))
        source = generator(experiment.seed, SAMPLING, step)
        drawn = torch.randint(min(num_allowed, len(difficulties)), (experiment.batch_size,), generator=source)
        # Sorted rows read the memory map in one sweep.
        rows = np.sort(by_difficulty[drawn.numpy()])
        pictures = torch.from_numpy(split.images[rows]).permute(0, 3, 1, 2)
        images, coverage = augment(pictures, generator(experiment.seed, AUGMENTATION, step), freedom=limit)
        yield step, images, coverage, torch.from_numpy(split.labels[rows])


def augment(pictures: Tensor, source: torch.Generator, freedom: float = 1.0) -> tuple[Tensor, Tensor]:
    """Augment pictures by a random similarity with reflection, colour and noise.

    A class is an outline up to rotation and reflection, so any of them keeps the label.

    Args:
        pictures: (B, 4, S, S) uint8: RGB and the figure's coverage.
        source: CPU generator, the only source of randomness.
        freedom: in [0, 1], how much of the turning, mirroring and shifting is allowed.

    Returns:
        images (B, 3, S, S) and coverage (B, S, S), float32 in [0, 1].
    """
    count, size = len(pictures), pictures.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=source)

    # Quarter turns keep the corners; a free angle would turn figures out of the picture.
    quarters = torch.randint(4, (count,), generator=source) * (uniform(0, 1) < freedom)
    angle = quarters * (math.pi / 2) + freedom * uniform(-0.3, 0.3)
    scale = torch.exp(uniform(-0.2, 0.25))
    mirror = 1 - 2 * (uniform(0, 1) < freedom / 2).float()
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = (0.04 + 0.08 * freedom) * uniform(-1, 1, 2)
    theta = torch.stack([cosine * mirror, -sine, shift[:, 0], sine * mirror, cosine, shift[:, 1]], dim=1)
    grid = F.affine_grid(theta.view(-1, 2, 3), [count, 4, size, size], align_corners=False)
    warped = F.grid_sample(pictures.float() / 255, grid, padding_mode="reflection", align_corners=False)
    pixels, coverage = warped[:, :3], warped[:, 3]

    channels = torch.rand(count, 3, generator=source).argsort(1)
    pixels = pixels.gather(1, channels[:, :, None, None].expand_as(pixels))
    inverted = (uniform(0, 1, 1, 1, 1) < 0.2).float()
    pixels = pixels + inverted * (1 - 2 * pixels)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (pixels - mean) * uniform(0.6, 1.3, 1, 1, 1) + mean + uniform(-0.15, 0.15, 3, 1, 1)
    noise = torch.randn(pixels.shape, generator=source) * uniform(0, 0.04, 1, 1, 1)
    return (pixels + noise).clamp_(0, 1), coverage
