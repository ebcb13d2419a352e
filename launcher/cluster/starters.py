"""Start the ranks: through DeepSpeed's launcher over pdsh on several nodes, from this process itself on one machine.

Either way every rank is `python -m permafrost.launcher.cluster.rank_main WORD`, and everything that is started carries the
launch's number in its environment, by which node agents find and end it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from permafrost.launcher.cluster.environment import shell_exports
from permafrost.launcher.cluster.hostfile import Node, write_hostfile
from permafrost.launcher.cluster.node_agent import LAUNCH_VARIABLE, NODE_VARIABLE
from permafrost.launcher.errors import LaunchError

RANK_MODULE = "permafrost.launcher.cluster.rank_main"
FRONT = "launcher"
"""Stands for a node's number in the environment of the programs that start ranks elsewhere."""
# What ssh, pdsh and Python need of the launcher's environment; DeepSpeed hands on some others half-quoted.
_KEPT = (
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SSH_AUTH_SOCK",
    "LANG",
    "LC_ALL",
    "TMPDIR",
)


class Starter(Protocol):
    """Programs that were started.

    Attributes:
        ends_siblings: whether a rank that fails takes along the others of its node.
    """

    ends_siblings: bool

    def poll(self) -> int | None:
        """Return the exit code, 0 or that of the first one that failed; None while any runs."""

    def end(self) -> None:
        """Kill what this machine still runs of them with SIGKILL, and wait for it."""


class LocalRanks:
    """A Starter of which every rank is a child of this process."""

    ends_siblings = False

    def __init__(self, word: str, *, num_ranks: int, address: str, port: int, launch: str) -> None:
        command = [sys.executable, "-u", "-m", RANK_MODULE, word]
        shared = {
            **os.environ,
            LAUNCH_VARIABLE: launch,
            NODE_VARIABLE: "0",
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        self._processes = [
            subprocess.Popen(
                command,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            for rank in range(num_ranks)
        ]

    def poll(self) -> int | None:
        return _first_code(self._processes)

    def end(self) -> None:
        _end(self._processes)


class DeepSpeedRanks:
    """A Starter that runs `deepspeed --hostfile ... --launcher pdsh`, in an environment that holds nothing a shell could change."""

    ends_siblings = True

    def __init__(self, word: str, *, command: Sequence[str], environment: Mapping[str, str], launch: str) -> None:
        own = {LAUNCH_VARIABLE: launch, NODE_VARIABLE: FRONT}
        self._process = subprocess.Popen(
            [*command, word],
            env={**environment, **own},
            # DeepSpeed changes to its own current folder on every node, unquoted.
            cwd="/",
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def poll(self) -> int | None:
        return _first_code([self._process])

    def end(self) -> None:
        _end([self._process])


def deepspeed_command(hostfile: Path, *, address: str, port: int) -> list[str]:
    """Return the command of DeepSpeed's launcher; the rank's word follows."""
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", str(hostfile), "--force_multi", "--no_ssh_check", "--launcher", "pdsh"),
        *("--master_addr", address, "--master_port", str(port)),
        *("--no_local_rank", "--module", RANK_MODULE),
    ]


def write_deepspeed_files(
    folder: Path, nodes: Sequence[Node], environment: Mapping[str, str], *, launch: str, ssh_config: Path | None
) -> tuple[Path, dict[str, str]]:
    """Write the hostfile, and return it and the environment of DeepSpeed's launcher, whose DS_ENV_FILE names what the nodes' shells export.

    Args:
        folder: of this launch; it holds the files.
        nodes: in rank order.
        environment: the ranks' variables; those that must be there before Python starts go into the file.
        launch: number of the launch.
        ssh_config: for ssh -F.

    Raises:
        LaunchError: a value could be changed by a shell.
    """
    hostfile, env_file = folder / "hostfile", folder / "deepspeed_env"
    write_hostfile(hostfile, list(nodes))
    # pdsh puts the node's number in the place of %n.
    exports = {**shell_exports(environment), LAUNCH_VARIABLE: launch, NODE_VARIABLE: "%n"}
    env_file.write_text("".join(f"{name}={value}\n" for name, value in exports.items()))
    own = {name: os.environ[name] for name in _KEPT if name in os.environ}
    own |= {"DS_ENV_FILE": str(env_file), "PYTHONUNBUFFERED": "1", "PDSH_SSH_ARGS_APPEND": ssh_arguments(ssh_config)}
    if "DS_ACCELERATOR" in os.environ:
        own["DS_ACCELERATOR"] = os.environ["DS_ACCELERATOR"]
    return hostfile, own


def ssh_arguments(config: Path | None) -> str:
    """Return what pdsh adds to its calls of ssh.

    Raises:
        LaunchError: the file's name has what pdsh would split.
    """
    if config is None:
        return "-o BatchMode=yes"
    if not re.fullmatch(r"[A-Za-z0-9_@+=:,./-]+", str(config)):
        raise LaunchError(f"--ssh-config {str(config)!r}: pdsh takes only letters, digits and _@+=:,./- in this name")
    return f"-o BatchMode=yes -F {config}"


def require_programs() -> None:
    """Check that ssh and pdsh are here.

    Raises:
        LaunchError: naming what to install.
    """
    for program, package in (("ssh", "openssh-client"), ("pdsh", "pdsh")):
        if shutil.which(program) is None:
            raise LaunchError(f"{program} is not on PATH here, and --hostfile needs it: apt-get install {package}")


def _first_code(processes: Sequence[subprocess.Popen]) -> int | None:
    codes = [process.poll() for process in processes]
    if any(code is None for code in codes):
        return None
    return next((code for code in codes if code), 0)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            # Each leads a process group of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
