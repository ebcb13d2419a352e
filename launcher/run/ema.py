"""Keep the running average of a head's weights (EMA) where its engine keeps the weights, whatever parts these are in.

    average = decay * average + (1 - decay) * weights        after every step that was taken

with decay rising as (1 + n) / (10 + n) in the first n steps, as in TensorFlow's ExponentialMovingAverage, so that a short run is
not an average of its first weights. Each rank averages what its optimizer steps; nothing is sent. Buffers (statistics of norms)
are not averaged: they are those of the trained head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from permafrost.launcher.engines.base import Engine


class Average:
    """The average of one head's weights. Every method is called by all ranks, between steps."""

    def __init__(self, engine: Engine, decay: float) -> None:
        """Begin with the weights that the engine has now.

        Args:
            engine: of the head.
            decay: between 0 and 1, for steps late in a run.
        """
        self.decay = decay
        self.num_updates = 0
        self._engine = engine
        self._averages = self._weights()

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights in after a step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for average, weight in zip(self._averages, self._engine.masters(), strict=True):
            average.lerp_(weight, 1 - decay)

    @torch.no_grad()
    def export(self) -> dict[str, Tensor]:
        """Return the full averages by the parameters' names, CPU tensors on every rank. Collective."""
        kept = self._weights()
        self._fill(self._averages)
        full = self._engine.export_parameters()
        self._fill(kept)
        return full

    def load(self, parameters: Mapping[str, Tensor], num_updates: int) -> None:
        """Go on from what `export` gave after so many updates. Collective."""
        trained = self._engine.export_parameters()
        self._engine.load_parameters(parameters)
        self._averages, self.num_updates = self._weights(), num_updates
        self._engine.load_parameters(trained)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Give the head the averages for weights while inside; its optimizer must not step. Collective."""
        trained = self._engine.export_parameters()
        self._engine.load_parameters(self.export())
        yield
        # Not after an exception: the other ranks may be gone, and the run is over.
        self._engine.load_parameters(trained)

    def _weights(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._engine.masters()]

    def _fill(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self._engine.masters(), values, strict=True):
            tensor.copy_(value)
