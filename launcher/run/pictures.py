"""Pictures of what heads predict beside what is true, on the same few validation images each time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from permafrost.data.pictures.draw import contact_sheet, side_by_side
from permafrost.data.stream.loader import collate
from permafrost.data.types import Batch, SampleKey
from permafrost.heads.base import world_mean_counts

if TYPE_CHECKING:
    import numpy as np

    from permafrost.data.task import TaskDataset
    from permafrost.launcher.engines.base import Engine
    from permafrost.launcher.run.fine_tune import ImagesOn
    from permafrost.model.frozen import FrozenBackbone

NUM_IMAGES = 4


class Pictures:
    """Draws the first validation images; they are read once, when they are first needed."""

    def __init__(self, dataset: TaskDataset, device: torch.device) -> None:
        self._dataset = dataset
        self._device = device
        self._batch: Batch | None = None

    def draw(self, engines: Mapping[str, Engine], backbone: FrozenBackbone | ImagesOn) -> dict[str, np.ndarray]:
        """Draw a sheet (H, W, 3) uint8 for each head, by name.

        Collective: every rank draws the same, as some engines need all ranks.
        """
        if self._batch is None:
            # Of several views of an image the first.
            groups = self._dataset.groups or [1] * len(self._dataset)
            starts = itertools.accumulate([0, *groups[: min(NUM_IMAGES, len(groups)) - 1]])
            self._batch = collate([self._dataset[SampleKey(0, 0, index)] for index in starts])
        batch = self._batch.to(self._device)
        sheets = {}
        with torch.no_grad():
            features = backbone(batch.images)
            for name, engine in engines.items():
                engine.train(False)
                results = engine(features, batch, world_mean_counts)
                engine.train(True)
                draw = self._dataset.draw
                pairs = [
                    side_by_side(draw(image, result.cpu()), draw(image, target))
                    for image, target, result in zip(self._batch.images, self._batch.targets, results)
                ]
                sheets[name] = contact_sheet(pairs, columns=2)
        return sheets
