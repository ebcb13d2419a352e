"""Row 12: SIGTERM and SIGUSR1 save and end, with a documented code; row 1: what follows is bitwise the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from permafrost.launcher.exit_codes import SAVED
from permafrost.launcher.ranks.signals import SAME, Interruption


def losses(run) -> list[dict]:
    kept = ("step", "detection/loss", "probe/loss")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in kept if name in line} for line in lines]


def test_one_rank_is_signalled_and_all_save_the_same_step(start, tmp_path) -> None:
    """Row 12. The signal comes to rank 1 in step 3; both save it; the same command then ends as if nothing had been."""
    run, whole, name = tmp_path / "run", tmp_path / "whole", "SIGUSR1"
    settings = ("--loop.num-steps", "5", "--loop.checkpoint-every", "100", "--output")
    fault = {"do": "signal", "name": name, "rank": 1, "at": "step", "number": 3}
    job = start("smooth", *settings, str(run), ranks=2, fault=fault)
    uninterrupted = start("smooth", *settings, str(whole), ranks=2)
    assert job.codes() == [SAVED, SAVED], job.all_output()
    expected = f"saved after step 3 and ended by {name} to rank 1: the same command goes on from there"
    assert expected in job.output(0)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000003"]
    assert not (run / "final.json").exists()
    beats = [json.loads(path.read_text()) for path in sorted((run / "heartbeats").iterdir())]
    assert [(beat["phase"], beat["step"]) for beat in beats] == [("done", 3), ("done", 3)]
    job = start("smooth", *settings, str(run), ranks=2)
    assert job.codes() == uninterrupted.codes() == [0, 0], job.all_output()
    assert "start        step 3, resumed from" in job.output(0)
    assert losses(run) == losses(whole)
    assert len(losses(run)) == 5
    assert json.loads((run / "final.json").read_text()) == json.loads((whole / "final.json").read_text())


def test_an_evaluation_is_given_up(start, tmp_path) -> None:
    """Row 12. A signal during an evaluation, which may be long, does not wait for its end; it is made up for."""
    run = tmp_path / "run"
    settings = ("--loop.num-steps", "4", "--loop.evaluate-every", "2", "--output", str(run))
    fault = {"do": "signal", "name": "SIGTERM", "rank": 0, "at": "evaluate"}
    job = start("smooth", *settings, fault=fault)
    assert job.codes() == [SAVED], job.all_output()
    assert "saved after step 2 and ended by SIGTERM to rank 0" in job.output()
    assert not (run / "evaluations.jsonl").exists()
    job = start("smooth", *settings)
    assert job.codes() == [0], job.all_output()
    assert [json.loads(line)["step"] for line in (run / "evaluations.jsonl").read_text().splitlines()] == [2, 4]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_every_process_of_a_job(start, tmp_path, name) -> None:
    """Row 12. Slurm signals the data workers too: whatever that does to them, the step is finished and saved."""
    run = tmp_path / "run"
    job = start("endless", "--output", str(run), "--loop.num-workers", "2")
    job.until(lambda: (run / "metrics.jsonl").exists())
    began = time.monotonic()
    os.killpg(job.processes[0].pid, getattr(signal, name))
    assert job.codes(timeout=60) == [SAVED], job.all_output()
    assert time.monotonic() - began < 60
    (folder,) = (run / "checkpoints").iterdir()
    assert f"saved after step {int(folder.name[5:])} and ended by {name}" in job.output()
    job.gone_after(10)


def test_a_second_signal_ends_at_once(start, tmp_path) -> None:
    """Row 12. Whoever cannot wait sends it again, even while the main thread hangs."""
    run = tmp_path / "run"
    job = start(
        "endless", "--output", str(run), fault={"do": "sleep", "seconds": 600, "rank": 0, "at": "step", "number": 12}
    )
    job.until(lambda: (run / "metrics.jsonl").exists())
    time.sleep(1)
    job.processes[0].send_signal(signal.SIGTERM)
    time.sleep(SAME + 0.5)
    assert job.processes[0].poll() is None
    job.processes[0].send_signal(signal.SIGTERM)
    assert job.codes(timeout=5) == [128 + signal.SIGTERM]
    assert "SIGTERM again: ending at once" in job.output()


def test_repeats_within_a_moment_are_one_and_handlers_come_back() -> None:
    """Row 12. A launcher's signal is often followed by the scheduler's own."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with Interruption().catch() as interruption:
        assert not interruption.wait(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.wait(5)
        time.sleep(0.1)
        assert interruption.received == "SIGUSR1"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_what_a_forked_child_receives_is_its_own() -> None:
    """Row 12. A child that is signalled does not interrupt its parent, and SIGUSR1 does not end it."""
    script = (
        "import os, signal, time\n"
        "from permafrost.launcher.ranks.signals import Interruption\n"
        "with Interruption().catch() as interruption:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        time.sleep(60)\n"
        "        os._exit(0)\n"
        "    time.sleep(0.2)\n"
        "    os.kill(child, signal.SIGUSR1)\n"
        "    time.sleep(0.2)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM\n"
        "    assert not interruption.wait(0.2)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
