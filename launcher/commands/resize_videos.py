"""`permafrost resize-videos`: write smaller copies of videos, the offline step before training on them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from permafrost.launcher.commands.arguments import number, parse, progress_printer

FAILURES = "failures.txt"
SHOWN = 20


def run(argv: Sequence[str]) -> int:
    """Resize; returns 0, with broken files listed."""
    parser = argparse.ArgumentParser(
        prog="permafrost resize-videos",
        description="Copy every video below IN to the same place below OUT, with its shorter side at --short-side pixels, as H.264 "
        "in MP4 without sound. Smaller videos are not enlarged. Run it again to continue after an interruption. "
        f"Files that cannot be decoded are listed in OUT/{FAILURES}; copy annotation files yourself.",
    )
    parser.add_argument("input", metavar="IN", type=Path, help="folder of videos; nothing in it is changed")
    parser.add_argument("output", metavar="OUT", type=Path, help="folder to write to, outside IN")
    parser.add_argument(
        "--short-side", type=_pixels, default=256, metavar="N", help="shorter side in pixels (default: 256)"
    )
    parser.add_argument(
        "--processes",
        type=number("processes"),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="videos to process at once (default: one per core)",
    )
    parser.add_argument(
        "--timeout",
        type=number("seconds"),
        default=600,
        metavar="S",
        help="seconds that one video may take (default: 600)",
    )
    options = parse(parser, argv)

    from permafrost.data.video.resize import resize_folder

    result = resize_folder(
        options.input,
        options.output,
        options.short_side,
        num_processes=options.processes,
        timeout=options.timeout,
        on_progress=progress_printer("{} of {} videos"),
    )
    print(
        f"{result.num_written} videos written, {result.num_present} were there already, {len(result.failures)} cannot be decoded"
    )
    if result.failures:
        options.output.mkdir(parents=True, exist_ok=True)
        listing = "".join(f"{path}: {reason}\n" for path, reason in result.failures)
        (options.output / FAILURES).write_text(listing, encoding="utf-8")
        for path, reason in result.failures[:SHOWN]:
            print(f"  {path}: {reason}")
        print(f"all of them: {options.output / FAILURES}")
    return 0


def _pixels(text: str) -> int:
    """Return an even number of pixels, at least 32, for argparse."""
    if not text.isdecimal() or int(text) < 32 or int(text) % 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a side: give an even number of pixels from 32")
    return int(text)
