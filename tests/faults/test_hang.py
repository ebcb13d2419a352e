"""Rows 13 and 15, one machine: a rank that is stopped, stuck or killed takes the run down in time, and is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TIMEOUT = 8.0


def beats(run: Path) -> dict[int, dict]:
    return {int(p.stem[5:]): json.loads(p.read_text()) for p in (run / "heartbeats").glob("rank_*.json")}


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        pytest.param("torchrun", "accelerate", id="torchrun"),
        pytest.param("deepspeed", "deepspeed", id="deepspeed", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("deed", ["stop", "kill"])
def test_a_stopped_or_killed_rank_takes_the_run_down_and_is_named(start, tmp_path, launcher, engine, deed) -> None:
    run = tmp_path / "run"
    job = start(
        "endless",
        *("--output", str(run), "--engine.kind", engine, "--loop.process-group-timeout", str(TIMEOUT)),
        *("--loop.num-workers", "1"),  # which must not outlive its rank
        ranks=2,
        launcher=launcher,
        fault={"do": deed, "rank": 1, "at": "step", "number": 20},
    )
    job.until(lambda: beats(run).get(0, {}).get("step", 0) >= 19)
    job.gone_after(TIMEOUT + 10)
    assert job.processes[0].returncode != 0
    output = job.output()
    said = [line for line in output.splitlines() if line.startswith("error: rank 0 of 2")]
    if deed == "kill" and not said:
        # The launcher saw it first, and ended the other one.
        assert "Signal 9 (SIGKILL)" in output or "exits with return code = -9" in output
        return
    assert len(said) == 1, output
    assert "rank 1 (pid" in said[0]
    if deed == "stop":
        assert "waited in vain" in said[0]
        assert "is stopped (by SIGSTOP or a debugger); last heard in phase" in said[0]
        assert said[0].endswith("was killed")
    else:
        assert "lost its connection" in said[0]
        assert "is gone" in said[0]


def test_scoring_may_take_longer_than_the_timeout(start, tmp_path) -> None:
    """Rank 0 scores for longer than the process group's timeout while rank 1 waits: no rank gives up."""
    run, timeout = tmp_path / "run", 5.0
    job = start(
        "smooth",
        *("--output", str(run), "--loop.num-steps", "2", "--loop.process-group-timeout", str(timeout)),
        ranks=2,
        fault={"do": "sleep", "seconds": timeout + 6, "rank": 0, "at": "score"},
    )
    assert job.codes() == [0, 0], job.all_output()
    assert json.loads((run / "final.json").read_text())["step"] == 2


def test_a_main_rank_that_is_stopped_while_it_scores_is_found_out(start, tmp_path) -> None:
    """The same wait, in vain: the heartbeats end it, since no collective does."""
    run, timeout = tmp_path / "run", 5.0
    job = start(
        "smooth",
        *("--output", str(run), "--loop.num-steps", "2", "--loop.process-group-timeout", str(timeout)),
        ranks=2,
        fault={"do": "stop", "rank": 0, "at": "score"},
    )
    job.until(lambda: beats(run).get(1, {}).get("phase") == "evaluate")
    job.gone_after(timeout + 10)
    assert all(process.returncode != 0 for process in job.processes)
    (said,) = [line for line in job.output(1).splitlines() if line.startswith("error: ")]
    assert said.startswith("error: rank 1 of 2, in phase evaluate of step 2, gives up. rank 0 (pid")
    assert "is stopped (by SIGSTOP or a debugger); last heard in phase" in said
    assert said.endswith("was killed")
