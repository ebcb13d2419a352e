"""A small smooth head, its data, and how worker scripts report: imported by the worker scripts beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from permafrost.data.types import Batch, SampleKey
from permafrost.heads.base import LossCounts
from permafrost.launcher.engines.base import StepReport

CHANNELS = (5, 3)
GLOBAL_BATCH = 4
LEARNING_RATE = 0.02


class SmoothHead(nn.Module):
    """Two maps in, two weighted losses out: convolution, norm and MLP without a kink, so that rounding is not
    amplified.

    Odd widths and a single-element parameter: no count divides by the number of ranks.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator_state = torch.get_rng_state()
        torch.manual_seed(seed)
        self.convs = nn.ModuleList(nn.Conv2d(channels, 7, 3, padding=1) for channels in CHANNELS)
        self.norm = nn.GroupNorm(1, 7)
        self.mlp = nn.Sequential(nn.Linear(14, 11), nn.Tanh(), nn.Linear(11, 3))
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        torch.set_rng_state(generator_state)

    def forward(self, features, batch: Batch, counts) -> dict[str, Tensor] | list[Tensor]:
        maps = [x.to(self.scale.dtype) for x in features]
        pooled = [torch.tanh(self.norm(conv(x))).mean((2, 3)) for conv, x in zip(self.convs, maps)]
        output = self.mlp(torch.cat(pooled, dim=1)) * self.scale
        if not self.training:
            return list(output.float())
        self.num_forwards += 1
        # Losses in the parameters' precision, whatever autocast computes in.
        output = output.to(self.scale.dtype)
        wanted = torch.stack([target[0] for target in batch.targets]).to(output)
        weights = torch.stack([target[1] for target in batch.targets]).to(output)
        fit = (weights[:, None] * (output - wanted) ** 2).sum() / counts("weight", weights.sum())
        size = (output**2).mean(1).sum() / counts("images", torch.tensor(float(len(batch.targets))))
        return {"fit": fit, "size": 0.1 * size}


def sample(step: int, index: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Features and (target, weight) of one image of one step: weights differ, so a share is not the whole's mean."""
    generator = SampleKey(3, step, index).generator("features")
    maps = [torch.randn(channels, 6, 6, generator=generator) for channels in CHANNELS]
    return maps, (torch.randn(3, generator=generator), torch.rand((), generator=generator) * (index + 0.5))


def micro_batches(
    step: int, rank: int, world_size: int, accumulation: int
) -> Iterator[tuple[tuple[Tensor, ...], Batch, LossCounts]]:
    """(features, batch, counts) of each micro-batch of this rank: a contiguous slice of the global batch."""
    samples = [sample(step, index) for index in range(GLOBAL_BATCH)]
    totals = {"weight": sum(target[1] for _, target in samples), "images": torch.tensor(float(GLOBAL_BATCH))}
    parts = world_size * accumulation
    size = GLOBAL_BATCH // parts

    def counts(name: str, count: Tensor) -> Tensor:
        return (totals[name] / parts).to(count)

    for micro in range(accumulation):
        first = (rank * accumulation + micro) * size
        chosen = samples[first : first + size]
        features = tuple(torch.stack([maps[level] for maps, _ in chosen]) for level in range(len(CHANNELS)))
        keys = [SampleKey(3, step, first + offset) for offset in range(size)]
        yield features, Batch(torch.zeros(size, 3, 1, 1, dtype=torch.uint8), [t for _, t in chosen], keys), counts


def train_step(
    engine, group, step: int, accumulation: int, learning_rate: float = LEARNING_RATE
) -> tuple[dict[str, float], StepReport]:
    """One step on all ranks: (mean losses over ranks and micro-batches, StepReport)."""
    total: dict[str, float] = {}
    for features, batch, counts in micro_batches(step, group.rank, group.world_size, accumulation):
        losses = engine(features, batch, counts)
        engine.backward(sum(losses.values()))
        for name, value in losses.items():
            total[name] = total.get(name, 0.0) + value.item() / accumulation
    report = engine.step(learning_rate)
    return group.all_reduce_mean(total), report


def arguments() -> dict:
    """Return what the test passed: a JSON object on the command line."""
    return json.loads(next(word for word in sys.argv[1:] if word.startswith("{")))


def save_result(group, path: str | Path, result: dict) -> None:
    """Rank 0's result, complete or not there."""
    if group.is_main:
        part = Path(f"{path}.part")
        torch.save(result, part)
        part.rename(path)
    group.barrier()
