"""Time of our part of a COCO evaluation: detections with masks of 28 x 28 to COCO's entries, on one core.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py [--images 250] [--detections 100]

Images are 640 x 480; boxes have sides of 16 to 400 pixels, log-uniform, and masks are blobs that fill most of them, which is larger than
COCO's objects. pycocotools' encoding of run lengths, which any evaluation pays, is timed apart. What 5,000 images take is the measured
time scaled up. A row is appended to benchmarks/results/evaluation.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import time
from pathlib import Path
from typing import Any

import torch

from permafrost.data.metrics import coco
from permafrost.data.types import DetectionResult

RESULTS = Path(__file__).parent / "results" / "evaluation.csv"
HEIGHT, WIDTH, GRID = 480, 640, 28
NUM_COCO_VAL = 5000


def make_results(num_images: int, num_detections: int) -> list[DetectionResult]:
    """Seeded detections."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.linspace(-1, 1, GRID)
    blob = (1.4 - cells[:, None] ** 2 - cells[None] ** 2).clamp(0, 1)
    results = []
    for image_id in range(1, num_images + 1):
        draw = torch.rand(num_detections, 5, generator=generator)
        sides = 16 * 25 ** draw[:, :2]
        start = draw[:, 2:4] * (torch.tensor([WIDTH, HEIGHT]) - sides)
        noise = torch.rand(num_detections, GRID, GRID, generator=generator)
        results.append(
            DetectionResult(
                image_id=image_id,
                boxes=torch.cat([start, start + sides], dim=1),
                labels=torch.zeros(num_detections, dtype=torch.int64),
                scores=draw[:, 4].sort(descending=True).values,
                masks=(blob + 0.2 * (noise - 0.5)).clamp(0, 1),
                size=(HEIGHT, WIDTH),
                original_size=(HEIGHT, WIDTH),
            )
        )
    return results


class TimedEncoder:
    """pycocotools' mask functions, with the seconds spent in encoding."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def frPyObjects(self, *args: Any) -> Any:
        """As there."""
        start = time.perf_counter()
        found = self._module.frPyObjects(*args)
        self.seconds += time.perf_counter() - start
        return found


def main() -> None:
    """Measure and append a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--detections", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = make_results(options.images, options.detections)
    records = [
        {"id": result.image_id, "file_name": "", "height": HEIGHT, "width": WIDTH, "annotations": []}
        for result in results
    ]
    encoder = coco.mask_api = TimedEncoder(coco.mask_api)
    evaluator = coco.CocoEvaluator(records, ["object"], [1])
    start = time.perf_counter()
    for result in results:
        evaluator.update([result])
    total = time.perf_counter() - start
    scale = NUM_COCO_VAL / options.images
    row = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "images": options.images,
        "detections": options.detections,
        "ours_s": round(total - encoder.seconds, 2),
        "encoding_s": round(encoder.seconds, 2),
        "ours_5000_images_s": round((total - encoder.seconds) * scale, 1),
        "encoding_5000_images_s": round(encoder.seconds * scale, 1),
    }
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(row)


if __name__ == "__main__":
    main()
