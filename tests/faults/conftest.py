"""Real trainings in processes of their own, to be killed, stopped and starved."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MARK = "PERMAFROST_TEST_JOB"


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean_environment() -> dict[str, str]:
    """The environment without another launcher's variables, on the CPU, this interpreter's programs found first."""
    dropped = (*LAUNCHER_VARIABLES, "DS_ACCELERATOR", "LOCAL_SIZE")
    environ = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith(("ACCELERATE_", "SLURM_"))}
    environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONUNBUFFERED="1")
    environ["PATH"] = os.pathsep.join([str(BIN), environ.get("PATH", "")])
    return environ


class Job:
    """Processes side by side with everything that they start, found by a mark in their environment."""

    def __init__(
        self, commands: list[list[str]], environs: list[dict[str, str]], folder: Path, cwds: list[Path]
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.outputs = [folder / f"output_{self.mark}_{i}.txt" for i in range(len(commands))]
        self.started = time.monotonic()
        self.processes = []
        for command, environ, output, cwd in zip(commands, environs, self.outputs, cwds):
            with output.open("wb") as file:
                process = subprocess.Popen(
                    command,
                    env={**environ, MARK: self.mark},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd=cwd,
                )
            self.processes.append(process)

    def output(self, index: int = 0) -> str:
        return self.outputs[index].read_text(errors="replace")

    def all_output(self) -> str:
        return "\n".join(f"--- {i}: {p.poll()}\n{self.output(i)[-6000:]}" for i, p in enumerate(self.processes))

    def is_over(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def codes(self, timeout: float = 120.0) -> list[int]:
        """Exit codes, once all have ended; past the limit the test fails."""
        limit = time.monotonic() + timeout
        while not self.is_over():
            if time.monotonic() > limit:
                pytest.fail(f"still running after {timeout} s\n{self.all_output()}", pytrace=False)
            time.sleep(0.05)
        return [process.returncode for process in self.processes]

    def until(self, condition: Callable[[], object], timeout: float = 120.0) -> None:
        """Wait for a condition; when the job ends before, or past the limit, the test fails."""
        limit = time.monotonic() + timeout
        while not condition():
            if self.is_over() or time.monotonic() > limit:
                pytest.fail(f"it did not come to what was waited for\n{self.all_output()}", pytrace=False)
            time.sleep(0.01)

    def living(self) -> list[int]:
        """Process ids of everything of this job that has not ended, zombies aside."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                        state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                        found += [int(entry.name)] if state != "Z" else []
        return found

    def gone_after(self, timeout: float) -> float:
        """Seconds until nothing of the job lives; past the limit the test fails."""
        start = time.monotonic()
        while self.living() or not self.is_over():
            if time.monotonic() - start > timeout:
                left = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ") for pid in self.living()}
                pytest.fail(f"after {timeout} s there are still {left}\n{self.all_output()}", pytrace=False)
            time.sleep(0.05)
        return time.monotonic() - start

    def end(self) -> None:
        for pid in self.living():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """start(recipe, *arguments, ranks=2, launcher=None, fault=None, variables=None, ...): a running Job.

    `recipe` is a function of recipe.py. launcher: None starts each rank by itself; "torchrun" and "deepspeed" are real.
    `fault` is read by recipe.py. Without a launcher, ranks may have `rank_variables`, `cwds` and `more` arguments of their own.
    """
    jobs: list[Job] = []

    def begin(
        recipe: str,
        *arguments: str,
        ranks: int = 1,
        launcher: str | None = None,
        fault: dict | None = None,
        variables: dict[str, str] | None = None,
        rank_variables: list[dict[str, str]] | None = None,
        cwds: list[Path] | None = None,
        more: list[list[str]] | None = None,
    ) -> Job:
        environ = {**clean_environment(), **(variables or {})}
        if fault is not None:
            environ["FAULT"] = json.dumps(fault)
        train = ["permafrost.launcher.train", f"{HERE / 'recipe.py'}:{recipe}", *arguments]
        port = str(find_free_port())
        own = rank_variables or [{}] * ranks
        if launcher == "torchrun":
            command = [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port, "-m", *train]
            commands, environs = [command], [environ]
        elif launcher == "deepspeed":
            command = [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port, "--module", *train]
            commands, environs = [command], [environ]
        else:
            commands = [[sys.executable, "-m", *train, *own_words] for own_words in more or [[]] * ranks]
            environs = [dict(environ) for _ in range(ranks)]
            if ranks > 1:
                for rank, one in enumerate(environs):
                    one.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
                    one.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        environs = [{**one, **more} for one, more in zip(environs, own)]
        job = Job(commands, environs, tmp_path, cwds or [tmp_path] * len(commands))
        jobs.append(job)
        return job

    yield begin
    for job in jobs:
        job.end()
