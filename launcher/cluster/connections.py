"""Talk to the agents, from the launcher's side: one connection per node takes requests out, and answers and reports in."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import selectors
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from permafrost.launcher import machine
from permafrost.launcher.cluster import node_agent
from permafrost.launcher.cluster.hostfile import Node

THIS_MACHINE = "this machine"
CONNECT_TIMEOUT = 15
"""Seconds for ssh to reach a node."""

_SENT = (machine, node_agent)
# One line, which any shell passes on. It reads the sources from the connection and runs the agent's with the rest of the connection
# as its input; the other is found by its name, as a module is that was imported before.
_BOOTSTRAP = (
    f"import sys, types; name = {machine.__name__!r}; sys.modules[name] = types.ModuleType(name); "
    "machine, agent = [sys.stdin.buffer.read(int(size)) for size in sys.argv[1:]]; "
    "exec(compile(machine, 'machine', 'exec'), vars(sys.modules[name])); "
    "exec(compile(agent, 'node_agent', 'exec'), {'__name__': '__main__'})"
)


def ssh_command(name: str, config: Path | None) -> list[str]:
    """Return the start of an ssh command to a node that never asks a question; the command for its shell follows."""
    command = ["ssh", "-T", "-a", "-x", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_TIMEOUT}"]
    if config is not None:
        command += ["-F", str(config)]
    return [*command, "--", name]


def agent_program() -> tuple[list[str], bytes]:
    """Return a Python's arguments with which it becomes an agent, and the sources that it reads first."""
    sources = [Path(inspect.getfile(module)).read_bytes() for module in _SENT]
    return ["-c", _BOOTSTRAP, *(str(len(source)) for source in sources)], b"".join(sources)


@dataclass
class NodeConnection:
    """The way to one node's agent.

    Attributes:
        name: the node's, for messages.
        process: ssh, or the agent itself on this machine.
        heard: when its last line came, by time.monotonic.
        ended: whether its connection is closed.
        report: the last report of a watched launch; None before the first.
        replies: answers that nobody has taken yet.
    """

    name: str
    process: subprocess.Popen[bytes]
    errors: int
    heard: float = field(default_factory=time.monotonic)
    ended: bool = False
    report: dict[str, Any] | None = None
    replies: list[dict[str, Any]] = field(default_factory=list)
    _unread: bytes = b""
    _unsent: bytes = b""

    @staticmethod
    def start(name: str, connect: Sequence[str] | None, python: str = sys.executable) -> NodeConnection:
        """Start an agent.

        Args:
            name: for messages.
            connect: the command that runs what follows in a shell elsewhere (`ssh_command`); None is this machine.
            python: the interpreter there.
        """
        program, sources = agent_program()
        command = [python, "-u", *program]
        if connect is not None:
            command = [*connect, f"exec {shlex.join(command)}"]
        # A user who came by ssh has the address of another network in SSH_CONNECTION.
        dropped = (node_agent.LAUNCH_VARIABLE, "SSH_CONNECTION")
        environment = {k: v for k, v in os.environ.items() if k not in dropped}
        # Read only when the connection has ended: a file takes any amount meanwhile.
        errors = os.memfd_create("ssh")
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            # Ctrl-C in the launcher's terminal is the launcher's to answer.
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        for stream in (process.stdin, process.stdout):
            os.set_blocking(stream.fileno(), False)
        connection = NodeConnection(name, process, errors)
        connection._send(sources)
        return connection

    def ask(self, request: Mapping[str, Any]) -> None:
        """Send a request; its answer arrives with a later `Connections.poll`."""
        self._send((json.dumps(request) + "\n").encode())

    def ping(self) -> None:
        """Show that the launcher is alive, unless so much waits already that nobody seems to listen."""
        if not self._unsent:
            self.ask({"do": "nothing"})

    def flush(self) -> None:
        """Send what the connection would not take before."""
        self._send(b"")

    def receive(self) -> None:
        """Take in what has arrived."""
        assert self.process.stdout is not None
        try:
            data = os.read(self.process.stdout.fileno(), 1 << 20)
        except BlockingIOError:
            return
        if not data:
            self.ended = True
            return
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            _, mark, content = line.partition(node_agent.MARK.encode())
            if not mark:
                continue
            self.heard = time.monotonic()
            with contextlib.suppress(ValueError):
                message = json.loads(content)
                if "report" in message:
                    self.report = message
                else:
                    self.replies.append(message)

    def take(self, kind: str) -> dict[str, Any] | None:
        """Return the answer to a request of this kind and forget it; None until it is there."""
        for index, reply in enumerate(self.replies):
            if reply["reply"] == kind:
                return self.replies.pop(index)
        return None

    def complaint(self) -> str:
        """Return what ssh, the shell or the agent wrote about the end of the connection."""
        size = os.fstat(self.errors).st_size
        text = os.pread(self.errors, 4000, max(0, size - 4000)).decode(errors="replace").strip()
        return text.splitlines()[-1] if text else f"it ended with code {self.process.wait()}"

    def abandon(self) -> None:
        """Give up a connection that does not answer: at its other end the silence is heard, too."""
        self.process.kill()
        self.ended = True

    def close(self, *, limit: float = 5.0) -> None:
        """Let the agent go, and wait for it, but not for ever."""
        with contextlib.suppress(OSError):
            self.ask({"do": "end"})
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.errors >= 0:
            os.close(self.errors)
            self.errors = -1

    def _send(self, data: bytes) -> None:
        self._unsent += data
        assert self.process.stdin is not None
        while self._unsent:
            try:
                written = os.write(self.process.stdin.fileno(), self._unsent)
            except BlockingIOError:
                return
            except (OSError, ValueError):
                # Closed: the end of its output says so, too.
                self._unsent = b""
                return
            self._unsent = self._unsent[written:]


class Connections(list[NodeConnection]):
    """The ways to all nodes' agents, in the order of the nodes."""

    @staticmethod
    def connect(nodes: Sequence[Node], config: Path | None) -> Connections:
        """Start an agent on each node, through ssh, and last one on this machine, for the programs that start the ranks."""
        remote = [NodeConnection.start(node.name, ssh_command(node.name, config)) for node in nodes]
        return Connections([*remote, NodeConnection.start(THIS_MACHINE, None)])

    @staticmethod
    def local() -> Connections:
        """Start the one agent of a launch on this machine alone."""
        return Connections([NodeConnection.start(THIS_MACHINE, None)])

    def __enter__(self) -> Connections:
        return self

    def __exit__(self, *exception: object) -> None:
        for connection in self:
            connection.close()

    def poll(self, timeout: float) -> None:
        """Send what waits, and take in what arrives within `timeout` seconds, returning at the first arrival."""
        with selectors.DefaultSelector() as selector:
            for connection in self:
                if not connection.ended:
                    connection.flush()
                    assert connection.process.stdout is not None
                    selector.register(connection.process.stdout, selectors.EVENT_READ, connection)
            if not selector.get_map():
                time.sleep(timeout)
                return
            for key, _ in selector.select(timeout):
                key.data.receive()

    def ask_all(self, requests: Mapping[int, Mapping[str, Any]], timeout: float) -> dict[int, dict[str, Any] | str]:
        """Ask several agents the same kind of thing at once.

        Args:
            requests: by the connection's number.
            timeout: seconds for all answers.

        Returns:
            of each node that was asked its answer, or in words why there is none.
        """
        found: dict[int, dict[str, Any] | str] = {}
        for index, request in requests.items():
            self[index].ask(request)
        until = time.monotonic() + timeout
        while len(found) < len(requests):
            for index in [index for index in requests if index not in found]:
                connection = self[index]
                reply = connection.take(requests[index]["do"])
                if reply is not None:
                    found[index] = reply
                elif connection.ended:
                    found[index] = connection.complaint()
                elif time.monotonic() > until:
                    found[index] = f"no answer within {timeout:g} s"
            if len(found) < len(requests):
                self.poll(0.2)
        return found
