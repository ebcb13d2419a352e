"""A training outlives the reader of its output: real pipes, a real full device, descriptors that are closed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = f"{Path(__file__).with_name('tiny_recipe.py')}:tiny"
PERMAFROST = [sys.executable, "-m", "permafrost"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "", "OMP_NUM_THREADS": "1"}


def shell(command: str, cwd: Path, **more: object) -> subprocess.CompletedProcess[str]:
    """Run a line of bash; the code is that of the pipe's first program."""
    line = f"{command}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, capture_output=True, text=True, timeout=300, env=environment(), **more
    )


def train_line(run: str, *, steps: int = 3) -> str:
    return f"{sys.executable} -m permafrost train {RECIPE} --output {run} --loop.num-steps {steps}"


def ended(folder: Path) -> int:
    return json.loads((folder / "final.json").read_text())["step"]


def test_a_reader_that_goes_away_does_not_end_a_training(tmp_path: Path) -> None:
    done = shell(f"{train_line('run')} | head -1", tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("wrote the shapes world") or done.stdout.startswith("recipe")
    assert ended(tmp_path / "run") == 3
    assert "warning: standard output is lost (its reader has gone): the work goes on without it" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("where", ["> /dev/full", "0<&- >&- 2>&-"])
def test_output_that_cannot_be_written_does_not_end_a_training(tmp_path: Path, where: str) -> None:
    done = shell(f"{train_line('run')} {where}", tmp_path)
    assert (done.returncode, ended(tmp_path / "run")) == (0, 3)
    assert "Traceback" not in done.stderr
    if where == "> /dev/full":
        assert "standard output is lost (No space left on device)" in done.stderr
    # Nothing that was printed went into a file that took a closed descriptor's number.
    for file in ("metrics.jsonl", "evaluations.jsonl", "provenance.jsonl"):
        for line in (tmp_path / "run" / file).read_text().splitlines():
            json.loads(line)


def test_two_ranks_under_torchrun(tmp_path: Path) -> None:
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 -m permafrost.launcher.train"
    line = f"{torchrun} {RECIPE} --output run --loop.num-steps 3 | head -1"
    done = shell(line, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ended(tmp_path / "run") == 3


def test_launch_goes_on_and_answers_sigterm_with_a_code_of_its_own(tmp_path: Path) -> None:
    arguments = [
        "--output",
        "run",
        "--loop.num-steps",
        "100000",
        "--loop.checkpoint-every",
        "100000",
        "--device",
        "cpu",
    ]
    command = [*PERMAFROST, "launch", RECIPE, "--num-procs", "2", *arguments]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        metrics, limit = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < limit:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
    finally:
        process.kill()
        with process:
            pass
    assert code == 75, "saved, to be continued"
    assert not (tmp_path / "run" / "final.json").exists()
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("command", ["recipes", "--help", "plan quickstart"])
def test_what_only_prints_stays_quiet(tmp_path: Path, command: str) -> None:
    done = shell(f"{sys.executable} -m permafrost {command} | head -1", tmp_path)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


def test_a_stream_that_is_only_full_is_waited_for(tmp_path: Path) -> None:
    """A pipe that another program has made non-blocking."""
    code = (
        "import os, sys; from permafrost.launcher.ranks.exit import run_and_leave\n"
        "def main():\n"
        "    os.set_blocking(1, False)\n"
        "    for number in range(40_000): print(number)\n"
        "run_and_leave(main)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    time.sleep(1.0)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.split() == [str(number) for number in range(40_000)]
