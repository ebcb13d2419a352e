"""`permafrost evaluate`: score a trained run on its validation split."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from permafrost.launcher.commands.arguments import add_checkpoint, add_device, number, parse


def run(argv: Sequence[str]) -> int:
    """Evaluate; returns 0."""
    parser = argparse.ArgumentParser(
        prog="permafrost evaluate",
        description="Score a run's heads on its validation split, and write evaluation.json and results_HEAD.json into the run folder.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, as `permafrost train` printed it")
    add_checkpoint(parser)
    parser.add_argument(
        "--num-workers",
        type=number("workers", 0),
        metavar="N",
        help="data-loading processes (default: as in the run's recipe)",
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="test a detector at several scales: look at each image at each of these shorter sides (or sides of squares), instead "
        "of the recipe's data.evaluation.sizes",
    )
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        metavar="FACTOR",
        help="test a segmentation at several scales: look at each image at each of these factors of the shorter side, instead of the "
        "recipe's data.evaluation.scales; the public test on ADE20K is 0.5 0.75 1 1.25 1.5 1.75 with --flip",
    )
    parser.add_argument("--flip", action="store_true", help="look at each view mirrored, too, and merge the results")
    parser.add_argument(
        "--submission",
        metavar="FOLDER",
        help="score nothing, but write files for the benchmark server into this folder, from the run's test images: for detection "
        "(data.test_images and data.test_annotations) a zip of boxes and one of masks, named after the folder; for segmentation "
        "(data.test_images) a PNG of labels for each image",
    )
    parser.add_argument("--head", metavar="NAME", help="evaluate only this head")
    add_device(parser)
    options = parse(parser, argv)
    evaluation: dict[str, Any] = {"sizes": tuple(options.sizes)} if options.sizes else {}
    evaluation |= {"scales": tuple(options.scales)} if options.scales else {}
    evaluation |= {"flip": True} if options.flip else {}

    from permafrost.launcher.evaluate import evaluate_run

    evaluate_run(
        options.run,
        which=options.checkpoint,
        device=options.device,
        num_workers=options.num_workers,
        evaluation=evaluation,
        submission=options.submission,
        head=options.head,
    )
    return 0
