"""The paper's Table 4 in small: which head tells the order of frames on a frozen backbone, and what full fine-tuning adds.

    python benchmarks/evidence_video.py --seeds 0 [--num-steps 240] [--settings frozen full]   runs what is missing, all of one seed first
    python benchmarks/evidence_video.py --summarise                    prints the table
    python benchmarks/evidence_video.py --list                         prints the cells that are there

A cell is a head (linear, temporal, global), a setting (frozen or fully fine-tuned) and a seed, on the pretrained nano SwinV2 and the
built-in world `motion`. The three frozen heads of a seed share their clips and one frozen forward, as heads of one run may; each
fine-tuned twin is a run of its own. All have the same steps, batch, schedule, augmentation and learning rate. Rows are appended to
benchmarks/results/evidence_video.csv, and a run whose rows are there is not repeated; an interrupted one goes on from its checkpoint.

Fixed beforehand, before any cell was run:

- The world is MotionWorld's defaults, whose difficulty follows benchmarks/motion_calibration.py, with 400 validation videos. The heads are
  quickstart_video's (two blocks of width 128; linear: none), the head's learning rate is the quickstart's, and the fine-tuned backbone's a
  tenth of it, the public Video-Swin recipe's factor. Nothing is chosen by result.
- Measures: "top1" over all ten classes; "order" is the share of the clips of the three order-only pairs whose own class has a higher
  score than its partner (chance 0.5: both have the same frames); "appearance" likewise for turns_star and turns_cross, which any
  frame tells apart. A class beyond a video's five best counts as lowest, and a tie as half.
- With n clips a share within 2 sqrt(0.25 / n) of 0.5 is not told from chance.

Chosen by result, and so no part of the above: position codes were learned tables (the heads' default), whose small initial values told no
head the order within 240 steps; fixed waves did in a trial on stored features of this world, and --position sincos is the default since.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from permafrost.configs.quickstart_video import quickstart_video
from permafrost.data.worlds.config import MotionWorld
from permafrost.data.worlds.motion import APPEARANCE, ORDER_PAIRS
from permafrost.heads.video.config import GlobalVideoConfig, LinearVideoConfig, PositionKind, TemporalVideoConfig
from permafrost.launcher.experiment import Experiment, LoopConfig

sys.path.insert(0, str(Path(__file__).parent))
from cells import Costs, run_apart
from records import append, provenance, read

RESULTS = Path(__file__).parent / "results" / "evidence_video.csv"
WORK = Path(__file__).parents[1] / "runs" / "evidence_video"
FIELDS = (
    "date", "commit", "processor", "torch", "world", "head", "setting", "position", "seed", "num_steps", "run_cpu_s", "run_wall_s",
    "num_videos", "top1", "order", "num_order", "appearance", "num_appearance",
)  # fmt: skip

NUM_STEPS, BATCH = 240, 16
TRIAL_STEPS = 2
WORLD = MotionWorld(num_val=400)
HEADS = ("linear", "temporal", "global")
SETTINGS = ("frozen", "full")
POSITIONS: tuple[PositionKind, ...] = ("learned", "sincos")
BLOCKS = {"num_blocks": 2, "width": 128, "head_channels": 32, "num_frames": 8, "map_side": 2, "dropout": 0.1}
FULL_FACTOR = 0.1


def world_name(world: MotionWorld) -> str:
    """Return the name that rows give a world: by what decides its difficulty."""
    low, high = world.object_size
    return f"objects {low:g} to {high:g}, contrast {world.contrast:g}, clutter {world.clutter}"


def make_head(name: str, position: PositionKind = "sincos") -> LinearVideoConfig:
    """The configuration of a head; the linear one has no position codes."""
    if name == "linear":
        return LinearVideoConfig(dropout=0.1)
    return (TemporalVideoConfig if name == "temporal" else GlobalVideoConfig)(**BLOCKS, position=position)


def runs(seeds: Sequence[int]) -> list[tuple[tuple[str, ...], str, int]]:
    """(heads, setting, seed) of every run, all of a seed before the next."""
    return [
        run for seed in seeds for run in [(HEADS, "frozen", seed), *(((head,), "full", seed) for head in HEADS[::-1])]
    ]


def build(
    heads: Sequence[str],
    setting: str,
    seed: int,
    num_steps: int,
    position: PositionKind = "sincos",
    *,
    trial: bool = False,
) -> Experiment:
    """The experiment of a run."""
    experiment = quickstart_video()
    (shared,) = experiment.heads.values()
    experiment.heads = {name: dataclasses.replace(shared, model=make_head(name, position)) for name in heads}
    if setting == "full":
        experiment.backbone = dataclasses.replace(experiment.backbone, frozen=False, learning_rate_factor=FULL_FACTOR)
    experiment.data.world = MotionWorld(num_train=40, num_val=20) if trial else WORLD
    experiment.loop = LoopConfig(
        num_steps=num_steps,
        global_batch=BATCH,
        seed=seed,
        num_workers=0,
        log_every=40,
        checkpoint_every=max(1, num_steps // 4),
        image_every=0,
        evaluation_batch=BATCH,
        keep_checkpoints=1,
    )
    experiment.name = f"{'_'.join(heads)}_{setting}_{seed}_{num_steps}"
    return experiment


def forced_choice(results: Sequence[dict], pairs: Sequence[tuple[str, str]]) -> tuple[float, int]:
    """Return how often a video's own class has a higher score than its partner; and over how many videos."""
    partner = {name: other for one, two in pairs for name, other in ((one, two), (two, one))}
    points = []
    for entry in results:
        if entry["label"] in partner:
            scores = {found["label"]: found["score"] for found in entry["top"]}
            own, other = scores.get(entry["label"], 0.0), scores.get(partner[entry["label"]], 0.0)
            points.append(1.0 if own > other else 0.5 if own == other else 0.0)
    return statistics.mean(points), len(points)


def train_run(values: str) -> None:
    """The child: trains, scores and prints what it measured."""
    from permafrost.launcher.evaluate import evaluate_run
    from permafrost.launcher.train import train

    heads, setting, seed, num_steps, position, trial, folder = json.loads(values)
    experiment = build(heads, setting, seed, num_steps, position, trial=trial)
    experiment.output = folder
    costs = Costs()
    train(experiment, device="cpu")
    metrics = evaluate_run(folder, which="latest", device="cpu", say=lambda text: None)
    measured = []
    for name in heads:
        results = json.loads((Path(folder) / f"results_{name}.json").read_text())
        order, num_order = forced_choice(results, ORDER_PAIRS)
        appearance, num_appearance = forced_choice(results, [APPEARANCE])
        measured.append(
            {
                "head": name,
                "num_videos": int(metrics[name]["video/num_videos"]),
                "top1": round(metrics[name]["video/top1"], 4),
                "order": round(order, 4),
                "num_order": num_order,
                "appearance": round(appearance, 4),
                "num_appearance": num_appearance,
            }
        )
    found = costs.columns()
    facts = {"torch": found["torch"], "run_cpu_s": found["cpu_s"], "run_wall_s": found["wall_s"]}
    print(json.dumps([row | facts for row in measured]))


def run_cells(
    heads: Sequence[str],
    setting: str,
    seed: int,
    num_steps: int,
    position: PositionKind,
    work: Path,
    *,
    trial: bool = False,
) -> list[dict[str, object]]:
    """One run in a process of its own; its rows."""
    folder = work / f"{'_'.join(heads)}_{setting}_{seed}_{num_steps}_{position}"
    values = [list(heads), setting, seed, num_steps, position, trial]
    measured = run_apart(__file__, values, folder)
    common = {
        **provenance(),
        "world": world_name(WORLD),
        "setting": setting,
        "position": position,
        "seed": seed,
        "num_steps": num_steps,
    }
    return [common | row for row in measured]


def record(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """More rows, on disk and shown."""
    append(path, FIELDS, rows)
    for row in rows:
        print({name: row[name] for name in ("head", "setting", "seed", "top1", "order", "appearance")}, flush=True)


def summarise(path: Path) -> str:
    """The table of the world as it is now: means over the seeds with the lowest and the highest."""
    rows = [row for row in read(path) if row["world"] == world_name(WORLD)]
    lines = [
        f"{'steps':>6} {'codes':9}{'head':10}{'setting':8}{'seeds':>6}{'top-1':>24}{'order-only pairs':>24}{'appearance pair':>24}"
    ]
    lengths = sorted({int(row["num_steps"]) for row in rows})
    for length, position, setting, head in itertools.product(lengths, POSITIONS, SETTINGS, HEADS):
        found = [
            row
            for row in rows
            if (int(row["num_steps"]), row["position"], row["head"], row["setting"])
            == (length, position, head, setting)
        ]
        if not found:
            continue
        cells = []
        for name in ("top1", "order", "appearance"):
            values = [float(row[name]) for row in found]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(
            f"{length:>6} {position:9}{head:10}{setting:8}{len(found):>6}" + "".join(f"{cell:>24}" for cell in cells)
        )
    for name in ("order", "appearance"):
        counts = {int(row[f"num_{name}"]) for row in rows}
        if counts:
            band = 2 * (0.25 / min(counts)) ** 0.5
            lines.append(
                f"{name}: {min(counts)} clips, chance 0.5, one seed within {band:.3f} of it is not told from it"
            )
    return "\n".join(lines)


def main() -> None:
    """Run, list or summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS, help="cells of another length are other cells")
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=list(SETTINGS), help="only these runs")
    parser.add_argument("--position", choices=POSITIONS, default="sincos")
    parser.add_argument("--trial", action="store_true", help="two steps on a few videos: shows that the script works")
    parser.add_argument("--summarise", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for runs that are not finished")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        train_run(options.child)
        return
    if options.summarise:
        print(summarise(options.results))
        return
    if options.trial and options.results == RESULTS:
        parser.error("--trial is no result: give --results FILE")
    num_steps = TRIAL_STEPS if options.trial else options.num_steps
    done = {
        (row["head"], row["setting"], row["position"], int(row["seed"]), int(row["num_steps"]))
        for row in read(options.results)
        if row["world"] == world_name(WORLD)
    }
    for heads, setting, seed in runs(options.seeds):
        if setting not in options.settings:
            continue
        is_done = all((head, setting, options.position, seed, num_steps) in done for head in heads)
        if options.list:
            print(f"{','.join(heads):24}{setting:8}{seed:>3}  {'done' if is_done else 'missing'}")
        elif not is_done:
            record(
                options.results,
                run_cells(heads, setting, seed, num_steps, options.position, options.work, trial=options.trial),
            )
    if not options.list:
        print(summarise(options.results))


if __name__ == "__main__":
    main()
