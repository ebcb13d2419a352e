"""The paper's Tables 2 and 6 in small: does a better neck close the gap between a frozen backbone and full fine-tuning?

    python benchmarks/evidence_detection.py --seeds 0 [--tables 2 6] [--jobs 2]    runs what is missing, one seed of every cell first
    python benchmarks/evidence_detection.py --num-steps 960                        the same with longer runs
    python benchmarks/evidence_detection.py --summarise                            prints the gaps and their spreads
    python benchmarks/evidence_detection.py --list                                 prints the cells and how long the missing ones take

A cell is a head, a setting (frozen or fully fine-tuned), a share of the training images and a seed: a run of its own, on one
thread, of the recipes `detection_shapes` with their heads made narrower, on the pretrained nano SwinV2 and a built-in world. All cells
have the same number of steps, batch, schedule, augmentation and learning rate of the head. It is appended to
benchmarks/results/evidence_detection.csv, and a cell that is there is not run again; one that was interrupted goes on from its last
checkpoint in --work. The seed draws the head's initial weights, the order of the images and, below the whole set, which images.

Fixed beforehand, before any cell but the calibration's was run:

- The world is the first of LADDER, from hard to easy, in which the fully fine-tuned FPN reaches a box AP from 0.4 to 0.7 with the
  best of RATES for its backbone. That rate is every fine-tuned cell's. The calibration has a seed of its own, which no cell has.
- Runs of another length (--num-steps) are other cells, with a calibration of their own by the same rule.
- A gap (fully fine-tuned minus frozen, of equal seeds) counts beyond the spread of the seeds only: when the largest and smallest of
  both settings do not overlap, which takes two seeds at least.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from permafrost.configs import detection_shapes
from permafrost.data.detection.config import JitterConfig
from permafrost.data.worlds.config import ShapesWorld
from permafrost.heads.detection.config import MaskHeadConfig
from permafrost.heads.necks.config import BiFPNConfig, NeckConfig
from permafrost.launcher.experiment import Experiment, LoopConfig

sys.path.insert(0, str(Path(__file__).parent))
from cells import Costs, described, gap, remaining, run_all, run_apart
from records import append, provenance, read

RESULTS = Path(__file__).parent / "results" / "evidence_detection.csv"
WORK = Path(__file__).parents[1] / "runs" / "evidence_detection"
FIELDS = (
    "date", "commit", "processor", "torch", "table", "head", "setting", "share", "seed", "world", "rate", "num_steps",
    "trainable_m", "cpu_s", "wall_s", "box_ap", "mask_ap",
)  # fmt: skip

SIDE, NUM_STEPS, BATCH = 128, 240, 8
NUM_TRAIN, NUM_VAL = 4000, 250
TRIAL_STEPS, TRIAL_TRAIN, TRIAL_VAL = 2, 100, 10
"""Of --trial, which shows that the script works and nothing else."""
CALIBRATION_SEED = 1000
WANTED_AP = (0.4, 0.7)
RATES = (0.1, 0.3, 1.0)
"""The fine-tuned backbone's learning rate, as multiples of the head's."""

_CLEARER = {"object_size": (0.25, 0.55), "min_visible": 0.6, "contrast": 0.45}
LADDER = {
    "medium": {**_CLEARER, "objects": (1, 3), "clutter": 1, "rotation": 0.5, "textured_share": 0.25},
    "easy": {
        **_CLEARER,
        "objects": (1, 3),
        "clutter": 0,
        "rotation": 0.1,
        "textured_share": 0.0,
        "background_contrast": 0.1,
    },
    "easiest": {
        **_CLEARER,
        "objects": (1, 2),
        "clutter": 0,
        "rotation": 0.0,
        "textured_share": 0.0,
        "background_contrast": 0.0,
        "crowd_share": 0.0,
    },
}
"""Worlds from hard to easy: what differs from ShapesWorld's defaults."""

TABLE_2 = ("fpn", "residual_fpn", "bifpn", "cascade", "bifpn_cascade")
TABLE_6 = ("fpn", "bifpn1", "bifpn2", "bifpn3", "bifpn4")
SHARES = (0.01, 0.1)
SETTINGS = ("frozen", "full")
HEADS: dict[str, Callable[[], Experiment]] = {name: getattr(detection_shapes, name) for name in TABLE_2}
LAYERS = {f"bifpn{layers}": layers for layers in (1, 2, 3, 4)}
NAMES = {
    "fpn": "FPN",
    "residual_fpn": "FPN, 4 residual blocks",
    "bifpn": "BiFPN, 5 layers",
    "cascade": "FPN, Cascade",
    "bifpn_cascade": "BiFPN, Cascade",
    **{name: f"BiFPN, {layers} layer{'s' if layers > 1 else ''}" for name, layers in LAYERS.items()},
}


@dataclass(frozen=True)
class Cell:
    """One run: of which table, head and setting, on which share of the images, from which seed."""

    table: str
    head: str
    setting: str
    share: float
    seed: int

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.table}_{self.head}_{self.setting}_{self.share:g}_{self.seed}"


def cells(tables: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All cells, every one of a seed before the next seed."""
    listed = []
    for seed in seeds:
        if "2" in tables:
            listed += [Cell("2", head, setting, 1.0, seed) for head in TABLE_2 for setting in SETTINGS]
        if "6" in tables:
            listed += [
                Cell("6", head, setting, share, seed) for share in SHARES for head in TABLE_6 for setting in SETTINGS
            ]
    return listed


def build(cell: Cell, world: str, rate: float, num_steps: int = NUM_STEPS, *, trial: bool = False) -> Experiment:
    """The experiment of a cell."""
    num_train, num_val = (TRIAL_TRAIN, TRIAL_VAL) if trial else (NUM_TRAIN, NUM_VAL)
    experiment = HEADS["bifpn" if cell.head in LAYERS else cell.head]()
    head = experiment.heads["detection"]
    neck: NeckConfig = head.model.neck
    if cell.head in LAYERS:
        assert isinstance(neck, BiFPNConfig)
        neck.num_layers = LAYERS[cell.head]
    head.model.box.num_samples = 32
    head.model.mask = MaskHeadConfig(num_convs=1, channels=32)
    head.schedule.warmup_steps = min(head.schedule.warmup_steps, num_steps // 10)
    if cell.setting == "full":
        experiment.backbone = dataclasses.replace(experiment.backbone, frozen=False, learning_rate_factor=rate)
    experiment.data.image_size = SIDE
    experiment.data.jitter = JitterConfig(scale_range=(0.7, 1.4), flip=0.5)
    experiment.data.world = ShapesWorld(num_train=num_train, num_val=num_val, image_side=SIDE, **LADDER[world])
    experiment.data.train_share = cell.share
    experiment.data.train_share_seed = cell.seed
    experiment.loop = LoopConfig(
        num_steps=num_steps,
        global_batch=BATCH,
        seed=cell.seed,
        num_workers=0,
        log_every=50,
        checkpoint_every=max(1, num_steps // 4),
        image_every=0,
        evaluation_batch=10,
        keep_checkpoints=1,
    )
    experiment.name = cell.name
    return experiment


def run_cell(
    cell: Cell, world: str, rate: float, num_steps: int, work: Path, *, trial: bool = False
) -> dict[str, object]:
    """Trains and scores one cell in a process of its own.

    Returns:
        a row of the results.
    """
    # A calibration with another rate or world is another run.
    folder = work / f"{cell.name}_{world}_{rate:g}_{num_steps}"
    values = [dataclasses.asdict(cell), world, rate, num_steps, trial]
    measured = run_apart(__file__, values, folder)
    return {
        **provenance(),
        **dataclasses.asdict(cell),
        "world": world,
        "rate": rate if cell.setting == "full" else "",
        "num_steps": num_steps,
        **measured,
    }


def train_cell(values: str) -> None:
    """The child: trains and prints what it measured."""
    from permafrost.launcher.train import train

    described, world, rate, num_steps, trial, folder = json.loads(values)
    experiment = build(Cell(**described), world, rate, num_steps, trial=trial)
    experiment.output = folder
    costs = Costs()
    found = train(experiment, device="cpu")["detection"]
    measured = {
        **costs.columns(),
        "trainable_m": round(trainable(experiment) / 1e6, 3),
        "box_ap": round(found["bbox/AP"], 4),
        "mask_ap": round(found["segm/AP"], 4),
    }
    print(json.dumps(measured))


def trainable(experiment: Experiment) -> int:
    """Numbers that a run trains."""
    from permafrost.launcher.run.parts import join_heads
    from permafrost.model import build_backbone

    backbone = build_backbone(experiment.backbone, "cpu")
    _, heads = join_heads(experiment, backbone, [str(i) for i in range(detection_shapes.NUM_SHAPES)])
    return sum(
        parameter.numel() for head in heads.values() for parameter in head.parameters() if parameter.requires_grad
    )


def of_length(path: Path, num_steps: int) -> list[dict[str, str]]:
    """The rows of runs of this length."""
    return [row for row in read(path) if int(row["num_steps"]) == num_steps]


def record(path: Path, row: dict[str, object]) -> None:
    """One more row, on disk and shown."""
    append(path, FIELDS, [row])
    print(
        {name: row[name] for name in ("table", "head", "setting", "share", "seed", "box_ap", "mask_ap", "wall_s")},
        flush=True,
    )


def cell_of(row: dict[str, str]) -> Cell:
    """The cell that a row is of."""
    return Cell(row["table"], row["head"], row["setting"], float(row["share"]), int(row["seed"]))


def calibrate(path: Path, work: Path, jobs: int, num_steps: int, *, trial: bool = False) -> tuple[str, float]:
    """The world and the fine-tuned backbone's rate, by the rule above; runs what of it is missing.

    Raises:
        SystemExit: no world of the ladder has the wanted difficulty.
    """
    cell = Cell("calibration", "fpn", "full", 1.0, CALIBRATION_SEED)
    for world in LADDER:
        rows = [row for row in of_length(path, num_steps) if row["table"] == cell.table and row["world"] == world]
        known = {float(row["rate"]): row for row in rows}
        missing = [rate for rate in RATES if rate not in known]
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            for row in pool.map(lambda rate: run_cell(cell, world, rate, num_steps, work, trial=trial), missing):  # noqa: B023 - done here
                record(path, row)
                known[float(row["rate"])] = row
        best = max(RATES, key=lambda rate: float(known[rate]["box_ap"]))
        reached = float(known[best]["box_ap"])
        print(f"world {world}: fully fine-tuned FPN reaches {reached:.3f} box AP with rate {best:g}")
        if WANTED_AP[0] <= reached <= WANTED_AP[1]:
            return world, best
    raise SystemExit(f"no world of the ladder brings the fully fine-tuned FPN into {WANTED_AP}: make another ladder")


def eta(path: Path, missing: Sequence[Cell], jobs: int, num_steps: int) -> str:
    """Return how long the missing cells take, from the processor time of those of the same head, else of all."""
    known = of_length(path, num_steps)
    rows = [row for row in known if row["table"] != "calibration"] or known
    times = {(row["head"], row["setting"]): float(row["cpu_s"]) for row in rows}
    return remaining([(cell.head, cell.setting) for cell in missing], times, jobs)


def summarise(path: Path, num_steps: int) -> str:
    """The tables of box AP with the spread of the seeds, and the gaps."""
    rows = [row for row in of_length(path, num_steps) if row["table"] != "calibration"]
    lines = []
    for table, share, heads in (("2", 1.0, TABLE_2), ("6", 0.01, TABLE_6), ("6", 0.1, TABLE_6)):
        lines += [
            f"Table {table}, {share:.0%} of the images: box AP, mean (lowest to highest, seeds)",
            f"{'head':24}{'frozen':>30}{'full':>30}  gap, full minus frozen",
        ]
        for head in heads:
            found = {
                setting: {
                    int(row["seed"]): float(row["box_ap"])
                    for row in rows
                    if (row["table"], row["head"], row["setting"], float(row["share"])) == (table, head, setting, share)
                }
                for setting in SETTINGS
            }
            shown = [described(list(found[setting].values())) for setting in SETTINGS]
            lines.append(f"{NAMES[head]:24}{shown[0]:>30}{shown[1]:>30}  {gap(found['frozen'], found['full'])}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run, list or summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=("2", "6"), default=["2", "6"])
    parser.add_argument("--heads", nargs="+", choices=tuple(NAMES), default=list(NAMES), help="cells of these only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one core each")
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS, help="cells of another length are other cells")
    parser.add_argument("--trial", action="store_true", help="two steps on a few pictures: shows that the script works")
    parser.add_argument("--calibrate", action="store_true", help="stop once world and rate are known")
    parser.add_argument("--summarise", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for runs that are not finished")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        train_cell(options.child)
        return
    num_steps = TRIAL_STEPS if options.trial else options.num_steps
    if options.summarise:
        print(summarise(options.results, num_steps))
        return
    if options.trial and options.results == RESULTS:
        parser.error("--trial is no result: give --results FILE")
    done = {cell_of(row) for row in of_length(options.results, num_steps)}
    wanted = [cell for cell in cells(options.tables, options.seeds) if cell.head in options.heads]
    if options.list:
        for cell in wanted:
            print(f"{cell.name:40} {'done' if cell in done else 'missing'}")
        print(eta(options.results, [cell for cell in wanted if cell not in done], options.jobs, num_steps))
        return
    world, rate = calibrate(options.results, options.work, options.jobs, num_steps, trial=options.trial)
    if options.calibrate:
        return
    missing = [cell for cell in wanted if cell not in done]
    run = functools.partial(
        run_cell, world=world, rate=rate, num_steps=num_steps, work=options.work, trial=options.trial
    )
    for row, others in run_all(missing, run, options.jobs):
        record(options.results, row)
        print(eta(options.results, others, options.jobs, num_steps), flush=True)
    print(summarise(options.results, num_steps))


if __name__ == "__main__":
    main()
