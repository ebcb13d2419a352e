"""`permafrost predict`: run a trained run's heads on images or videos of one's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from permafrost.launcher.commands.arguments import add_checkpoint, add_device, parse, probability
from permafrost.launcher.exit_codes import DONE, FAILED, USAGE_ERROR


def run(argv: Sequence[str]) -> int:
    """Predict; returns 0 when every input was read, 1 when some were not, 2 when none was."""
    parser = argparse.ArgumentParser(
        prog="permafrost predict",
        description="Draw what a run finds in images or videos, and list it in predictions.json.",
        epilog="Exit code 0: every input was read; 1: some could not be read, the others are done; 2: none could be read.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, as `permafrost train` printed it")
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="image or video files, folders of them, or quoted patterns such as 'in/*.jpg'",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures and predictions.json")
    parser.add_argument(
        "--score-threshold",
        type=probability,
        metavar="P",
        help="lowest score that is drawn and listed (default: 0.5 for objects, none for videos)",
    )
    parser.add_argument("--head", metavar="NAME", help="head to use if the run has several")
    add_checkpoint(parser)
    add_device(parser)
    options = parse(parser, argv)

    from permafrost.launcher.predict import predict_run

    done = predict_run(
        options.run,
        options.inputs,
        options.output,
        head=options.head,
        which=options.checkpoint,
        score_threshold=options.score_threshold,
        device=options.device,
    )
    if done.failures:
        num_failed, num_read = len(done.failures), len(done.pictures)
        listed = "".join(f"\n  {name}: {reason}" for name, reason in done.failures.items())
        print(f"error: {num_failed} of {num_failed + num_read} inputs could not be read:{listed}", file=sys.stderr)
    return DONE if not done.failures else FAILED if done.pictures else USAGE_ERROR
