"""`permafrost launch` on one machine; several are in tests/multinode."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from permafrost.launcher import node_agent
from permafrost.launcher.cli import SAVED, main

TINY = f"{Path(__file__).parent / 'tiny_recipe.py'}:tiny"
LAUNCH = (str(Path(sys.executable).with_name("permafrost")), "launch")


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The launcher's children that are ranks."""
    found = []
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if b"permafrost.launcher.launched" in Path(f"/proc/{child}/cmdline").read_bytes():
            found.append(int(child))
    return found


@pytest.fixture
def launched(tmp_path, request):
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
        while any(node_agent.process_state(rank)[0] not in ("", "Z") for rank in ranks):
            assert time.monotonic() < until, "a rank is left"
            time.sleep(0.1)
    finally:
        if launcher.poll() is None:
            launcher.kill()
        launcher.wait()


def test_killed_rank(launched):
    launcher, ranks, output = launched
    os.kill(ranks[1], signal.SIGKILL)
    assert launcher.wait(20) == 3
    assert f"launch: rank 1 on this machine (pid {ranks[1]}) is gone without a word" in output.read_text()


@pytest.mark.parametrize("launched", [["--max-restarts", "1"]], indirect=True)
def test_a_signal_to_a_rank_is_no_fault(launched):
    """Saved, and not started again."""
    launcher, ranks, output = launched
    os.kill(ranks[1], signal.SIGTERM)
    assert launcher.wait(30) == SAVED
    assert "ended by SIGTERM to rank 1: the same command goes on from there" in output.read_text()
    assert "starting again" not in output.read_text()


def test_killed_launcher(launched):
    launcher, ranks, _ = launched
    # One that is stopped cannot hear SIGTERM either.
    os.kill(ranks[0], signal.SIGSTOP)
    launcher.kill()
    until = time.monotonic() + node_agent.LAST_WORDS + 10
    while any(node_agent.process_state(rank)[0] not in ("", "Z") for rank in ranks):
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
def test_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("node01 slots=2\n")
    device = () if "--ssh-config" in options else ("--device", "cpu")
    assert main(["launch", TINY, *options, *device]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_agent_answers_over_a_pipe(tmp_path):
    """The agent needs nothing but its source and a Python: no package, no folder of ours."""
    facts = {
        "do": "facts",
        "folder": str(tmp_path),
        "environment": {},
        "sys_path": [],
        "packages": ["torch"],
        "files": [],
    }
    requests = [{**facts, "paths": [str(tmp_path), "/nowhere"], "rooms": [str(tmp_path / "new")]}, {"do": "end"}]
    result = subprocess.run(
        [sys.executable, "-S", node_agent.__file__],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    answer = json.loads(line.removeprefix(node_agent.MARK))
    assert answer["versions"]["torch"] == "not installed"
    assert answer["code"] == ""
    assert answer["paths"] == {str(tmp_path): True, "/nowhere": False}
    room = answer["rooms"][str(tmp_path / "new")]
    assert room["place"] == str(tmp_path)
    assert room["free"] > 0
