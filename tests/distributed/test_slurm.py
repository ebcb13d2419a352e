"""Slurm itself: one node of its own on this machine, `srun` and the batch script of `permafrost launch --slurm`.

Its daemons run in the foreground on ports of their own, with files in a temporary folder; nothing of a cluster's is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from permafrost.launcher.exit_codes import SAVED

pytestmark = pytest.mark.slow  # daemons, and groups of processes

HERE = Path(__file__).resolve().parent
TINY = f"{HERE.parent / 'launcher' / 'tiny_recipe.py'}:tiny"
REQUIRE_VARIABLE = "PERMAFROST_REQUIRE_MULTINODE"
PROGRAMS = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client"}
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@dataclass
class Slurm:
    """A running one-node cluster.

    Attributes:
        folder: where its files are, and jobs run.
        environment: for its clients.
    """

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=timeout
        )


def obstacle() -> str | None:
    """Why there can be no Slurm here."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [package for name, package in PROGRAMS.items() if shutil.which(name, path=path) is None]
    return f"needs Slurm: apt-get install {' '.join(missing)}" if missing else None


@pytest.fixture(scope="module")
def slurm(
    tmp_path_factory: pytest.TempPathFactory, clean_environment: Callable, free_port: Callable
) -> Iterator[Slurm]:
    """A node that takes jobs; a skip where there can be none, unless PERMAFROST_REQUIRE_MULTINODE makes that a failure."""
    reason = obstacle()
    if reason is not None:
        if os.environ.get(REQUIRE_VARIABLE):
            pytest.fail(f"{REQUIRE_VARIABLE} is set, and there can be no Slurm here: {reason}", pytrace=False)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().partition(".")[0]
    for name in ("spool", "state"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, host=host, ports=[free_port() for _ in range(2)]))
    environment = {**clean_environment(), "SLURM_CONF": str(configuration)}
    environment["PATH"] += os.pathsep + "/usr/sbin"
    own = {"--key-file": "key", "--socket": "munge.sock", "--pid-file": "pid", "--seed-file": "seed"}
    daemons = [
        # The folder is not the system's, which munged would rather have.
        ["munged", "--foreground", "--force", *(word for k, v in own.items() for word in (k, str(folder / v)))],
        ["slurmctld", "-D", "-f", str(configuration)],
        ["slurmd", "-D", "-f", str(configuration), "-N", host],
    ]
    found = Slurm(folder, environment)
    with contextlib.ExitStack() as stack, (folder / "daemons.log").open("wb") as log:
        for command in daemons:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            # In the other order, munged last.
            stack.callback(process.wait)
            stack.callback(process.terminate)
            time.sleep(0.5)
        limit = time.monotonic() + 60
        while found.run("sinfo", "--noheader", "--format=%t").stdout.strip() != "idle":
            if time.monotonic() > limit:
                pytest.fail(f"the node takes no jobs\n{(folder / 'daemons.log').read_text()}", pytrace=False)
            time.sleep(0.5)
        yield found
        found.run("scancel", "--quiet", "--user=root")
        limit = time.monotonic() + 60
        while found.run("squeue", "--noheader").stdout.strip() and time.monotonic() < limit:
            time.sleep(0.5)


def test_srun(slurm: Slurm, run_ranks: Callable) -> None:
    """Two ranks from nothing but Slurm's own variables, and the steps of one process."""
    result = slurm.folder / "result.pt"
    worker = [sys.executable, str(HERE / "launcher_worker.py"), json.dumps({"result": str(result)})]
    ended = slurm.run("srun", "--ntasks=2", "--kill-on-bad-exit=1", *worker)
    assert ended.returncode == 0, ended.stderr[-6000:]
    found = torch.load(result, weights_only=False)
    assert "Slurm" in found["world"]
    assert "DDP over 2 processes" in found["engine"]
    assert [rank["RANK"] for rank in found["ranks"]] == ["0", "1"]
    alone = run_ranks("launcher_worker.py", 1)
    for step, wanted in zip(found["steps"], alone["steps"], strict=True):
        assert step == pytest.approx(wanted, rel=1e-5)


def test_batch_script(slurm: Slurm) -> None:
    """SIGUSR1, as before a time limit: the job ends saved, is not started again in itself, and goes on when submitted again."""
    run, script = slurm.folder / "run", slurm.folder / "job.sbatch"
    settings = ("--loop.num-steps", "40", "--loop.image-every", "0", "--loop.checkpoint-every", "1000")
    options = ("--num-procs", "2", "--device", "cpu", "--max-restarts", "1", "--slurm", str(script))
    permafrost = str(Path(sys.executable).with_name("permafrost"))
    written = slurm.run(permafrost, "launch", TINY, *settings, *options, "--output", str(run))
    assert written.returncode == 0, written.stderr
    job = subprocess.Popen(
        ["sbatch", "--wait", "--parsable", str(script)],
        env=slurm.environment,
        cwd=slurm.folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    with job:
        number = job.stdout.readline().strip()
        log = slurm.folder / f"tiny-{number}.log"
        limit = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists():
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < limit, log.read_text()
            time.sleep(0.05)
        assert slurm.run("scancel", "--signal=USR1", number).returncode == 0
        assert job.wait(timeout=120) == SAVED, log.read_text()
    assert "ended by SIGUSR1 to rank 0, SIGUSR1 to rank 1" in log.read_text()
    assert not (run / "final.json").exists()
    again = slurm.run("sbatch", "--wait", "--parsable", str(script))
    assert again.returncode == 0, (slurm.folder / f"tiny-{again.stdout.strip()}.log").read_text()
    starts = [json.loads(line) for line in (run / "provenance.jsonl").read_text().splitlines()]
    assert [start["world_size"] for start in starts] == [2, 2]
    assert starts[0]["start_step"] == 0 < starts[1]["start_step"]
    assert json.loads((run / "final.json").read_text())["step"] == 40
