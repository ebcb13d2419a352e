"""benchmarks/evidence_segmentation.py: every cell can be built, none is run twice, and gaps and shares are computed as stated."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evidence_segmentation.py"


@pytest.fixture
def evidence() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("evidence_segmentation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def row(evidence, pixel, transformer, setting, seed, miou) -> dict[str, Any]:
    known = {"pixel_blocks": pixel, "transformer_blocks": transformer, "setting": setting, "seed": seed, "miou": miou}
    return {**dict.fromkeys(evidence.FIELDS, ""), "cpu_s": 60, "wall_s": 1, **known}


def test_every_cell_is_another_experiment_and_shares_come_first(evidence) -> None:
    cells = evidence.cells([0, 1])
    assert len(set(cells)) == len(cells) == 16
    assert [cell.seed for cell in cells] == [0] * 8 + [1] * 8
    built = [evidence.build(cell, 240) for cell in cells]
    assert len({repr(one) for one in built}) == len(cells)
    for cell, experiment in zip(cells, built):
        head = experiment.heads["segmentation"].model
        blocks = (head.pixel_decoder.num_blocks, head.transformer_decoder.num_blocks)
        assert blocks == (cell.pixel_blocks, cell.transformer_blocks)
        assert experiment.backbone.frozen == (cell.setting == "frozen")
        assert experiment.loop.seed == cell.seed
    # Nothing but the cell's own differs: the same schedule, batch, learning rate and world for all.
    common = {
        (one.loop.num_steps, one.loop.global_batch, repr(one.data), repr(one.heads["segmentation"].optimizer))
        for one in built
    }
    assert len(common) == 1
    heads = [(cell.pixel_blocks, cell.transformer_blocks, cell.setting) for cell in cells[:4]]
    assert heads == [(1, 3, "frozen"), (1, 3, "full"), (6, 3, "frozen"), (1, 9, "frozen")]


def test_shares_are_of_the_smallest_heads_gap_at_equal_seeds(evidence, tmp_path) -> None:
    path = tmp_path / "rows.csv"
    reached = {
        (1, 3, "frozen"): (0.30, 0.34),
        (1, 3, "full"): (0.50, 0.44),
        (6, 3, "frozen"): (0.40, 0.42),
        (1, 9, "frozen"): (0.35, 0.32),
    }
    for (pixel, transformer, setting), values in reached.items():
        for seed, value in enumerate(values):
            evidence.record(path, row(evidence, pixel, transformer, setting, seed, value))
    lines = evidence.summarise(path).splitlines()
    smallest = next(line for line in lines if line.startswith("1 pixel-decoder, (3"))
    assert "0.320 (0.300 to 0.340, 2)" in smallest
    assert "+0.150 (+0.100 to +0.200), beyond the spread" in smallest
    shares = {line[:40].strip(): line[40:].strip() for line in lines[lines.index("") + 2 :]}
    # Of seed 0 half of 0.2, of seed 1 four fifths of 0.1; and a quarter, and a loss of a fifth.
    assert shares["6 pixel-decoder, (3 + 1) transformer"] == "0.650 (0.500 to 0.800, 2)"
    assert shares["1 pixel-decoder, (9 + 1) transformer"] == "0.025 (-0.200 to 0.250, 2)"
    missing = evidence.cells([0])[4:]
    assert evidence.eta(path, missing, 2) == "4 cells are missing: about 2 minutes on 2 free core(s)"


def test_without_a_gap_there_is_no_share(evidence, tmp_path) -> None:
    path = tmp_path / "rows.csv"
    for cell, value in (((1, 3, "frozen"), 0.4), ((1, 3, "full"), 0.4), ((6, 3, "frozen"), 0.5)):
        evidence.record(path, row(evidence, *cell, 0, value))
    last = [line for line in evidence.summarise(path).splitlines() if line.startswith("6 pixel-decoder, (3")][-1]
    assert not any(character.isdigit() for character in last[40:])


def test_calibration_takes_the_first_number_of_steps_that_is_enough(evidence, tmp_path) -> None:
    path = tmp_path / "rows.csv"
    for num_steps, value in zip(evidence.STEPS, (0.2, 0.41, 0.5)):
        of_steps = row(evidence, 1, 3, "full", evidence.CALIBRATION_SEED, value) | {"num_steps": num_steps}
        evidence.record(path, of_steps)
    # All of it is on record: nothing is run, and no share is of it.
    assert evidence.calibrate(path, tmp_path) == evidence.STEPS[1]
    assert "0.4" not in evidence.summarise(path)
    path.unlink()
    for num_steps in evidence.STEPS:
        of_steps = row(evidence, 1, 3, "full", evidence.CALIBRATION_SEED, 0.39) | {"num_steps": num_steps}
        evidence.record(path, of_steps)
    assert evidence.calibrate(path, tmp_path) is None


@pytest.mark.slow
def test_a_cell_is_run_once_and_recorded(evidence, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "rows.csv"
    monkeypatch.setattr(evidence, "cells", lambda seeds: [evidence.Cell(1, 3, "full", 0)])
    command = ["evidence_segmentation.py", "--trial", "--results", str(path), "--work", str(tmp_path / "work")]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", command)
        evidence.main()
    (found,) = csv.DictReader(path.read_text().splitlines())
    assert (found["setting"], found["num_steps"]) == ("full", "2")
    assert float(found["trainable_m"]) > 2.7
    assert 0 <= float(found["miou"]) <= 1
    assert list((tmp_path / "work").iterdir()) == []
    monkeypatch.setattr(sys, "argv", ["evidence_segmentation.py", "--trial"])
    with pytest.raises(SystemExit):
        evidence.main()
    assert "give --results" in capsys.readouterr().err
