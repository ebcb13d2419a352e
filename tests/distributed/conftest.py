"""Run a worker script on N gloo ranks, with a time limit instead of a hang."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_SIZE",
)


def make_clean_environment() -> dict[str, str]:
    """The environment without another launcher's variables, on the CPU, this interpreter's programs found first."""
    dropped = (*LAUNCHER_VARIABLES, "DS_ACCELERATOR")
    environ = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith(("ACCELERATE_", "SLURM_"))}
    environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONUNBUFFERED="1")
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", "")])
    return environ


def run_processes(commands: list[list[str]], environs: list[dict[str, str]], timeout: float) -> list[tuple[int, str]]:
    """Run processes side by side: (exit code, output) of each.

    When one fails, the others get a few seconds and are ended, as they would wait for it; past the limit all are ended.
    A process is ended with everything it started: each has a process group of its own.
    """
    # Memory files rather than pipes: nobody has to read while the processes run.
    outputs = [os.memfd_create("output") for _ in commands]
    processes = [
        subprocess.Popen(command, env=environ, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        for command, environ, output in zip(commands, environs, outputs)
    ]
    limit = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < limit:
            if any(process.poll() for process in processes):
                limit = min(limit, time.monotonic() + 5)
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    results = []
    for process, output in zip(processes, outputs):
        with os.fdopen(output, "rb") as file:
            file.seek(0)
            results.append((process.returncode, file.read().decode(errors="replace")))
    return results


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def clean_environment() -> Callable[[], dict[str, str]]:
    """clean_environment(): variables for a process that no launcher of this session's own decides."""
    return make_clean_environment


@pytest.fixture(scope="session")
def run_command() -> Callable[..., list[tuple[int, str]]]:
    """run_command(commands, environs, timeout): (exit code, output) of processes side by side."""
    return run_processes


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """free_port(): a TCP port that nothing listens on."""
    return find_free_port


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """run_ranks(script, num_ranks, arguments, timeout=..., num_nodes=...): the dict that rank 0 saved.

    The nodes are as launchers number their processes; all are here.
    """

    def run(
        script: str, num_ranks: int, arguments: dict | None = None, *, timeout: float = 300.0, num_nodes: int = 1
    ) -> dict:
        result = tmp_path_factory.mktemp("ranks") / "result.pt"
        command = [sys.executable, str(HERE / script), json.dumps({**(arguments or {}), "result": str(result)})]
        environs = [make_clean_environment() for _ in range(num_ranks)]
        if num_ranks > 1:
            port = str(find_free_port())
            for rank, environ in enumerate(environs):
                on_node = num_ranks // num_nodes
                environ.update(RANK=str(rank), LOCAL_RANK=str(rank % on_node), WORLD_SIZE=str(num_ranks))
                environ.update(LOCAL_WORLD_SIZE=str(on_node))
                environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        outcomes = run_processes([command] * num_ranks, environs, timeout)
        if any(code != 0 for code, _ in outcomes):
            told = [f"--- rank {rank}: exit {code}\n{text[-6000:]}" for rank, (code, text) in enumerate(outcomes)]
            headline = f"{script} on {num_ranks} rank(s) failed or took over {timeout} s"
            pytest.fail("\n".join([headline, *told]), pytrace=False)
        return {**torch.load(result, weights_only=False), "output": "".join(text for _, text in outcomes)}

    return run
