"""`permafrost evaluate`: score a trained run on its validation split."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from permafrost.launcher.commands.arguments import add_checkpoint, add_device, num_workers, parse


def run(argv: Sequence[str]) -> int:
    """Evaluate; returns 0."""
    parser = argparse.ArgumentParser(
        prog="permafrost evaluate",
        description="Score a run's heads on its validation split; writes evaluation.json and results_HEAD.json there.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, as `permafrost train` printed it")
    add_checkpoint(parser)
    parser.add_argument(
        "--num-workers", type=num_workers, metavar="N", help="data workers (default: as in the run's recipe)"
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="multi-scale testing of a detector: a view of each image at each of these shorter sides (or sides of squares), in place "
        "of the recipe's data.evaluation.sizes",
    )
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        metavar="FACTOR",
        help="multi-scale testing of a segmentation: a view of each image at each of these factors of the shorter side, in place of the "
        "recipe's data.evaluation.scales; the public test on ADE20K is 0.5 0.75 1 1.25 1.5 1.75 with --flip",
    )
    parser.add_argument("--flip", action="store_true", help="each view mirrored, too, and the results merged")
    parser.add_argument(
        "--submission",
        metavar="DIR",
        help="segmentation: label PNGs of the test images (data.test_images) for the benchmark server, instead of a score",
    )
    parser.add_argument("--head", metavar="NAME", help="only this head")
    parser.add_argument(
        "--image-info",
        metavar="FILE",
        help="no scores, but results for COCO's server: on the images of this JSON (image_info_test-dev2017.json) in --images",
    )
    parser.add_argument("--images", metavar="FOLDER", help="where the images of --image-info are (test2017)")
    add_device(parser)
    options = parse(parser, argv)
    if (options.image_info is None) != (options.images is None):
        parser.error("--image-info and --images belong together")
    evaluation = {"sizes": tuple(options.sizes)} if options.sizes else {}
    evaluation |= {"scales": tuple(options.scales)} if options.scales else {}
    evaluation |= {"flip": True} if options.flip else {}

    common = {"which": options.checkpoint, "device": options.device, "num_workers": options.num_workers}
    if options.image_info is not None:
        from permafrost.launcher.submission import write_submission

        write_submission(options.run, options.image_info, options.images, evaluation=evaluation, **common)
        return 0

    from permafrost.launcher.evaluate import evaluate_run

    evaluate_run(options.run, evaluation=evaluation, submission=options.submission, head=options.head, **common)
    return 0
