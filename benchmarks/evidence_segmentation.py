"""The paper's Table 3 in small: do six pixel-decoder blocks close more of the gap to full fine-tuning than six more transformer blocks?

    python benchmarks/evidence_segmentation.py --seeds 0 [--jobs 2]    runs what is missing, one seed of every cell first
    python benchmarks/evidence_segmentation.py --summarise             prints the gaps and their spreads
    python benchmarks/evidence_segmentation.py --list                  prints the cells, done or missing

A cell is a number of pixel-decoder blocks (1 or 6), of transformer blocks (3 or 9, "(3+1)x" and "(9+1)x"), a setting (frozen or
fully fine-tuned) and a seed: a run of its own, on one thread, of `quickstart_segmentation` on the pretrained nano SwinV2 and the world
`scenery`. All cells have the same number of steps, batch, schedule, augmentation and learning rate of the head; the fine-tuned backbone
learns at a tenth of it, as in the public recipe. A cell is appended to benchmarks/results/evidence_segmentation.csv, and one that
is there is not run again; one that was interrupted goes on from its last checkpoint in --work. The seed draws the head's initial
weights and the order of the images.

Fixed beforehand, before any cell but the calibration's was run:

- The world, its images' side, batch and learning rate are those of `quickstart_segmentation`.
- The number of steps is the first of STEPS with which the smallest head, fully fine-tuned, reaches an mIoU of 0.4. The calibration
  has a seed of its own, which no cell has.
- A gap (fully fine-tuned minus frozen, of equal seeds) counts beyond the spread of the seeds only: when the largest and smallest of
  both settings do not overlap, which takes two seeds at least.
- The share of the gap of the smallest head that a larger frozen head closes is (mIoU of it - mIoU of the smallest, both frozen) /
  (mIoU of the smallest fine-tuned - the smallest frozen); where that gap is not above 0 there is no share.
- Of a seed the four cells that the shares are made of go first.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from permafrost.configs.quickstart_segmentation import quickstart_segmentation
from permafrost.data.build import val_set
from permafrost.launcher.experiment import Experiment, LoopConfig

sys.path.insert(0, str(Path(__file__).parent))
from cells import Costs, described, gap, remaining, run_all, run_apart
from records import append, provenance, read

RESULTS = Path(__file__).parent / "results" / "evidence_segmentation.csv"
WORK = Path(__file__).parents[1] / "runs" / "evidence_segmentation"
FIELDS = (
    "date", "commit", "processor", "torch", "pixel_blocks", "transformer_blocks", "setting", "seed", "num_steps",
    "trainable_m", "cpu_s", "wall_s", "miou", "pixel_accuracy",
)  # fmt: skip
STEPS = (240, 480, 960)
WANTED = 0.4
"""The mIoU of the calibration."""
CALIBRATION_SEED = 1000
RATE = 0.1
"""The fine-tuned backbone's learning rate, as a multiple of the head's."""
TRIAL_STEPS, TRIAL_TRAIN, TRIAL_VAL = 2, 16, 4
"""Of --trial, which shows that the script works and nothing else."""
HEADS = ((1, 3), (6, 3), (1, 9), (6, 9))
SETTINGS = ("frozen", "full")


@dataclass(frozen=True)
class Cell:
    """One run: how many blocks of both decoders, in which setting, from which seed."""

    pixel_blocks: int
    transformer_blocks: int
    setting: str
    seed: int

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"pixel{self.pixel_blocks}_transformer{self.transformer_blocks}_{self.setting}_{self.seed}"


def cells(seeds: Sequence[int]) -> list[Cell]:
    """All cells, every one of a seed before the next seed."""
    first = [((1, 3), "frozen"), ((1, 3), "full"), ((6, 3), "frozen"), ((1, 9), "frozen")]
    every = dict.fromkeys([*first, *((head, setting) for head in HEADS for setting in SETTINGS)])
    return [Cell(*head, setting, seed) for seed in seeds for head, setting in every]


def build(cell: Cell, num_steps: int, *, trial: bool = False) -> Experiment:
    """The experiment of a cell."""
    experiment = quickstart_segmentation()
    if trial:
        experiment.data.world.num_train, experiment.data.world.num_val = TRIAL_TRAIN, TRIAL_VAL
    experiment.name = cell.name
    head = experiment.heads["segmentation"]
    head.model.pixel_decoder.num_blocks = cell.pixel_blocks
    head.model.transformer_decoder.num_blocks = cell.transformer_blocks
    head.schedule.warmup_steps = min(head.schedule.warmup_steps, num_steps // 10)
    if cell.setting == "full":
        experiment.backbone = dataclasses.replace(experiment.backbone, frozen=False, learning_rate_factor=RATE)
    experiment.loop = LoopConfig(
        num_steps=num_steps,
        global_batch=experiment.loop.global_batch,
        seed=cell.seed,
        num_workers=0,
        log_every=50,
        checkpoint_every=max(1, num_steps // 4),
        image_every=0,
        evaluation_batch=10,
        keep_checkpoints=1,
    )
    return experiment


def run_cell(cell: Cell, num_steps: int, work: Path, *, trial: bool = False) -> dict[str, object]:
    """Trains and scores one cell in a process of its own.

    Returns:
        a row of the results.
    """
    # A calibration with more steps is another run.
    folder = work / f"{cell.name}_{num_steps}"
    values = [dataclasses.asdict(cell), num_steps, trial]
    measured = run_apart(__file__, values, folder)
    return {**provenance(), **dataclasses.asdict(cell), "num_steps": num_steps, **measured}


def train_cell(values: str) -> None:
    """The child: trains and prints what it measured."""
    from permafrost.launcher.run.parts import join_heads
    from permafrost.launcher.train import train
    from permafrost.model import build_backbone

    described_cell, num_steps, trial, folder = json.loads(values)
    experiment = build(Cell(**described_cell), num_steps, trial=trial)
    experiment.output = folder
    costs = Costs()
    found = train(experiment, device="cpu")["segmentation"]
    measured = costs.columns()
    classes = val_set(experiment.data).classes
    _, heads = join_heads(experiment, build_backbone(experiment.backbone, "cpu"), classes)
    trainable = sum(one.numel() for head in heads.values() for one in head.parameters() if one.requires_grad)
    measured |= {
        "trainable_m": round(trainable / 1e6, 3),
        "miou": round(found["semantic/mIoU"], 4),
        "pixel_accuracy": round(found["semantic/pixel_accuracy"], 4),
    }
    print(json.dumps(measured))


def record(path: Path, row: dict[str, object]) -> None:
    """One more row, on disk and shown."""
    append(path, FIELDS, [row])
    print(
        {name: row[name] for name in ("pixel_blocks", "transformer_blocks", "setting", "seed", "miou", "wall_s")},
        flush=True,
    )


def cell_of(row: dict[str, str]) -> Cell:
    """The cell that a row is of."""
    return Cell(int(row["pixel_blocks"]), int(row["transformer_blocks"]), row["setting"], int(row["seed"]))


def calibrate(path: Path, work: Path) -> int | None:
    """The number of steps by the rule above, running what of the calibration is missing; None where all are too few."""
    cell = Cell(1, 3, "full", CALIBRATION_SEED)
    for num_steps in STEPS:
        known = [row for row in read(path) if cell_of(row) == cell and int(row["num_steps"]) == num_steps]
        if not known:
            record(path, run_cell(cell, num_steps, work))
            known = read(path)[-1:]
        if float(known[0]["miou"]) >= WANTED:
            return num_steps
    return None


def summarise(path: Path) -> str:
    """mIoU with the spread of the seeds, the gaps, and the share of the smallest head's gap that each larger head closes."""
    found: dict[tuple[int, int, str], dict[int, float]] = {}
    for row in read(path):
        cell = cell_of(row)
        if cell.seed == CALIBRATION_SEED:
            continue
        found.setdefault((cell.pixel_blocks, cell.transformer_blocks, cell.setting), {})[cell.seed] = float(row["miou"])
    lines = [
        "mIoU, mean (lowest to highest, seeds)",
        f"{'head':40}{'frozen':>30}{'full':>30}  gap, full minus frozen",
    ]
    for pixel, transformer in HEADS:
        frozen, full = (found.get((pixel, transformer, setting), {}) for setting in SETTINGS)
        name = f"{pixel} pixel-decoder, ({transformer} + 1) transformer"
        shown = [described(list(one.values())) for one in (frozen, full)]
        lines.append(f"{name:40}{shown[0]:>30}{shown[1]:>30}  {gap(frozen, full)}")
    lines += ["", "share of the smallest head's gap that a larger frozen head closes, mean (lowest to highest, seeds)"]
    smallest, tuned = found.get((1, 3, "frozen"), {}), found.get((1, 3, "full"), {})
    for pixel, transformer in HEADS[1:]:
        own = found.get((pixel, transformer, "frozen"), {})
        seeds = sorted(seed for seed in own.keys() & smallest.keys() & tuned.keys() if tuned[seed] > smallest[seed])
        shares = [(own[seed] - smallest[seed]) / (tuned[seed] - smallest[seed]) for seed in seeds]
        lines.append(f"{f'{pixel} pixel-decoder, ({transformer} + 1) transformer':40}{described(shares):>30}")
    return "\n".join(lines)


def eta(path: Path, missing: Sequence[Cell], jobs: int) -> str:
    """Return how long the missing cells take, from the processor time of those there."""
    times = {
        (cell_of(row).pixel_blocks, cell_of(row).transformer_blocks, row["setting"]): float(row["cpu_s"])
        for row in read(path)
    }
    return remaining([(cell.pixel_blocks, cell.transformer_blocks, cell.setting) for cell in missing], times, jobs)


def main() -> None:
    """Run, list or summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one core each")
    parser.add_argument("--trial", action="store_true", help="two steps on a few pictures: shows that the script works")
    parser.add_argument("--summarise", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for runs that are not finished")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        train_cell(options.child)
        return
    if options.summarise:
        print(summarise(options.results))
        return
    if options.trial and options.results == RESULTS:
        parser.error("--trial is no result: give --results FILE")
    done = {cell_of(row) for row in read(options.results)}
    missing = [cell for cell in cells(options.seeds) if cell not in done]
    if options.list:
        for cell in cells(options.seeds):
            print(f"{cell.name:40} {'done' if cell in done else 'missing'}")
        print(eta(options.results, missing, options.jobs))
        return
    num_steps = TRIAL_STEPS if options.trial else calibrate(options.results, options.work)
    if num_steps is None:
        raise SystemExit(f"the calibration stays below an mIoU of {WANTED} with {STEPS[-1]} steps: no cell is run")
    run = functools.partial(run_cell, num_steps=num_steps, work=options.work, trial=options.trial)
    for row, others in run_all(missing, run, options.jobs):
        record(options.results, row)
        print(eta(options.results, others, options.jobs), flush=True)
    print(summarise(options.results))


if __name__ == "__main__":
    main()
