"""The benchmarks of the kernels: contestants compute the same, floors are right, and a failing test silences the speed-ups."""

from __future__ import annotations

import csv
import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

timing = importlib.import_module("timing")
benchmark = importlib.import_module("window_attention")
gpu_all = importlib.import_module("gpu_all")
records = importlib.import_module("records")


def problem(window: int = 4, side: int = 10) -> benchmark.Problem:
    return benchmark.Problem(
        window=window, side=side, heads=2, batch=2, dtype=torch.float32, device=torch.device("cpu")
    )


@pytest.mark.parametrize("window", [4, 5])
def test_contestants_agree(window: int) -> None:
    one = problem(window)
    expected = one.expected()
    entries = one.contestants(flex=False)
    assert {name for name, _ in entries} == {"eager", "reference", "sdpa"}
    for (name, source), call in entries.items():
        if source == "map":
            assert benchmark.relative_error(call(), expected) < 1e-6, name


@pytest.mark.slow
def test_flex_attention_agrees() -> None:
    one = problem()
    assert benchmark.relative_error(one.contestants(flex=True)["flex", "map"](), one.expected()) < 1e-6


def test_floor_of_the_giants_third_stage() -> None:
    """The floor is what the bytes, products and exponentials of a 64 x 64 map of 2048 channels add up to."""
    cost = benchmark.Problem(window=16, dtype=torch.bfloat16, device=torch.device("meta"), **benchmark.GPU_SIZE).cost
    assert cost["num_bytes"] == pytest.approx(4 * 64 * 64 * 2048 * 2, rel=0.02)
    assert cost["flops"] == 4 * 64 * 64 * 256 * 2048
    assert cost["exponentials"] == 64 * 64 * 256 * 64
    rates = timing.Rates(copy=4.3e12, products=790e12, exponentials=3.9e12)
    assert rates.floor_ms(**cost) == pytest.approx(0.0172, rel=0.01)
    rates = timing.Rates(copy=4.3e12, products=790e12, exponentials=math.inf)
    assert rates.floor_ms(**cost) == pytest.approx(0.0157, rel=0.02)


@pytest.mark.parametrize("is_right", [True, False])
def test_no_speed_up_where_the_ops_test_fails(is_right: bool, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(benchmark, "passes", lambda *arguments: is_right)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "CPU_SIZE", {"side": 10, "heads": 2, "batch": 1})
    rates = timing.Rates(copy=1e10, products=1e11, exponentials=math.inf)
    monkeypatch.setattr(benchmark, "measure_rates", lambda *arguments: rates)
    monkeypatch.setattr(sys, "argv", ["window_attention.py", "--windows", "4", "--repeats", "2", "--no-flex"])
    assert benchmark.main() == (0 if is_right else 1)
    rows = list(csv.DictReader((tmp_path / "window_attention.csv").read_text().splitlines()))
    timed = [row for row in rows if row["device"] != "a GPU"]
    assert all(float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) for row in timed)
    from_map = [row for row in timed if row["input"] == "map"]
    assert all(bool(row["times_as_fast_as_eager"]) == is_right for row in from_map)
    assert all(float(row["error"]) < 1e-6 for row in from_map)
    # What needs a GPU is never estimated.
    missing = [row for row in rows if row["contestant"] in ("triton", "cuda")]
    assert len(missing) == 2
    assert all(row["p50_ms"] == row["floor_ms"] == row["error"] == "not measured" for row in missing)
    assert ("no speed-ups are given" in capsys.readouterr().out) == (not is_right)


def test_a_failing_test_is_seen(tmp_path: Path) -> None:
    good, bad = tmp_path / "test_good.py", tmp_path / "test_bad.py"
    good.write_text("def test_one():\n    assert True\n")
    bad.write_text("def test_one():\n    assert False\n")
    assert timing.passes(str(good))
    assert not timing.passes(str(bad))
    # No test at all proves nothing.
    assert not timing.passes(str(good), "-k", "another")


def test_rows_of_other_columns_are_not_mixed(tmp_path: Path) -> None:
    records.append(tmp_path / "one.csv", ["a", "b"], [{"a": 1, "b": 2}])
    records.append(tmp_path / "one.csv", ["a", "b"], [{"a": 3, "b": 4}])
    assert (tmp_path / "one.csv").read_text() == "a,b\n1,2\n3,4\n"
    with pytest.raises(ValueError, match="move it away"):
        records.append(tmp_path / "one.csv", ["a", "c"], [{"a": 1, "c": 2}])


def test_aims_are_read_off_the_rows() -> None:
    row = {"window": "12", "input": "map", "cache": "cold", "contestant": "cuda", "p50_ms": "0.03"}
    ((_, is_met),) = gpu_all.check_attention([row | {"times_floor": "1.9", "times_as_fast_as_eager": "3.5"}])
    assert is_met
    ((_, is_met),) = gpu_all.check_attention([row | {"times_floor": "2.1", "times_as_fast_as_eager": "3.5"}])
    assert not is_met
    # Without a speed-up its tests have failed.
    assert not list(gpu_all.check_attention([row | {"times_floor": "1.0", "times_as_fast_as_eager": ""}]))
    common = {"name": "swinv2_giant", "of_matrix_rate": "0.7", "times_as_fast_as_timm": "1.6", "cosine": "0.99"}
    times = {"permafrost cuda": "100", "timm compiled": "130", "permafrost cuda fp8 compiled": "70"}
    rows = [common | {"contestant": name, "p50_ms": value} for name, value in times.items()]
    assert [is_met for _, is_met in gpu_all.check_giant(rows)] == [True] * 4
    rows[2]["cosine"] = "0.98"
    rows[1]["p50_ms"] = "110"
    assert [is_met for _, is_met in gpu_all.check_giant(rows)] == [True, False, True, False]


def test_without_a_gpu_nothing_is_recorded(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_all.py", "ops"])
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_all.main() == 2
    assert "sees no GPU" in capsys.readouterr().err
