"""Watch a launch by the reports of every node's agent, and decide how it ends. Imports no torch."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from permafrost.launcher.cluster.connections import Connections
from permafrost.launcher.cluster.hostfile import Node
from permafrost.launcher.cluster.node_agent import LAST_WORDS
from permafrost.launcher.cluster.starters import Starter
from permafrost.launcher.exit_codes import DONE, FAILED, LOST, SAVED, USAGE_ERROR, of_signal

START_LIMIT = 900.0
"""Seconds until every rank must have begun: imports from a slow shared disk take minutes."""
GRACE = 5.0
"""Seconds between the first rank's end by a fault and the end of all: the others may have something to say."""
NOTICE = 3.0
"""Seconds that reports lag behind what a starter's exit code already tells."""
PING_EVERY = 1.0
DRAIN = 30.0
"""The same after every rank has noted its end: there is nothing to wait for but flushed files."""
KILL_LIMIT = 15.0


@dataclass(frozen=True)
class Ending:
    """Outcome of a launch.

    Attributes:
        code: of the launcher: DONE; FAILED, by an error of a rank's own; USAGE_ERROR, said by the ranks; LOST, a rank,
            a node or the network was lost; else a signal's.
        reasons: one line each.
        may_restart: whether another start could come further.
    """

    code: int
    reasons: Sequence[str] = ()
    may_restart: bool = False


@dataclass
class Signals:
    """Signals that the launcher was sent, for whoever watches."""

    received: list[int] = field(default_factory=list)
    _previous: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, lambda number, _: self.received.append(number))
        # A launcher that Ctrl-Z stops could not tell the nodes that it lives, and they would end their ranks.
        self._previous[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)


class Supervisor:
    """Watches one start of a launch until it has ended, and then ends whatever is left of it everywhere."""

    def __init__(
        self, connections: Connections, nodes: Sequence[Node], starter: Starter, signals: Signals, patience: float
    ) -> None:
        """Take over a launch.

        Args:
            connections: the nodes' in their order, whose agents watch; perhaps this machine's last.
            nodes: in rank order.
            starter: of the ranks.
            signals: sent to the launcher.
            patience: seconds that a node or rank may be silent, or a rank stopped.
        """
        self._connections, self._nodes, self._starter, self._signals = connections, nodes, starter, signals
        self._patience = patience
        self._owner = [index for index, node in enumerate(nodes) for _ in range(node.slots)]
        self._begun = time.monotonic()
        self._pinged = 0.0
        self._stopped_since: dict[int, float] = {}
        self._starter_ended: float | None = None

    @property
    def world_size(self) -> int:
        """Return the number of ranks of the launch."""
        return len(self._owner)

    def watch(self) -> Ending:
        """Wait until the launch has ended, well or not. Processes of it may be left: `end` ends them."""
        while True:
            self._turn()
            ranks = self._ranks()
            if self._signals.received:
                return self._stop()
            if self._all_done(ranks):
                return self._judge(self._settle(DRAIN))
            # Without a node the others can only wait; without a rank they may say what they met with.
            lost = self._lost_nodes()
            if not lost and (lost := self._lost_ranks(ranks)):
                self._settle()
            if lost:
                return Ending(LOST, lost, may_restart=not self._has_final())
            if any(record["code"] for record in ranks.values()):
                ranks = self._settle()
                lost = self._lost_ranks(self._not_taken_along(ranks))
                return Ending(LOST, lost, may_restart=not self._has_final()) if lost else self._judge(ranks)
            unfinished = self._unfinished(ranks)
            if unfinished:
                return Ending(LOST, unfinished, may_restart=not self._has_final())

    def end(self) -> list[str]:
        """End every process of the launch on every node that answers. Returns what could not be ended, in words."""
        self._starter.end()
        for connection in self._connections:
            if time.monotonic() - connection.heard > self._patience:
                connection.abandon()
        requests = {index: {"do": "kill"} for index, connection in enumerate(self._connections) if not connection.ended}
        answers = self._connections.ask_all(requests, KILL_LIMIT)
        problems = []
        for index, connection in enumerate(self._connections):
            answer = answers.get(index, "its connection is gone")
            if isinstance(answer, str):
                problems.append(
                    f"{connection.name}: {answer}: its processes are ended there within {self._patience + LAST_WORDS:g} s"
                )
            elif answer["left"]:
                problems.append(f"{connection.name}: processes {answer['left']} did not end")
        return problems

    def _turn(self) -> None:
        self._connections.poll(0.25)
        now = time.monotonic()
        if now - self._pinged >= PING_EVERY:
            self._pinged = now
            for connection in self._connections:
                if not connection.ended:
                    connection.ping()

    def _settle(self, limit: float = GRACE) -> dict[int, dict[str, Any]]:
        """Give the others, and what started them, time to end and to say why; returns the ranks then."""
        until = time.monotonic() + limit
        while time.monotonic() < until:
            self._turn()
            if self._starter.poll() is not None and not any(record["state"] for record in self._ranks().values()):
                break
        return self._ranks()

    def _not_taken_along(self, ranks: Mapping[int, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
        """Return the ranks but for those that a starter on their node has ended when another one there failed."""
        if not self._starter.ends_siblings:
            return dict(ranks)
        failed = {self._owner[rank] for rank, record in ranks.items() if record["code"]}
        return {rank: record for rank, record in ranks.items() if self._owner[rank] not in failed}

    def _ranks(self) -> dict[int, dict[str, Any]]:
        found = {}
        for connection in list(self._connections)[: len(self._nodes)]:
            for rank, record in (connection.report or {"report": {}})["report"].items():
                found[int(rank)] = record
        return found

    def _has_final(self) -> bool:
        report = self._connections[0].report
        return report is not None and report["final"] is not None

    def _all_done(self, ranks: Mapping[int, Mapping[str, Any]]) -> bool:
        return len(ranks) == self.world_size and all(record["code"] is not None for record in ranks.values())

    def _judge(self, ranks: Mapping[int, Mapping[str, Any]]) -> Ending:
        """Judge the ending by what the ranks noted, and by the run folder's final.json."""
        codes = {record["code"] for record in ranks.values() if record["code"]}
        if not codes:
            if self._has_final():
                code = self._starter.poll()
                return Ending(DONE, [f"what had started the ranks ended with code {code} all the same"] if code else [])
            return Ending(FAILED, ["every rank ended with code 0, but the run folder has no final.json"], True)
        reasons = [
            f"{self._name(rank, record)} ended with code {record['code']}"
            + (f": {record['error']}" if record["error"] else "")
            for rank, record in sorted(ranks.items())
            if record["code"]
        ]
        if USAGE_ERROR in codes:
            return Ending(USAGE_ERROR, reasons)
        code = codes.pop() if len(codes) == 1 else FAILED
        # With a final.json the run has ended, and the code is its verdict: a head was stopped. A signal to a rank is no fault:
        # whoever sent it wants the machines.
        return Ending(code, reasons, may_restart=code != SAVED and not self._has_final())

    def _lost_nodes(self) -> list[str]:
        lost = []
        for connection in self._connections:
            silent = time.monotonic() - connection.heard
            if connection.ended:
                lost.append(f"{connection.name}: the connection ended: {connection.complaint()}")
            elif silent > self._patience:
                lost.append(
                    f"{connection.name} has not answered for {silent:.0f} s: the machine or the network is down"
                )
        return lost

    def _lost_ranks(self, ranks: Mapping[int, Mapping[str, Any]]) -> list[str]:
        now, lost = time.monotonic(), []
        for rank, record in sorted(ranks.items()):
            if record["state"] not in ("T", "t"):
                self._stopped_since.pop(rank, None)
            if record["code"] is not None:
                continue
            beat = record["beat"] or {}
            last = f"; last heard in phase {beat.get('phase')} of step {beat.get('step')}" if beat else ""
            name = self._name(rank, record)
            if not record["state"]:
                lost.append(f"{name} is gone without a word (killed, or out of memory){last}")
            elif record["state"] in ("T", "t"):
                if now - self._stopped_since.setdefault(rank, now) > self._patience:
                    lost.append(f"{name} has been stopped for {self._patience:g} s (SIGSTOP or a debugger){last}")
            elif record["silent"] > self._patience:
                lost.append(f"{name} has given no sign of life for {record['silent']:.0f} s{last}")
        return lost

    def _unfinished(self, ranks: Mapping[int, Mapping[str, Any]]) -> list[str]:
        """Return what is wrong when nobody has failed: programs that ended too early, ranks that never began."""
        code = self._starter.poll()
        now = time.monotonic()
        if code is not None:
            self._starter_ended = self._starter_ended or now
            if now - self._starter_ended > NOTICE:
                missing = sorted(set(range(self.world_size)) - set(ranks))
                open_ended = sorted(rank for rank, record in ranks.items() if record["code"] is None)
                state = f"before rank(s) {missing} began" if missing else f"while rank(s) {open_ended} were at work"
                return [f"what had started the ranks ended with code {code} {state}"]
        elif len(ranks) < self.world_size and now - self._begun > START_LIMIT:
            waited_for = [f"{rank} ({self._node(rank)})" for rank in range(self.world_size) if rank not in ranks]
            return [f"after {START_LIMIT:g} s ranks have not begun: {', '.join(waited_for)}"]
        return []

    def _stop(self) -> Ending:
        """Pass a signal on, and wait for the ranks, unless another one comes."""
        number = self._signals.received[0]
        passed = signal.SIGTERM if number in (signal.SIGINT, signal.SIGHUP) else number
        for connection in list(self._connections)[: len(self._nodes)]:
            connection.ask({"do": "signal", "signal": int(passed)})
        until = time.monotonic() + LAST_WORDS
        while time.monotonic() < until and len(self._signals.received) == 1:
            self._turn()
            ranks = self._ranks()
            if ranks and not any(record["state"] for record in ranks.values()):
                break
        ranks = self._ranks()
        if self._all_done(ranks):
            ending = self._judge(ranks)
            return Ending(ending.code, [f"the launcher received {signal.Signals(number).name}", *ending.reasons])
        return Ending(of_signal(number), [f"the launcher received {signal.Signals(number).name}: every rank was ended"])

    def _node(self, rank: int) -> str:
        return self._nodes[self._owner[rank]].name

    def _name(self, rank: int, record: Mapping[str, Any]) -> str:
        return f"rank {rank} on {self._node(rank)} (pid {record['pid']})"
