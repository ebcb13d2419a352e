"""Two nodes and a login machine on one Linux machine: network namespaces on a bridge, each node with its own sshd.

The nodes have their own network, processes, mounts and host names; they share the files of the machine. Nothing outside
their namespaces is changed: no address, no ssh configuration of a user's, no port.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REQUIRE_VARIABLE = "PERMAFROST_REQUIRE_MULTINODE"
PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
}
RECIPE = Path(__file__).resolve().parent.parent / "launcher" / "tiny_recipe.py"
BIN = Path(sys.executable).parent
# Nothing of what decides the ranks of other tests.
DROPPED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SSH_CONNECTION")


def find_program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


def obstacle() -> str | None:
    """Why there can be no nodes here."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux's network namespaces, so root"
    missing = [package for name, package in PROGRAMS.items() if find_program(name) is None]
    if missing:
        return f"needs programs of {', '.join(sorted(set(missing)))}"
    probe = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"]
    result = subprocess.run(probe, capture_output=True, text=True)
    return None if result.returncode == 0 else f"needs namespaces, which are refused here: {result.stderr.strip()}"


@dataclass
class Outcome:
    """Ending of a program: code, everything it wrote, and the seconds it took."""

    code: int
    output: str
    seconds: float = 0.0


@dataclass
class Program:
    """A program on the login machine."""

    process: subprocess.Popen
    output: Path
    begun: float = field(default_factory=time.monotonic)

    def wait(self, timeout: float) -> Outcome:
        """Its end, which must come within `timeout` seconds."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still runs after {timeout} s:\n{self.text()[-6000:]}", pytrace=False)
        return Outcome(self.process.returncode, self.text(), time.monotonic() - self.begun)

    def text(self) -> str:
        return self.output.read_text(errors="replace")


class Cluster:
    """The nodes node01 and node02, and the login machine that launches."""

    names = ("node01", "node02")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tag = f"pf{os.getpid()}"
        self._sshd: dict[str, subprocess.Popen] = {}
        self._programs: list[Program] = []
        self.ssh_config = folder / "ssh_config"

    def __enter__(self) -> Cluster:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for program in self._programs:
            if program.process.poll() is None:
                program.process.kill()
                program.process.wait()
        for process in self._sshd.values():
            # The first process of a namespace of processes takes all others along.
            process.kill()
            process.wait()
        for name in ("login", *self.names):
            for pid in self.pids(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", self.namespace(name)], capture_output=True)

    def namespace(self, name: str) -> str:
        return f"{self._tag}{name}"

    def address(self, name: str) -> str:
        return f"10.0.0.{11 + self.names.index(name)}"

    def _build(self) -> None:
        key = self.folder / "key"
        for file in (key, *(self.folder / f"host_{name}" for name in self.names)):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file))
        self._in_login_setup()
        known, config = [], []
        for number, name in enumerate(self.names):
            space = self.namespace(name)
            run("ip", "netns", "add", space)
            # The bridge's end is named for its node, and the node's is eth0 on both, as DeepSpeed alone needs it.
            login = self.namespace("login")
            run("ip", "-n", login, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "-n", login, "link", "set", name, "master", "bridge", "up")
            run("ip", "-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                run("ip", "-n", space, "link", "set", interface, "up")
            public = (self.folder / f"host_{name}.pub").read_text().split()
            known.append(f"{self.address(name)} {public[0]} {public[1]}")
            config.append(
                f"Host {name}\n  HostName {self.address(name)}\n  User root\n  IdentityFile {key}\n  IdentitiesOnly yes\n"
                f"  UserKnownHostsFile {self.folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
                "  StrictHostKeyChecking yes\n  LogLevel ERROR\n"
            )
            self._start_sshd(name, number)
        (self.folder / "known_hosts").write_text("\n".join(known) + "\n")
        # A third one that nobody answers for.
        config.append("Host node03\n  HostName 10.0.0.77\n  ConnectTimeout 3\n")
        self.ssh_config.write_text("".join(config))
        for name in self.names:
            self._await_sshd(name)

    def _in_login_setup(self) -> None:
        login = self.namespace("login")
        run("ip", "netns", "add", login)
        run("ip", "-n", login, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", login, "address", "add", "10.0.0.1/24", "dev", "bridge")
        for interface in ("lo", "bridge"):
            run("ip", "-n", login, "link", "set", interface, "up")

    def _start_sshd(self, name: str, number: int) -> None:
        config = self.folder / f"sshd_{name}"
        config.write_text(
            f"Port 22\nListenAddress {self.address(name)}\nHostKey {self.folder}/host_{name}\nPidFile none\n"
            f"AuthorizedKeysFile {self.folder}/key.pub\nStrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\n"
            "PasswordAuthentication no\nPrintMotd no\nMaxStartups 100\n"
        )
        os.makedirs("/run/sshd", exist_ok=True)
        sshd = find_program("sshd")
        spaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = f"hostname {name} && exec {sshd} -D -e -f {config}"
        with (self.folder / f"sshd_{name}.log").open("wb") as log:
            self._sshd[name] = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(name), *spaces, "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _await_sshd(self, name: str) -> None:
        until = time.monotonic() + 20
        while True:
            outcome = self.run(["ssh", "-F", str(self.ssh_config), name, "hostname"], timeout=20)
            if outcome.code == 0 and outcome.output.strip() == name:
                return
            if time.monotonic() > until:
                log = (self.folder / f"sshd_{name}.log").read_text()
                pytest.fail(f"{name} is not reached: {outcome.output}\n{log}", pytrace=False)
            time.sleep(0.2)

    def on_node(self, name: str, *command: str) -> None:
        """Run something inside a node's own mounts and processes."""
        (first,) = [int(pid) for pid in children(self._sshd[name].pid)]
        run("nsenter", "-t", str(first), "--mount", "--net", "--uts", "--pid", *command)

    @contextlib.contextmanager
    def mounted(self, name: str, *arguments: str) -> Iterator[None]:
        """A mount that one node alone sees; the last argument is where."""
        self.on_node(name, "mount", *arguments)
        try:
            yield
        finally:
            self.on_node(name, "umount", "--lazy", arguments[-1])

    @contextlib.contextmanager
    def cut_off(self, name: str) -> Iterator[None]:
        """A node without its network."""
        run("ip", "-n", self.namespace("login"), "link", "set", name, "down")
        try:
            yield
        finally:
            run("ip", "-n", self.namespace("login"), "link", "set", name, "up")

    def environment(self, **variables: str) -> dict[str, str]:
        found = {
            k: v for k, v in os.environ.items() if k not in DROPPED and not k.startswith(("ACCELERATE_", "SLURM_"))
        }
        found.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONUNBUFFERED="1", **variables)
        # What nodes get of it must be plain: not every entry of a developer's PATH is.
        found["PATH"] = os.pathsep.join(
            [str(BIN), "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/bin"]
        )
        return found

    def start(self, command: Sequence[str], *, cwd: Path | None = None, **variables: str) -> Program:
        """Start a program on the login machine; the process is the program itself."""
        output = self.folder / f"output_{len(self._programs)}"
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace("login"), *command],
                env=self.environment(**variables),
                cwd=cwd or self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        program = Program(process, output)
        self._programs.append(program)
        return program

    def run(self, command: Sequence[str], *, timeout: float, cwd: Path | None = None, **variables: str) -> Outcome:
        """Run a program on the login machine to its end."""
        return self.start(command, cwd=cwd, **variables).wait(timeout)

    def hostfile(self, *lines: str) -> Path:
        path = self.folder / f"hosts_{len(lines)}_{abs(hash(lines))}"
        path.write_text("".join(f"{line}\n" for line in lines or ("node01 slots=1", "node02 slots=1")))
        return path

    def launch_command(self, *arguments: str, hosts: Sequence[str] = (), recipe: str = f"{RECIPE}:tiny") -> list[str]:
        options = ["--hostfile", str(self.hostfile(*hosts)), "--ssh-config", str(self.ssh_config), "--min-free", "0.01"]
        return [str(BIN / "permafrost"), "launch", recipe, *options, *arguments]

    def pids(self, name: str) -> list[int]:
        """Processes in a machine's network namespace."""
        result = subprocess.run(["ip", "netns", "pids", self.namespace(name)], capture_output=True, text=True)
        return [int(line) for line in result.stdout.split()]

    def strays(self) -> dict[int, str]:
        """Every process on login machine and nodes: {number on this machine: command line}.

        sshd's own are the machine's: a session whose other end is gone lasts until TCP says so, with nothing in it.
        """
        found = {}
        for name in ("login", *self.names):
            for pid in self.pids(name):
                with contextlib.suppress(OSError):
                    status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                    command = cmdline(pid).replace(b"\0", b" ").decode(errors="replace")
                    if status not in ("Z", "X") and not re.match(r"sshd: |\S*/sshd |unshare .*sshd", command):
                        found[pid] = command[:300]
        return found

    def assert_nothing_left(self, within: float) -> None:
        """Every process of whatever was started must be gone."""
        until = time.monotonic() + within
        while left := self.strays():
            if time.monotonic() > until:
                pytest.fail(f"left after {within} s: {json.dumps(left, indent=1)}", pytrace=False)
            time.sleep(0.2)

    def rank_pid(self, rank: int) -> int:
        """The number on this machine of a rank's process."""
        for name in self.names:
            for pid in self.pids(name):
                with contextlib.suppress(OSError):
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    if f"RANK={rank}".encode() in variables and b"permafrost.launcher" in cmdline(pid):
                        return pid
        pytest.fail(f"rank {rank} is not there", pytrace=False)


def run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The two nodes; a skip where there can be none, unless PERMAFROST_REQUIRE_MULTINODE makes that a failure."""
    reason = obstacle()
    if reason is not None:
        if os.environ.get(REQUIRE_VARIABLE):
            pytest.fail(f"{REQUIRE_VARIABLE} is set, and there can be no nodes here: {reason}", pytrace=False)
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_left(cluster: Cluster) -> Iterator[None]:
    """No test leaves a process to the next one."""
    yield
    cluster.assert_nothing_left(30)


@pytest.fixture(scope="session")
def read_losses() -> Callable[[Path], list[float]]:
    """read_losses(run folder): the logged loss of each step."""

    def read(folder: Path) -> list[float]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["detection/loss"] for line in lines if "detection/loss" in line]

    return read
