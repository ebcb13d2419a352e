"""`permafrost launch --hostfile` over real ssh and pdsh: what arrives, and what is left when something dies."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # groups of processes, started for minutes in all

PATIENCE = 10
ODD = "a b'c\"d $HOME `id` $(id) ;&|<>* é 测试 %h%n\\ \n-x~"
"""Everything that a shell, or pdsh, could take for its own."""
ENDLESS = ("--loop.num-steps", "100000", "--loop.image-every", "0", "--loop.checkpoint-every", "1000000")
TINY = Path(__file__).resolve().parent.parent / "launcher" / "tiny_recipe.py"
OBSERVER = f'''
"""Each rank writes down what reached it."""
import json, os, pathlib
from permafrost.launcher.recipes.find import find_recipe

def odd():
    if "RANK" in os.environ:
        seen = {{name: os.environ.get(name) for name in ("ODD", "PLAIN", "WORLD_SIZE", "GLOO_SOCKET_IFNAME")}}
        seen |= {{"host": os.uname().nodename, "folder": os.getcwd()}}
        pathlib.Path(__file__).with_name("seen_" + os.environ["RANK"]).write_text(json.dumps(seen))
    return find_recipe({str(TINY)!r} + ":tiny")()
'''


@pytest.fixture
def endless(cluster, tmp_path) -> Callable[[], Any]:
    """endless(): a launch without end, after its first steps."""

    def start() -> Any:
        output = tmp_path / "run"
        command = cluster.launch_command(*ENDLESS, "--output", str(output), "--patience", str(PATIENCE))
        program = cluster.start(command)
        wait_for_steps(program, output, 2)
        return program

    return start


def wait_for_steps(program, output: Path, count: int, timeout: float = 240) -> None:
    until = time.monotonic() + timeout
    metrics = output / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert program.process.poll() is None, program.text()[-6000:]
        assert time.monotonic() < until, program.text()[-6000:]
        time.sleep(0.1)


def test_arguments_and_losses(cluster, read_losses, tmp_path) -> None:
    """Arguments and variables arrive byte for byte, and two nodes train to the losses of one."""
    folder = tmp_path / ODD
    folder.mkdir()
    recipe = folder / f"{ODD} recipe.py"
    recipe.write_text(OBSERVER)
    remote, local = folder / f"{ODD} run", tmp_path / "local"
    arguments = ("--name", ODD, "--export", f"ODD={ODD}", "--export", "PLAIN")
    command = cluster.launch_command(*arguments, "--output", str(remote), recipe=f"{recipe}:odd")
    outcome = cluster.run(command, cwd=folder, timeout=300, PLAIN="plain")
    assert outcome.code == 0, outcome.output[-6000:]
    assert json.loads((remote / "recipe.json").read_text())["experiment"]["name"] == ODD
    seen = [json.loads((folder / f"seen_{rank}").read_text()) for rank in range(2)]
    shared = {"ODD": ODD, "PLAIN": "plain", "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "eth0", "folder": str(folder)}
    assert seen == [{**shared, "host": "node01"}, {**shared, "host": "node02"}]

    command = ["permafrost", "launch", f"{recipe}:odd", "--name", ODD, "--output", str(local), "--num-procs", "2"]
    outcome = cluster.run(command, timeout=200)
    assert outcome.code == 0, outcome.output[-6000:]
    assert "this machine: 2 process(es)" in outcome.output
    assert len(read_losses(local)) == 4
    assert read_losses(remote) == read_losses(local)


def test_killed_rank(cluster, endless) -> None:
    program = endless()
    os.kill(cluster.rank_pid(1), signal.SIGKILL)
    outcome = program.wait(PATIENCE + 10)
    cluster.assert_nothing_left(2)
    assert outcome.code == 3, outcome.output[-6000:]
    assert re.search(r"launch: rank 1 on node02 \(pid \d+\) is gone without a word", outcome.output), outcome.output


def test_partition(cluster, endless) -> None:
    """Neither side can tell the other one; both end."""
    program = endless()
    with cluster.cut_off("node02"):
        cut = time.monotonic()
        outcome = program.wait(PATIENCE + 10)
        cluster.assert_nothing_left(max(0.1, PATIENCE + 10 - (time.monotonic() - cut)))
    assert outcome.code == 3, outcome.output[-6000:]
    assert re.search(r"launch: node02 has not answered for \d+ s: the machine or the network is down", outcome.output)


def test_killed_launcher(cluster, endless) -> None:
    """The launcher cannot say anything any more: the nodes' own agents end what it left."""
    program = endless()
    program.process.kill()
    program.process.wait()
    cluster.assert_nothing_left(PATIENCE + 10)


def test_stopped_rank(cluster, endless) -> None:
    program = endless()
    os.kill(cluster.rank_pid(1), signal.SIGSTOP)
    outcome = program.wait(PATIENCE + 10)
    cluster.assert_nothing_left(2)
    assert outcome.code == 3, outcome.output[-6000:]
    assert re.search(r"launch: rank 1 on node02 \(pid \d+\) has been stopped for 10 s", outcome.output)


def test_killed_pdsh(cluster, endless) -> None:
    """DeepSpeed's own launcher answers this with code 0 and leaves the ranks."""
    program = endless()
    (pdsh,) = [pid for pid, command in cluster.strays().items() if "pdsh -S" in command]
    os.kill(pdsh, signal.SIGKILL)
    outcome = program.wait(30)
    cluster.assert_nothing_left(2)
    assert outcome.code not in (0, 1, 2), outcome.output[-6000:]


def test_interrupt(cluster, endless) -> None:
    program = endless()
    program.process.send_signal(signal.SIGINT)
    outcome = program.wait(40)
    cluster.assert_nothing_left(2)
    assert outcome.code != 0
    assert "launch: the launcher received SIGINT" in outcome.output


@pytest.mark.timeout(900)
def test_restart(cluster, read_losses, tmp_path) -> None:
    """Two ranks on a node, one killed, another start from the last checkpoint: the losses of a run without all that."""
    steps = (
        "--loop.num-steps",
        "24",
        "--loop.checkpoint-every",
        "3",
        "--loop.global-batch",
        "2",
        "--loop.image-every",
        "0",
    )
    wanted, killed = tmp_path / "wanted", tmp_path / "killed"
    outcome = cluster.run(cluster.launch_command(*steps, "--output", str(wanted)), timeout=300)
    assert outcome.code == 0, outcome.output[-6000:]
    program = cluster.start(cluster.launch_command(*steps, "--output", str(killed), "--max-restarts", "1"))
    wait_for_steps(program, killed, 5)
    os.kill(cluster.rank_pid(1), signal.SIGKILL)
    outcome = program.wait(300)
    assert outcome.code == 0, outcome.output[-6000:]
    assert "starting again from the last checkpoint, 1 of at most 1 time(s)" in outcome.output
    assert re.search(r"start +step [1-9]\d*, resumed from", outcome.output)
    assert read_losses(killed) == read_losses(wanted)


def test_mistake_that_ranks_find(cluster, tmp_path) -> None:
    """It is theirs to say, with its code, and is not tried again."""
    command = cluster.launch_command("--output", str(tmp_path / "run"), "--resume", "must", "--max-restarts", "2")
    outcome = cluster.run(command, timeout=200)
    assert outcome.code == 2, outcome.output[-6000:]
    assert "--resume is must but" in outcome.output
    assert "starting again" not in outcome.output
