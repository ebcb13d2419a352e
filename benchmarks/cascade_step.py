"""Measures where the time of a training step goes: Cascade Mask R-CNN with five layers of BiFPN at 1024 x 1024, on frozen features.

    OMP_NUM_THREADS=1 python benchmarks/cascade_step.py [--side 1024] [--images 1] [--objects 20] [--steps 3] [--device cpu]

The head is that of `paper:table5_base_22k` with the Cascade; features are random maps in the shapes of SwinV2-B, targets are blobs.
Each part is timed by itself, what it calls of the others taken off: matching boxes to ground truth, dropping those in crowds,
sampling, pasting ground-truth masks into regions and choosing proposals are pure Python around tensor operations; the rest is
layers. On a GPU every border waits for the device, so the sum is larger than a step in a run. Rows, medians over the steps after a first
one that is not counted, are appended to benchmarks/results/cascade_step.csv. `cpu_ms` is the processor time of the process: on a busy
machine it is nearer to a quiet one's clock than the clock is.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from records import append, processor

from permafrost.data.detection.types import DetectionTarget
from permafrost.data.types import Batch, SampleKey
from permafrost.heads.build import build_head
from permafrost.heads.detection import mask_rcnn, roi, rpn
from permafrost.heads.detection.config import CascadeConfig
from permafrost.heads.detection.pooling import RegionPooling
from permafrost.heads.necks.config import BiFPNConfig
from permafrost.model.spec import FeatureSpec

RESULTS = Path(__file__).parent / "results" / "cascade_step.csv"
SPEC = FeatureSpec(channels=(128, 256, 512, 1024), strides=(4, 8, 16, 32))
NUM_CLASSES = 80
# What is looked up in a module when it is called; one part may have several places.
PARTS = {
    "matching": [(rpn, "match_boxes"), (roi, "match_boxes")],
    "dropping what lies in crowds": [(rpn, "drop_ignored"), (roi, "drop_ignored")],
    "sampling": [(rpn, "sample_balanced"), (roi, "sample_balanced")],
    "rest of choosing regions": [(mask_rcnn, "sample_regions")],
    "pasting masks": [(roi, "project_masks")],
    "anchors": [(rpn, "make_anchors")],
    "proposals": [(rpn.RPN, "propose")],
    "pooling regions": [(RegionPooling, "forward")],
    "neck": [(None, "neck")],
    "proposal network": [(rpn.RPN, "forward")],
    "proposal losses": [(rpn.RPN, "loss")],
    "box branch": [(roi.BoxBranch, "forward")],
    "box losses": [(roi.BoxBranch, "loss")],
    "refining boxes": [(roi.BoxBranch, "refine")],
    "mask branch": [(roi.MaskBranch, "features"), (roi.MaskBranch, "logits")],
    "mask losses": [(roi.MaskBranch, "loss_of")],
}
PURE_PYTHON = (
    "matching", "dropping what lies in crowds", "sampling", "rest of choosing regions", "pasting masks", "anchors", "proposals",
    "refining boxes",
)  # fmt: skip
STEP = "whole step"


class Parts:
    """Clock and processor seconds of nested parts, each without those inside it.

    Args:
        device: waited for at every border.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.own: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._inside: list[list[float]] = []

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what runs inside."""
        start = self._now()
        self._inside.append([0.0, 0.0])
        try:
            yield
        finally:
            spent = [now - then for now, then in zip(self._now(), start)]
            inner = self._inside.pop()
            for i in (0, 1):
                self.own[name][i] += spent[i] - inner[i]
                if self._inside:
                    self._inside[-1][i] += spent[i]

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed


@contextmanager
def timed(parts: Parts, head: torch.nn.Module) -> Iterator[None]:
    """Everything in PARTS is timed inside."""
    replaced = []
    for name, places in PARTS.items():
        for owner, attribute in places:
            where = type(head.neck) if owner is None else owner
            attribute = "forward" if owner is None else attribute
            replaced.append((where, attribute, getattr(where, attribute)))
            setattr(where, attribute, parts.wrap(name, replaced[-1][2]))
    try:
        yield
    finally:
        for where, attribute, function in reversed(replaced):
            setattr(where, attribute, function)


def make_batch(images: int, side: int, objects: int) -> Batch:
    """Images with blobs of 32 pixels to half the side, one of them in a crowd region."""
    random = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    targets = []
    for index in range(images):
        draw = torch.rand(objects, 4, generator=random)
        sizes = 32 * (side / 64) ** draw[:, :2]
        starts = draw[:, 2:] * (side - sizes)
        boxes = torch.cat([starts, starts + sizes], dim=1)
        centres, radii = (boxes[:, :2] + boxes[:, 2:]) / 2, sizes / 2
        masks = torch.stack(
            [
                ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
                for (cx, cy), (rx, ry) in zip(centres.tolist(), radii.tolist())
            ]
        )
        targets.append(
            DetectionTarget(
                image_id=index,
                boxes=boxes,
                labels=torch.randint(NUM_CLASSES, (objects,), generator=random),
                masks=masks,
                ignore_boxes=torch.tensor([[0.0, 0.0, side / 4, side / 4]]),
                size=(side, side),
                original_size=(side, side),
            )
        )
    return Batch(torch.zeros(images, 3, 1, 1, dtype=torch.uint8), targets, [SampleKey(0, 0, i) for i in range(images)])


def measure(
    side: int, images: int, objects: int, steps: int, device: torch.device
) -> list[dict[str, tuple[float, float]]]:
    """Return, for each counted step, clock and processor milliseconds of every part."""
    torch.manual_seed(0)
    config = CascadeConfig(neck=BiFPNConfig(num_layers=5))
    head = build_head(config, spec=SPEC, classes=[f"class {i}" for i in range(NUM_CLASSES)]).to(device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-5)
    batch = make_batch(images, side, objects).to(device)
    features = [
        torch.randn(images, width, side // stride, side // stride, device=device).to(memory_format=torch.channels_last)
        for width, stride in zip(SPEC.channels, SPEC.strides)
    ]
    autocast = (
        torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else torch.autocast("cpu", enabled=False)
    )
    rows = []
    for _ in range(steps + 1):
        parts = Parts(device)
        start, cpu_start = time.perf_counter(), time.process_time()
        with timed(parts, head), parts.part("other"):
            with autocast:
                losses = head(features, batch)
            with parts.part("backward"):
                torch.stack(list(losses.values())).sum().backward()
            with parts.part("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
        whole = (time.perf_counter() - start, time.process_time() - cpu_start)
        assert all(bool(loss.isfinite()) for loss in losses.values())
        assert set(parts.own) == {*PARTS, "backward", "optimizer", "other"}
        rows.append({name: (1e3 * clock, 1e3 * cpu) for name, (clock, cpu) in [*parts.own.items(), (STEP, whole)]})
        print(f"step of {whole[0]:.1f} s", flush=True)
    return rows[1:]


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--objects", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3, help="counted ones")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = measure(options.side, options.images, options.objects, options.steps, options.device)
    medians = {name: [statistics.median(row[name][i] for row in rows) for i in (0, 1)] for name in rows[0]}
    common = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in ("side", "images", "objects", "steps")},
    }
    found = []
    for name, (clock, cpu) in sorted(medians.items(), key=lambda item: -item[1][1]):
        share = cpu / medians[STEP][1] if options.device.type == "cpu" else clock / medians[STEP][0]
        own = {"part": name, "pure_python": name in PURE_PYTHON, "ms": round(clock, 2), "cpu_ms": round(cpu, 2)}
        found.append({**common, **own, "share": round(share, 4)})
        print(
            f"{name:32}{clock:12.1f} ms{cpu:12.1f} ms of processor{share:8.1%}{'  pure Python' if name in PURE_PYTHON else ''}"
        )
    append(options.results, list(found[0]), found)


if __name__ == "__main__":
    main()
