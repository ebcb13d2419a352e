"""The launcher's hand on one node: it looks at the node, watches the processes of a launch there, and ends them.

`permafrost launch` sends this file's source, and machine.py's, through ssh and talks to it over that connection, one JSON object
a line, so nothing need be installed on the node to find out what is, and no port need be open. The standard library and
machine.py alone, Linux.

The connection is also the leash: when it ends (the launcher was killed, its machine failed) or stays silent (the network
is gone), the processes of the launch on this node are ended. They are found by two variables in their environment, which
every child inherits, whatever started it and whatever process group it is in.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time

from permafrost.launcher.machine import (
    code_hash,
    existing,
    interfaces,
    num_gpus,
    process,
    room,
    sha256_of,
    versions_of,
)

MARK = "permafrost-agent:"
"""Begins every line for the launcher: a shell's start-up files may print lines of their own."""
LAUNCH_VARIABLE = "PERMAFROST_LAUNCH_ID"
NODE_VARIABLE = "PERMAFROST_LAUNCH_NODE"
ASSIGNMENT = "assignment.json"
"""What the ranks of this node are told, in the folder of their notes."""
REPORT_EVERY = 1.0
"""Seconds between two reports while a launch is watched."""
LAST_WORDS = 20.0
"""Seconds that ranks have between SIGTERM and SIGKILL after the launcher has gone: enough to write a checkpoint."""


class LauncherGone(Exception):
    """Nobody is there to report to; says whether the ranks may still reach each other."""


def launch_processes(launch: str, node: str) -> list[int]:
    """Return every process of a launch on this node that is no zombie."""
    wanted = {f"{LAUNCH_VARIABLE}={launch}".encode(), f"{NODE_VARIABLE}={node}".encode()}
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        # Of other users' processes it cannot be read, and they are not ours.
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if wanted <= set(file.read().split(b"\0")):
                found.append(int(name))
    return found


def end_launch(launch: str, node: str, *, limit: float = 10.0) -> list[int]:
    """Kill every process of a launch on this node with SIGKILL, also those forked meanwhile; return the pids of what is left."""
    until = time.monotonic() + limit
    while True:
        left = launch_processes(launch, node)
        if not left or time.monotonic() > until:
            return left
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


class Agent:
    """Answers the launcher's requests, each by the method do_<request>."""

    def __init__(self) -> None:
        self._requests: queue.Queue = queue.Queue()
        self._heard = time.monotonic()
        self._patience: float | None = None
        self._watched: dict | None = None
        self._folder: str | None = None
        self._counts: dict[str, tuple[object, float]] = {}
        self._listener: socket.socket | None = None
        self._mark: str | None = None

    def serve(self) -> None:
        """Serve until the launcher says that all is done, or is gone: then the launch on this node is ended."""
        threading.Thread(target=self._read, daemon=True).start()
        network_is_there = True
        try:
            while self._serve_once():
                pass
        except (LauncherGone, OSError) as gone:
            network_is_there = "silent" not in str(gone)
        finally:
            self._put_away()
            if self._watched is not None:
                if network_is_there:
                    self._signal_ranks(signal.SIGTERM)
                    until = time.monotonic() + LAST_WORDS
                    while self._busy() and time.monotonic() < until:
                        time.sleep(0.2)
                end_launch(self._watched["launch"], self._watched["node"])
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _serve_once(self) -> bool:
        try:
            request = self._requests.get(timeout=REPORT_EVERY if self._watched else None)
        except queue.Empty:
            request = {"do": "nothing"}
            if self._patience is not None and time.monotonic() - self._heard > self._patience:
                raise LauncherGone("silent") from None
        if request is None:
            raise LauncherGone("ended")
        if request["do"] == "end":
            self._watched = None
            return False
        answer = getattr(self, "do_" + request["do"])(request)
        if answer is not None:
            self._say({"reply": request["do"], **answer})
        if self._watched:
            self._report()
        return True

    def do_nothing(self, request: dict) -> None:
        """Take a sign of life of the launcher's."""

    def do_facts(self, request: dict) -> dict:
        """Tell what this node is, in the fields that preflight compares."""
        os.environ.update(request["environment"])
        sys.path.extend(request["sys_path"])
        folder = request["folder"]
        if os.path.isdir(folder):
            os.chdir(folder)
        ssh = os.environ.get("SSH_CONNECTION", "").split()
        return {
            "host": platform.node(),
            "versions": versions_of(request["packages"]),
            "code": code_hash(),
            "gpus": num_gpus(),
            "cores": len(os.sched_getaffinity(0)),
            "interfaces": interfaces(),
            "address": ssh[2] if len(ssh) == 4 else "127.0.0.1",
            "folder": os.path.isdir(folder),
            "files": {path: sha256_of(os.path.expanduser(path)) for path in request["files"]},
            "paths": {path: os.access(os.path.expanduser(path), os.R_OK) for path in request["paths"]},
            "rooms": {path: room(os.path.expanduser(path))._asdict() for path in request["rooms"]},
        }

    def do_offer(self, request: dict) -> dict:
        """Listen, on rank 0's node, on the port that rank 0 will use, and leave a mark beside the run folder."""
        answer = {"port": 0, "mark": "", "error": None}
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", request["port"]))
            listener.listen(64)
        except OSError as error:
            listener.close()
            answer["error"] = f"port {request['port']}: {error.strerror or error}"
            return answer
        self._listener = listener
        answer["port"] = listener.getsockname()[1]
        if request["output"]:
            # A folder where this cannot be written has been reported by its room already.
            with contextlib.suppress(OSError):
                descriptor, self._mark = tempfile.mkstemp(
                    prefix=".permafrost_", dir=existing(os.path.expanduser(request["output"]))
                )
                os.close(descriptor)
                answer["mark"] = self._mark
        return answer

    def do_meet(self, request: dict) -> dict:
        """Reach rank 0's port from another node, and look for its mark."""
        error = None
        try:
            socket.create_connection((request["address"], request["port"]), timeout=10).close()
        except OSError as raised:
            error = raised.strerror or str(raised)
        return {"error": error, "sees_mark": bool(request["mark"]) and os.path.exists(request["mark"])}

    def do_withdraw(self, request: dict) -> dict:
        """Undo `do_offer`."""
        self._put_away()
        return {}

    def do_watch(self, request: dict) -> dict:
        """Report from now on what the processes of a launch do here, and end them if the launcher goes away.

        Answers with a folder of this node, in which the ranks note their numbers and how they ended.
        """
        self._folder = tempfile.mkdtemp(prefix="permafrost_launch_")
        self._watched, self._counts = request, {}
        self._patience, self._heard = request["patience"], time.monotonic()
        return {"folder": self._folder}

    def do_assign(self, request: dict) -> dict:
        """Leave the assignment for this node's ranks, for nobody else to read: variables may be secrets."""
        assert self._folder is not None
        path = os.path.join(self._folder, ASSIGNMENT)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(request["assignment"], file)
        return {}

    def do_signal(self, request: dict) -> None:
        """Send a signal to the ranks, and to nothing that launched them."""
        self._signal_ranks(request["signal"])

    def do_kill(self, request: dict) -> dict:
        """End everything of the launch on this node."""
        assert self._watched is not None
        left = end_launch(self._watched["launch"], self._watched["node"])
        self._report()
        self._watched = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        return {"left": left}

    def _report(self) -> None:
        assert self._watched is not None
        processes = launch_processes(self._watched["launch"], self._watched["node"])
        self._say({"report": self._ranks(), "processes": len(processes), "final": self._final()})

    def _ranks(self) -> dict[str, dict]:
        """Return, for each rank that has started, its note, its process's state, its heartbeat and the seconds since that changed."""
        assert self._watched is not None
        found = {}
        for record in self._records():
            rank = str(record["rank"])
            own = process(record["pid"])
            alive = own.started == record["started"] and not own.has_ended
            beat = self._beat(rank, record)
            if beat is not None and self._counts.get(rank, (None, 0.0))[0] != beat.get("count"):
                self._counts[rank] = (beat.get("count"), time.monotonic())
            silent = time.monotonic() - self._counts[rank][1] if rank in self._counts else 0.0
            found[rank] = {**record, "state": own.state if alive else "", "beat": beat, "silent": silent}
        return found

    def _records(self) -> list[dict]:
        records = []
        for name in os.listdir(self._folder) if self._folder and os.path.isdir(self._folder) else []:
            if name.startswith("rank_") and name.endswith(".json"):
                with contextlib.suppress(OSError, ValueError), open(f"{self._folder}/{name}") as file:
                    records.append(json.load(file))
        return records

    def _beat(self, rank: str, record: dict) -> dict | None:
        assert self._watched is not None
        path = self._watched["beats"].get(rank)
        with contextlib.suppress(OSError, ValueError, TypeError), open(path) as file:
            beat = json.load(file)
            # Another start of the same run, or another node's view of it, left one too.
            if (beat.get("pid"), beat.get("started")) == (record["pid"], record["started"]):
                return beat
        return None

    def _final(self) -> int | None:
        """Return when final.json was written, Unix nanoseconds; None while the run has not ended."""
        assert self._watched is not None
        with contextlib.suppress(OSError, ValueError), open(self._watched["final"]) as file:
            json.load(file)
            return os.fstat(file.fileno()).st_mtime_ns
        return None

    def _signal_ranks(self, number: int) -> None:
        for record in self._records():
            if process(record["pid"]).started == record["started"]:
                with contextlib.suppress(OSError):
                    os.kill(record["pid"], number)

    def _busy(self) -> bool:
        """Return whether what may end by itself has not: ranks here or, where none can be, the programs that started them."""
        assert self._watched is not None
        if not self._watched["has_ranks"]:
            return bool(launch_processes(self._watched["launch"], self._watched["node"]))
        ranks = [(process(record["pid"]), record["started"]) for record in self._records()]
        return any(own.started == noted and not own.has_ended for own, noted in ranks)

    def _put_away(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._mark is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._mark)
            self._mark = None

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self._heard = time.monotonic()
            self._requests.put(json.loads(line))
        self._requests.put(None)

    def _say(self, message: dict) -> None:
        sys.stdout.write(f"{MARK}{json.dumps(message)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    # A terminal's Ctrl-C and hang-up are the launcher's to answer.
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    Agent().serve()
    # The reader may still wait for a line: an interpreter that shuts down meanwhile can abort over the lock it holds.
    os._exit(0)
