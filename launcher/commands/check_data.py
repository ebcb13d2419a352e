"""`permafrost check-data`: find faults in a recipe's data, and draw its training samples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from permafrost.data.errors import DataError
from permafrost.data.findings import count_kinds
from permafrost.launcher.commands.arguments import number, progress_printer, recipe_parser, split_recipe
from permafrost.launcher.recipes.overrides import parse_experiment

if TYPE_CHECKING:
    from permafrost.launcher.experiment import Experiment

LISTED = 100
COLUMNS = 4
EPILOG = """Exit code 0: a run can start, perhaps with warnings; 2: it cannot.

  permafrost check-data quickstart --draw 16 --output samples.png
  permafrost check-data coco:swinv2_base_fpn --data.root /path/to/coco"""


def make_parser() -> argparse.ArgumentParser:
    """Return a parser of the command's own options."""
    parser = recipe_parser(
        "check-data",
        usage="[--field.sub value ...] [--draw N] [--output FILE.png] [--quick] [--all]",
        description="Look for faults in the labels and files of a recipe's two splits, without changing any.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--draw",
        type=number("samples"),
        metavar="N",
        help="draw the first N augmented training samples, with labels, on one sheet",
    )
    parser.add_argument(
        "--output", type=png_file, metavar="FILE.png", help="the sheet's file (default: <recipe's name>_samples.png)"
    )
    parser.add_argument("--quick", action="store_true", help="only check that the files exist; do not decode them")
    parser.add_argument("--all", action="store_true", help=f"list every finding, not only the first {LISTED}")
    return parser


def run(argv: Sequence[str]) -> int:
    """Check and draw; returns 0, or 2 when a run could not start with this data."""
    options, recipe, fields = split_recipe(make_parser(), argv)
    description = (
        "Besides these fields: --draw N, --output FILE.png, --quick, --all (see `permafrost check-data --help`)."
    )
    experiment = parse_experiment(recipe, fields, description=description, command="check-data")

    from permafrost.data import build

    findings = build.check_data(
        experiment.data, decode=not options.quick, on_progress=progress_printer("checked {} of {} files")
    )
    fatal = [finding for finding in findings if finding.fatal]
    for line in count_kinds(findings):
        print(line)
    shown = sorted(findings, key=lambda finding: not finding.fatal)
    for finding in shown if options.all else shown[:LISTED]:
        print(f"{'error' if finding.fatal else 'warning'}: {finding}")
    if len(findings) > LISTED and not options.all:
        print(f"... and {len(findings) - LISTED} more; --all lists them")
    if fatal:
        raise DataError(
            f"a run of {recipe} cannot start: {len(fatal)} of these {len(findings)} findings must be mended first"
        )
    train_set, val_set = build.train_set(experiment.data), build.val_set(experiment.data)
    for note in [*train_set.notes, *val_set.notes]:
        print(f"note: {note}")
    print(
        f"{train_set.extent} for training and {val_set.extent} for validation, "
        f"{len(train_set.classes)} classes: {', '.join(train_set.classes)}"
    )
    print(f"{len(findings)} warnings: a run can start" if findings else "no faults found")
    if options.draw:
        target = options.output or Path(f"{experiment.name}_samples.png")
        draw_samples(experiment, options.draw, target)
        print(f"the run's first {options.draw} training samples: {target}")
    return 0


def draw_samples(experiment: Experiment, num_samples: int, target: Path) -> None:
    """Write a sheet of the first samples of the recipe's training stream, as the network sees them, with their labels.

    Raises:
        DataError: the sheet cannot be written.
    """
    from PIL import Image

    from permafrost.data.build import train_set
    from permafrost.data.pictures.draw import captioned, contact_sheet
    from permafrost.data.stream.sampler import GlobalStream

    dataset = train_set(experiment.data)
    stream = GlobalStream(len(dataset), experiment.loop.seed)
    pictures = []
    for position in range(num_samples):
        sample = dataset[stream.key(position)]
        pictures.append(captioned(dataset.draw(sample.image, sample.target), dataset.caption(sample.target)))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(contact_sheet(pictures, columns=COLUMNS)).save(target)
    except OSError as error:
        raise DataError(f"--output {target} cannot be written: {error.strerror or error}") from None


def png_file(text: str) -> Path:
    """Return a path that ends in .png for argparse."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return Path(text)
