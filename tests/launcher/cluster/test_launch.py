"""`permafrost launch` on one machine; several are in tests/multinode."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from permafrost.launcher import machine
from permafrost.launcher.cli import main
from permafrost.launcher.cluster import node_agent
from permafrost.launcher.cluster.connections import agent_program
from permafrost.launcher.cluster.hostfile import Node
from permafrost.launcher.cluster.preflight import _hardware_problems
from permafrost.launcher.exit_codes import SAVED

TINY = f"{Path(__file__).parents[1] / 'tiny_recipe.py'}:tiny"
LAUNCH = (str(Path(sys.executable).with_name("permafrost")), "launch")


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The launcher's children that are ranks."""
    found = []
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if b"permafrost.launcher.cluster.rank_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            found.append(int(child))
    return found


@pytest.fixture
def launched(tmp_path, request) -> Iterator[tuple[subprocess.Popen, list[int], Path]]:
    """A run without end on two ranks, after its first step: (launcher, pids of its ranks, file of its output)."""
    output = tmp_path / "output"
    command = [*LAUNCH, TINY, "--output", str(tmp_path / "run"), "--num-procs", "2", "--device", "cpu"]
    command += getattr(request, "param", [])
    with output.open("wb") as file:
        launcher = subprocess.Popen(
            [*command, "--loop.num-steps", "100000", "--loop.image-every", "0", "--patience", "5"],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert launcher.poll() is None, output.read_text()
            assert time.monotonic() < until, output.read_text()
            time.sleep(0.1)
        ranks = ranks_of(launcher)
        assert len(ranks) == 2
        yield launcher, ranks, output
        until = time.monotonic() + 5
        while not all(machine.process(rank).has_ended for rank in ranks):
            assert time.monotonic() < until, "a rank is left"
            time.sleep(0.1)
    finally:
        if launcher.poll() is None:
            launcher.kill()
        launcher.wait()


def test_killed_rank(launched) -> None:
    launcher, ranks, output = launched
    os.kill(ranks[1], signal.SIGKILL)
    assert launcher.wait(20) == 3
    assert f"launch: rank 1 on this machine (pid {ranks[1]}) is gone without a word" in output.read_text()


@pytest.mark.parametrize("launched", [["--max-restarts", "1"]], indirect=True)
def test_a_signal_to_a_rank_is_no_fault(launched) -> None:
    """Saved, and not started again."""
    launcher, ranks, output = launched
    os.kill(ranks[1], signal.SIGTERM)
    assert launcher.wait(30) == SAVED
    assert "ended by SIGTERM to rank 1: the same command goes on from there" in output.read_text()
    assert "starting again" not in output.read_text()


def test_killed_launcher(launched) -> None:
    launcher, ranks, _ = launched
    # One that is stopped cannot hear SIGTERM either.
    os.kill(ranks[0], signal.SIGSTOP)
    launcher.kill()
    until = time.monotonic() + node_agent.LAST_WORDS + 10
    while not all(machine.process(rank).has_ended for rank in ranks):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-procs", "3"), "loop.global_batch 2 does not divide over 3 process"),
        (("--num-procs", "1", "--mesh.tensor", "2"), "mesh.tensor is 2 but there are 1 process"),
        (("--interface", "eth0"), "--interface is for several nodes"),
        (("--ssh-config", "x"), "--ssh-config is for several nodes"),
        (("--num-procs", "2", "--hostfile", "hosts"), "--num-procs is for one machine"),
        (("--hostfile", "nowhere"), "--hostfile nowhere cannot be read: No such file"),
        (("--export", "ABSENT_VARIABLE"), "ABSENT_VARIABLE: it is not set here"),
        (("--num-procs", "1024", "--loop.global-batch", "1024"), "this machine: --num-procs 1024, but it has"),
        (("--output", "/proc/run"), "this machine: the run folder /proc/run cannot be written"),
        (("--loop.num-stepz", "1"), "num-steps"),
    ],
)
def test_refused(options, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("node01 slots=2\n")
    device = () if "--ssh-config" in options else ("--device", "cpu")
    assert main(["launch", TINY, *options, *device]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_agent_answers_over_a_pipe(tmp_path) -> None:
    """The agent needs nothing but what it is sent and a Python: no package, no folder of ours."""
    facts = {
        "do": "facts",
        "folder": str(tmp_path),
        "environment": {},
        "sys_path": [],
        "packages": ["torch"],
        "files": [],
    }
    requests = [{**facts, "paths": [str(tmp_path), "/nowhere"], "rooms": [str(tmp_path / "new")]}, {"do": "end"}]
    program, sources = agent_program()
    result = subprocess.run(
        # Without site-packages, PYTHONPATH and the current folder.
        [sys.executable, "-I", "-S", *program],
        input=sources + "".join(json.dumps(request) + "\n" for request in requests).encode(),
        capture_output=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.decode().splitlines()
    answer = json.loads(line.removeprefix(node_agent.MARK))
    assert answer["versions"]["torch"] == "not installed"
    assert answer["code"] == ""
    assert answer["paths"] == {str(tmp_path): True, "/nowhere": False}
    room = answer["rooms"][str(tmp_path / "new")]
    assert room["place"] == str(tmp_path)
    assert room["free"] > 0


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 4),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f2a, GPU-91c0"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 4),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2", "HIP_VISIBLE_DEVICES": "0"}, 1),
    ],
)
def test_every_gpu_that_is_left_is_used(variables, count, monkeypatch, capsys) -> None:
    """All of a machine with four are used, whatever this one has."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "_nvidia_gpus", lambda: 4)
    assert machine.num_gpus() == count
    # The number of ranks, as the launcher itself counts them: groups of 4 fit into four ranks alone, and a batch of 5 into none.
    assert main(["launch", TINY, "--mesh.tensor", "4", "--loop.global-batch", "5", "--output", "/proc/run"]) == 2
    said = capsys.readouterr().err
    assert f"{max(count, 1)} process(es)" in said.rpartition("error: ")[2]
    assert ("no GPU is used here: 1 process" in said) == (count == 0)


@pytest.mark.parametrize(
    ("fact", "uses_gpus", "problem"),
    [
        ({"gpus": 8, "cores": 2}, True, None),
        ({"gpus": 4, "cores": 96}, True, "slots=8 in the hostfile, but it has 4 GPU(s): give 4 or fewer"),
        ({"gpus": 0, "cores": 96}, True, "has 0 GPU(s): leave the node out, or run with --device cpu"),
        ({"gpus": 8, "cores": 4}, False, "slots=8 in the hostfile, but it has 4 core(s) and no GPU: give 4 or fewer"),
    ],
)
def test_slots_of_a_node(fact, uses_gpus, problem) -> None:
    found = _hardware_problems(Node("node01", 8), fact, uses_gpus=uses_gpus, is_remote=True)
    assert bool(found) == (problem is not None)
    assert all(problem in text for text in found)


@pytest.mark.gpu
def test_gpus_are_counted_as_torch_counts_them() -> None:
    assert machine.num_gpus() == torch.cuda.device_count()
