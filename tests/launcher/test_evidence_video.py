"""benchmarks/evidence_video.py: every run can be built, none is repeated, and choices between partners are counted as stated."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evidence_video.py"


@pytest.fixture
def evidence() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("evidence_video", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def entry(label, **scores) -> dict[str, Any]:
    return {"label": label, "top": [{"label": name, "score": score} for name, score in scores.items()]}


def test_a_choice_between_partners_ignores_all_others(evidence) -> None:
    results = [
        entry("grows", turns_star=0.5, grows=0.3, shrinks=0.2),
        entry("shrinks", grows=0.4, shrinks=0.3),
        entry("grows", grows=0.1, moves_left=0.9),
        entry("grows", moves_left=0.9),
        entry("turns_star", turns_cross=0.9),
    ]
    assert evidence.forced_choice(results, evidence.ORDER_PAIRS) == (2.5 / 4, 4)
    assert evidence.forced_choice(results, [evidence.APPEARANCE]) == (0.0, 1)


def test_every_run_can_be_built_and_each_cell_is_in_one(evidence) -> None:
    cells = []
    for heads, setting, seed in evidence.runs([0, 1]):
        experiment = evidence.build(heads, setting, seed, 240)
        assert experiment.backbone.frozen == (setting == "frozen")
        assert (experiment.loop.seed, experiment.loop.num_steps) == (seed, 240)
        assert list(experiment.heads) == list(heads)
        assert {head.optimizer.learning_rate for head in experiment.heads.values()} == {1e-3}
        cells += [(head, setting, seed) for head in heads]
    assert len(cells) == len(set(cells)) == 12


def test_what_is_there_is_listed_and_summarised(evidence, tmp_path, monkeypatch, capsys) -> None:
    facts = dict.fromkeys(evidence.FIELDS, "") | {
        "world": evidence.world_name(evidence.WORLD),
        "setting": "frozen",
        "position": "sincos",
        "num_steps": 240,
        "num_order": 120,
    }
    facts |= {"num_appearance": 40, "top1": 0.5, "order": 0.6, "appearance": 0.7}
    rows = [facts | {"head": head, "seed": seed} for head in evidence.HEADS for seed in (0, 1)]
    rows[1]["order"] = 0.8
    path = tmp_path / "rows.csv"
    evidence.record(path, rows[:3])
    evidence.record(path, rows[3:])
    # Of another world: neither shown nor taken for done.
    evidence.record(path, [row | {"world": "objects 0.1 to 0.2", "setting": "full", "order": 0.0} for row in rows])
    summary = evidence.summarise(path)
    assert "0.700 (0.600 to 0.800)" in summary
    assert "order: 120 clips, chance 0.5, one seed within 0.091 of it" in summary
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["evidence_video.py", "--list", "--results", str(path), "--seeds", "1"])
    evidence.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["done", "missing", "missing", "missing"]


@pytest.mark.slow
def test_a_trial_runs_and_is_not_repeated(evidence, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "rows.csv"
    monkeypatch.setattr(evidence, "runs", lambda seeds: [(("linear", "global"), "frozen", 0)])
    command = ["evidence_video.py", "--trial", "--results", str(path), "--work", str(tmp_path / "work")]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", command)
        evidence.main()
    assert [row["head"] for row in evidence.read(path)] == ["linear", "global"]
