"""Finds how easy the world `motion` must be for appearance to give a class away; fixes the world of the quickstart and of the evidence.

    OMP_NUM_THREADS=1 python benchmarks/motion_calibration.py [--only N]

For each candidate, in the order of CANDIDATES, clips of turns_star and turns_cross of a world with another seed are drawn, the frozen
nano SwinV2's last map is averaged over cells and frames, and a linear classifier (logistic regression, converged) is trained on 400
clips and tested on 200. The world's defaults are the first candidate with an accuracy of at least 0.9, or the last one if none has it.
The rule looks at one pair, at one frozen linear classifier and at clips that no run sees; it says nothing of order, of heads or of
fine-tuning. Rows are appended to benchmarks/results/motion_calibration.csv; a candidate that is there is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
from pathlib import Path

import numpy as np
import torch
from records import append
from torch import Tensor
from torch.nn import functional as F

from permafrost.data.worlds.config import MotionWorld
from permafrost.data.worlds.motion import APPEARANCE, CLASSES, render_clip
from permafrost.model import load_backbone

RESULTS = Path(__file__).parent / "results" / "motion_calibration.csv"
CANDIDATES = (
    {"object_size": (0.22, 0.34), "contrast": 0.35, "clutter": 3},
    {"object_size": (0.33, 0.45), "contrast": 0.35, "clutter": 3},
    {"object_size": (0.33, 0.45), "contrast": 0.6, "clutter": 3},
    {"object_size": (0.33, 0.45), "contrast": 0.6, "clutter": 0},
)
THRESHOLD = 0.9
NUM_CLIPS = {"train": 400, "val": 200}
NUM_FRAMES, SEED, WEIGHT_DECAY = 8, 1, 0.1


def pooled_features(backbone: torch.nn.Module, world: MotionWorld, split: str) -> tuple[Tensor, Tensor]:
    """(N, C) float32 means over a clip's cells and frames, and (N,) float32 0 or 1."""
    means = []
    for index in range(NUM_CLIPS[split]):
        clip = render_clip(world, split, index, CLASSES.index(APPEARANCE[index % 2]))
        last = backbone(torch.from_numpy(np.ascontiguousarray(clip.transpose(0, 3, 1, 2))))[-1]
        means.append(last.float().mean(dim=(0, 2, 3)))
    return torch.stack(means), torch.arange(NUM_CLIPS[split]).remainder(2).float()


def linear_accuracy(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> float:
    """Share of the second set that a logistic regression on the first gets right; features in the first set's deviations."""
    mean, deviation = train[0].mean(dim=0), train[0].std(dim=0) + 1e-6
    (x, y), (x_val, y_val) = (((features - mean) / deviation, labels) for features, labels in (train, val))
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight + bias, y) + WEIGHT_DECAY / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float(((x_val @ weight + bias > 0) == (y_val > 0)).float().mean())


def main() -> None:
    """Measure candidates until one is easy enough, or only one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, choices=range(len(CANDIDATES)))
    only = parser.parse_args().only
    torch.set_num_threads(1)
    backbone = load_backbone("swinv2_nano", weights="swinv2_nano_glyphs", dtype=torch.float32, device="cpu")
    rows = list(csv.DictReader(RESULTS.read_text().splitlines())) if RESULTS.exists() else []
    done = {row["candidate"]: float(row["accuracy"]) for row in rows}
    for number, candidate in enumerate(CANDIDATES):
        if only not in (None, number):
            continue
        if str(number) not in done:
            world = dataclasses.replace(MotionWorld(num_frames=NUM_FRAMES, seed=SEED), **candidate)
            features = {split: pooled_features(backbone, world, split) for split in NUM_CLIPS}
            done[str(number)] = round(linear_accuracy(features["train"], features["val"]), 4)
            row = {"date": datetime.date.today().isoformat(), "candidate": number, **candidate}
            row |= {"num_val": NUM_CLIPS["val"], "accuracy": done[str(number)]}
            append(RESULTS, list(row), [row])
        print(candidate, done[str(number)], flush=True)
        if done[str(number)] >= THRESHOLD:
            return


if __name__ == "__main__":
    main()
