"""benchmarks/evidence_detection.py: every cell can be built, one is really run, none twice, and gaps are computed as stated."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evidence_detection.py"


@pytest.fixture(scope="module")
def evidence() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("evidence_detection", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def row(evidence, **values) -> dict[str, str]:
    blank = dict.fromkeys(evidence.FIELDS, "")
    return {
        **blank,
        "table": "2",
        "share": "1.0",
        "world": "medium",
        "num_steps": str(evidence.NUM_STEPS),
        "cpu_s": "60",
        "mask_ap": "0",
        "wall_s": "1",
        **values,
    }


def test_every_cell_is_another_experiment(evidence) -> None:
    cells = evidence.cells(["2", "6"], [0, 1])
    assert len(set(cells)) == len(cells) == 2 * (5 * 2 + 2 * 5 * 2)
    assert [cell.seed for cell in cells] == [0] * 30 + [1] * 30
    built = [evidence.build(cell, "easy", 0.3) for cell in cells]
    assert len({repr(one) for one in built}) == len(cells)
    layers = {cell.head: one.heads["detection"].model.neck for cell, one in zip(cells, built) if cell.table == "6"}
    assert [layers[f"bifpn{n}"].num_layers for n in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert {one.backbone.frozen for one in built} == {True, False}
    # Nothing but the cell's own differs: the same schedule, batch and world for all.
    assert {one.loop.num_steps for one in built} == {240}
    assert len({(one.loop.num_steps, one.loop.global_batch, repr(one.data.world)) for one in built}) == 1


def test_gaps_count_beyond_the_spread_of_seeds_only(evidence, tmp_path) -> None:
    path = tmp_path / "results.csv"
    values = {("fpn", "frozen"): (0.30, 0.32), ("fpn", "full"): (0.50, 0.54), ("bifpn", "frozen"): (0.50, 0.56)}
    values[("bifpn", "full")] = (0.52, 0.55)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, evidence.FIELDS)
        writer.writeheader()
        for (head, setting), reached in values.items():
            for seed, value in enumerate(reached):
                writer.writerow(row(evidence, head=head, setting=setting, seed=str(seed), box_ap=str(value)))
                # A longer run is another cell.
                other = row(evidence, head=head, setting=setting, seed=str(seed), box_ap="0.9", num_steps="960")
                writer.writerow(other)
    fpn = next(line for line in evidence.summarise(path, 240).splitlines() if line.startswith("FPN  "))
    assert "0.310 (0.300 to 0.320, 2)" in fpn
    assert "+0.210 (+0.200 to +0.220), beyond the spread" in fpn
    bifpn = next(line for line in evidence.summarise(path, 240).splitlines() if line.startswith("BiFPN, 5 layers"))
    assert "+0.005 (-0.010 to +0.020), within the spread" in bifpn
    missing = [cell for cell in evidence.cells(["2"], [0, 1]) if cell.head == "cascade"]
    assert evidence.eta(path, missing, 2, 240) == "4 cells are missing: about 2 minutes on 2 free core(s)"


def test_calibration_takes_the_first_world_of_the_wanted_difficulty(evidence, tmp_path, monkeypatch) -> None:
    path = tmp_path / "results.csv"
    reached = {"medium": (0.1, 0.2, 0.3), "easy": (0.45, 0.5, 0.39)}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, evidence.FIELDS)
        writer.writeheader()
        for world, values in reached.items():
            for rate, value in zip(evidence.RATES, values):
                known = {"table": "calibration", "world": world, "rate": str(rate), "box_ap": str(value)}
                writer.writerow(row(evidence, head="fpn", setting="full", seed="1000", **known))
    # All of it is on record: nothing is run.
    assert evidence.calibrate(path, tmp_path, 1, 240) == ("easy", 0.3)


@pytest.mark.slow
def test_a_cell_is_run_once_and_recorded(evidence, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evidence, "calibrate", lambda *_, **__: ("easiest", 0.3))
    monkeypatch.setattr(evidence, "cells", lambda tables, seeds: [evidence.Cell("6", "bifpn1", "full", 0.01, 0)])
    arguments = ["--trial", "--results", str(tmp_path / "results.csv"), "--work", str(tmp_path / "work")]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["evidence_detection.py", *arguments])
        evidence.main()
    (found,) = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert found["head"] == "bifpn1" and found["num_steps"] == "2"  # noqa: PT018
    assert float(found["trainable_m"]) > 2.7
    assert 0 <= float(found["box_ap"]) <= 1
    assert list((tmp_path / "work").iterdir()) == []
    monkeypatch.setattr(sys, "argv", ["evidence_detection.py", "--trial"])
    with pytest.raises(SystemExit):
        evidence.main()
    assert "give --results" in capsys.readouterr().err
