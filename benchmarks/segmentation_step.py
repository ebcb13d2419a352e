"""A training step of Mask2Former at 640 x 640, split: backbone, head's forward, matching, losses, backward.

    python benchmarks/segmentation_step.py [--batch 1] [--pixel-blocks 1 6] [--transformer-blocks 3 9] [--repeats 3]

The frozen SwinV2 (random weights: time does not depend on them) and the head of the paper at full size, on images with 12 classes in
patches, as many as ADE20K's have. Medians: on a CPU of processor time, which other work changes least (all threads together: use one), on
CUDA of time on the clock, the device waited for after each part. Before anything is timed the step is
taken once and its losses must be finite. Rows are appended to benchmarks/results/segmentation_step.csv.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from records import append, processor

from permafrost.data.segmentation.types import SegmentationTarget
from permafrost.data.types import Batch, SampleKey
from permafrost.heads.base import world_mean_counts
from permafrost.heads.build import build_head
from permafrost.heads.segmentation.config import Mask2FormerConfig, PixelDecoderConfig, TransformerDecoderConfig
from permafrost.heads.segmentation.criterion import collect_segments
from permafrost.model import build_backbone
from permafrost.model.config import BackboneConfig

RESULTS = Path(__file__).parent / "results" / "segmentation_step.csv"
SIDE, NUM_CLASSES, PRESENT = 640, 150, 12
PARTS = ("backbone", "decoders", "matching", "losses", "backward")


def make_batch(size: int) -> Batch:
    """Images of noise with labels in patches of 80 pixels."""
    targets = []
    for index in range(size):
        generator = SampleKey(0, 0, index).generator("benchmark")
        chosen = torch.randperm(NUM_CLASSES, generator=generator)[:PRESENT]
        patches = chosen[torch.randint(PRESENT, (SIDE // 80, SIDE // 80), generator=generator)]
        semantic = patches.repeat_interleave(80, 0).repeat_interleave(80, 1).to(torch.uint8)
        targets.append(SegmentationTarget(index, semantic.unique().long(), semantic, (SIDE, SIDE), (SIDE, SIDE)))
    images = torch.randint(0, 256, (size, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, targets, [SampleKey(0, 0, index) for index in range(size)])


def measure(pixel: int, transformer: int, *, backbone_name: str, batch_size: int, repeats: int) -> dict[str, object]:
    """Milliseconds of each part."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = build_backbone(BackboneConfig(name=backbone_name, weights="random"), device)
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        pixel_decoder=PixelDecoderConfig(num_blocks=pixel, kernel="triton" if device.type == "cuda" else "reference"),
        transformer_decoder=TransformerDecoderConfig(num_blocks=transformer),
    )
    head = build_head(config, spec=backbone.spec, classes=[str(k) for k in range(NUM_CLASSES)]).to(device).train()
    batch = make_batch(batch_size).to(device)
    found: dict[str, list[float]] = {part: [] for part in PARTS}

    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def timed(part: str, call: Callable[[], object]) -> object:
        start = clock()
        value = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found[part].append((clock() - start) * 1000)
        return value

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                features = timed("backbone", lambda: backbone(batch.images))
            predictions = timed("decoders", lambda: head.predictions(features))
            criterion = head.criterion

            def match() -> tuple[object, object]:
                segments = collect_segments(batch, dtype=predictions[0].masks.dtype)
                return segments, criterion.match(predictions, segments, batch.keys)

            segments, queries = timed("matching", match)
            losses = timed(
                "losses", lambda: criterion.losses(predictions, segments, queries, batch.keys, world_mean_counts)
            )
        total = torch.stack([part.sum() for part in losses]).sum()
        if not bool(total.isfinite()):
            raise SystemExit("the loss is not finite: nothing is timed")
        timed("backward", total.backward)
        head.zero_grad(set_to_none=True)

    for _ in range(repeats + 1):
        step()
    medians = {part: statistics.median(values[1:]) for part, values in found.items()}
    whole = sum(medians.values())
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backbone": backbone_name,
        "pixel_blocks": pixel,
        "transformer_blocks": transformer,
        "batch": batch_size,
        **{f"{part}_ms": round(value, 1) for part, value in medians.items()},
        "step_ms": round(whole, 1),
        "matching_and_losses_share": round((medians["matching"] + medians["losses"]) / whole, 3),
    }


def main() -> None:
    """Measure and append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="swinv2_base")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pixel-blocks", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--transformer-blocks", type=int, nargs="+", default=[3, 9])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for pixel in options.pixel_blocks:
        for transformer in options.transformer_blocks:
            row = measure(
                pixel, transformer, backbone_name=options.backbone, batch_size=options.batch, repeats=options.repeats
            )
            print(row, flush=True)
            append(RESULTS, list(row), [row])


if __name__ == "__main__":
    main()
