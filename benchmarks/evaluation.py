"""Time of our part of a COCO evaluation, from detections with masks of 28 x 28 to the metrics, on one core.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py [--images 250] [--detections 100]

Images are 640 x 480; boxes have sides of 16 to 400 pixels, log-uniform, and masks are blobs that fill most of them, which is larger than
COCO's objects. Each has seven objects of 80 classes, as many as COCO. What is spent inside pycocotools (encoding, indexing, matching,
accumulation), which any evaluation pays, is timed apart. What 5,000 images take is the measured time scaled up. A row is appended to
benchmarks/results/evaluation.csv.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from records import append

import permafrost.data.detection.annotations as data_annotations
from permafrost.data.detection import confusion, evaluator as coco
from permafrost.data.detection.scorers import Scorer
from permafrost.data.detection.types import DetectionResult

RESULTS = Path(__file__).parent / "results" / "evaluation.csv"
HEIGHT, WIDTH, GRID = 480, 640, 28
NUM_COCO_VAL, NUM_CLASSES, NUM_OBJECTS = 5000, 80, 7


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
                labels=torch.randint(NUM_CLASSES, (num_detections,), generator=generator),
                scores=draw[:, 4].sort(descending=True).values,
                masks=(blob + 0.2 * (noise - 0.5)).clamp(0, 1),
                size=(HEIGHT, WIDTH),
                original_size=(HEIGHT, WIDTH),
            )
        )
    return results


def make_records(results: list[DetectionResult]) -> list[dict[str, Any]]:
    """Ground truth: of each image the first detections' boxes, as polygons of twelve points."""
    records = []
    for result in results:
        objects = []
        for (x0, y0, x1, y1), label in zip(result.boxes[:NUM_OBJECTS].tolist(), result.labels.tolist()):
            x, y, width, height = x0, y0, x1 - x0, y1 - y0
            along = (0.25, 0.5, 0.75)
            ring = [(x, y), *((x + s * width, y) for s in along), (x1, y), (x1, y + height / 2), (x1, y1)]
            ring += [*((x1 - s * width, y1) for s in along), (x, y1), (x, y + height / 2)]
            polygon = [value for point in ring for value in point]
            entry = {"bbox": [x, y, width, height], "segmentation": [polygon], "label": label, "iscrowd": 0}
            objects.append({**entry, "area": width * height})
        records.append(
            {"id": result.image_id, "file_name": "", "height": HEIGHT, "width": WIDTH, "annotations": objects}
        )
    return records


class Theirs:
    """Seconds inside pycocotools."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time added up."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start

        return call

    def module(self, module: Any) -> Any:
        """A module whose functions are timed."""
        functions = {name: self.timed(value) for name, value in vars(module).items() if callable(value)}
        return type("Timed", (), {name: staticmethod(function) for name, function in functions.items()})

    def scorer(self) -> Scorer:
        """pycocotools' two classes, timed."""
        index = type("TimedCOCO", (COCO,), {"createIndex": self.timed(COCO.createIndex)})
        names = ("__init__", "evaluate", "accumulate", "summarize")
        return Scorer(
            index, type("TimedEval", (COCOeval,), {name: self.timed(getattr(COCOeval, name)) for name in names})
        )


def measure(results: list[DetectionResult]) -> dict[str, float]:
    """Processor seconds of each of our parts, and inside pycocotools: on a busy machine they are nearer to a quiet one's clock."""
    theirs = Theirs()
    for module in (coco, data_annotations, confusion):
        module.mask_api = theirs.module(module.mask_api)
    evaluator = coco.CocoEvaluator(
        make_records(results), [f"class {i}" for i in range(NUM_CLASSES)], list(range(1, NUM_CLASSES + 1))
    )
    evaluator.scorer = theirs.scorer()
    parts = {
        "taking_in_s": lambda: [evaluator.update([result]) for result in results],
        "gathering_s": lambda: evaluator.merge([evaluator.state()]),
        "files_s": lambda: evaluator.result_files("detection"),
        "scoring_s": evaluator.compute,
        "pictures_s": evaluator.pictures,
    }
    seconds = {}
    for name, part in parts.items():
        start, inside = time.process_time(), theirs.seconds
        part()
        seconds[name] = time.process_time() - start - (theirs.seconds - inside)
    return {"ours_s": sum(seconds.values()), "pycocotools_s": theirs.seconds, **seconds}


def main() -> None:
    """Measure and append a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = measure(make_results(options.images, options.detections))
    scale = NUM_COCO_VAL / options.images
    row = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "images": options.images,
        "detections": options.detections,
        **{name: round(value, 2) for name, value in seconds.items()},
        "ours_5000_images_s": round(seconds["ours_s"] * scale, 1),
    }
    append(options.results, list(row), [row])
    print(row)


if __name__ == "__main__":
    main()
