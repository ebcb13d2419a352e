"""Inspect, start, watch, and start again from the last checkpoint: `permafrost launch` on one machine or many."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.launcher.cluster.connections import THIS_MACHINE, Connections
from permafrost.launcher.cluster.hostfile import Node
from permafrost.launcher.cluster.preflight import ANSWER_TIMEOUT, Needs, Site, inspect, needs_of
from permafrost.launcher.cluster.rank_main import Assignment, encode
from permafrost.launcher.cluster.starters import (
    FRONT,
    DeepSpeedRanks,
    LocalRanks,
    Starter,
    deepspeed_command,
    require_programs,
    write_deepspeed_files,
)
from permafrost.launcher.cluster.supervisor import Ending, Signals, Supervisor
from permafrost.launcher.errors import LaunchError
from permafrost.launcher.exit_codes import DONE, LOST
from permafrost.launcher.machine import num_gpus
from permafrost.launcher.ranks.division import micro_batch_size, require_mesh
from permafrost.launcher.ranks.heartbeat import beat_path
from permafrost.launcher.run.folder import RunFolder

if TYPE_CHECKING:
    from permafrost.launcher.experiment import Experiment

RESTART_PAUSE = 5.0
"""Seconds before another start: what made the last one fail may take a moment to pass."""


@dataclass(frozen=True)
class Launch:
    """Order to launch a recipe on nodes.

    Attributes:
        recipe: its name.
        fields: the recipe's fields of the command line.
        resume: of `permafrost train`.
        device: of `permafrost train`.
        nodes: in rank order; None is this machine.
        num_procs: ranks on this machine; None is one for each GPU.
        environment: of every rank.
        interface: network interface for the ranks' messages; None finds one.
        master_port: for the ranks to meet at; 0 takes a free one.
        ssh_config: for ssh -F.
        patience: seconds that a node or rank may be silent before all are ended.
        max_restarts: further starts after a fault.
        min_free: bytes that must be free for the run folder.
        command: as the user called it.
    """

    recipe: str
    fields: Sequence[str]
    resume: str
    device: str
    nodes: Sequence[Node] | None
    num_procs: int | None
    environment: Mapping[str, str]
    interface: str | None
    master_port: int
    ssh_config: Path | None
    patience: float
    max_restarts: int
    min_free: int
    command: Sequence[str]


def run_launch(launch: Launch, experiment: Experiment, *, dry_run: bool) -> int:
    """Look at the nodes and, unless it is a dry run, train. Returns one of launcher/exit_codes.py.

    Raises:
        LaunchError: nothing was started: the nodes, or the numbers of the recipe, do not allow it.
    """
    nodes = launch.nodes or [_this_machine(launch)]
    world_size = sum(node.slots for node in nodes)
    require_mesh(world_size=world_size, tensor=experiment.mesh.tensor)
    micro_batch_size(
        global_batch=experiment.loop.global_batch, world_size=world_size, accumulation=experiment.engine.accumulation
    )
    if launch.nodes is not None:
        require_programs()
    needs = Needs(
        nodes=nodes,
        folder=os.getcwd(),
        environment=launch.environment,
        device=launch.device,
        interface=launch.interface,
        port=launch.master_port,
        min_free=launch.min_free,
        is_remote=launch.nodes is not None,
        **needs_of(experiment, launch.recipe),
    )
    with Signals() as signals:
        for attempt in range(launch.max_restarts + 1):
            last = attempt == launch.max_restarts
            try:
                ending = _start_once(launch, needs, signals, attempt=attempt, dry_run=dry_run)
            except LaunchError as error:
                if attempt == 0:
                    raise
                # A node may be on its way back.
                ending = Ending(LOST, [str(error)], may_restart=True)
            for reason in ending.reasons:
                _say(reason)
            if last or not ending.may_restart or signals.received:
                break
            _say(f"starting again from the last checkpoint, {attempt + 1} of at most {launch.max_restarts} time(s)")
            _pause(RESTART_PAUSE, signals)
            if signals.received:
                break
    if not dry_run:
        _say("done" if ending.code == DONE else f"ended with code {ending.code}")
    return ending.code


def _start_once(launch: Launch, needs: Needs, signals: Signals, *, attempt: int, dry_run: bool) -> Ending:
    """Inspect the nodes, start once and watch to the end; no process of it is left on any node that can be reached."""
    number = secrets.token_hex(8)
    # Only the first start may be told to begin anew or to insist on a checkpoint.
    resume = launch.resume if attempt == 0 else "auto"
    arguments = [launch.recipe, *launch.fields, "--resume", resume, "--device", launch.device]
    with (
        Connections.connect(needs.nodes, launch.ssh_config) if needs.is_remote else Connections.local() as connections,
        tempfile.TemporaryDirectory(prefix="permafrost_launch_") as folder,
    ):
        site = inspect(needs, connections)
        for line in site.lines:
            _say(line)
        if dry_run:
            _say_commands(launch, needs, site, arguments)
            return Ending(DONE)
        word = _watch_everywhere(launch, needs, connections, number)
        _assign(launch, needs, site, connections, arguments)
        starter: Starter
        if needs.is_remote:
            hostfile, environment = write_deepspeed_files(
                Path(folder), needs.nodes, launch.environment, launch=number, ssh_config=launch.ssh_config
            )
            command = deepspeed_command(hostfile, address=site.address, port=site.port)
            starter = DeepSpeedRanks(word, command=command, environment=environment, launch=number)
        else:
            count = needs.nodes[0].slots
            starter = LocalRanks(word, num_ranks=count, address=site.address, port=site.port, launch=number)
        supervisor = Supervisor(connections, needs.nodes, starter, signals, launch.patience)
        try:
            ending = supervisor.watch()
        finally:
            problems = supervisor.end()
        return Ending(ending.code, [*ending.reasons, *problems], ending.may_restart)


def _watch_everywhere(launch: Launch, needs: Needs, connections: Connections, number: str) -> str:
    """Have every agent hold its node's end of the leash. Returns the word that tells ranks their node's folder."""
    run = RunFolder(needs.output)
    num_ranks = sum(node.slots for node in needs.nodes)
    beats = {str(rank): str(beat_path(run.heartbeats, rank)) for rank in range(num_ranks)}
    shared = {"do": "watch", "launch": number, "patience": launch.patience, "beats": beats, "final": str(run.final)}
    requests = {index: {**shared, "node": str(index), "has_ranks": True} for index in range(len(needs.nodes))}
    if needs.is_remote:
        requests[len(needs.nodes)] = {**shared, "node": FRONT, "has_ranks": False}
    answers = _answers(connections, requests)
    return encode([answers[index]["folder"] for index in range(len(needs.nodes))])


def _assign(launch: Launch, needs: Needs, site: Site, connections: Connections, arguments: Sequence[str]) -> None:
    """Tell every node's agent what its ranks are to do."""
    requests = {}
    for index, own in enumerate(site.environments):
        # Of PYTHONPATH, DeepSpeed's launcher makes one of its own.
        environment = {"PYTHONPATH": "", **launch.environment, **own}
        assignment = Assignment(arguments, launch.command, needs.folder, environment)
        requests[index] = {"do": "assign", "assignment": assignment.to_json()}
    _answers(connections, requests)


def _answers(connections: Connections, requests: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the answers of agents of which each must have one."""
    answers = connections.ask_all(requests, ANSWER_TIMEOUT)
    silent = [f"{connections[index].name}: {answer}" for index, answer in answers.items() if isinstance(answer, str)]
    if silent:
        raise LaunchError("nothing was started: " + "; ".join(silent))
    return {index: answer for index, answer in answers.items() if not isinstance(answer, str)}


def _this_machine(launch: Launch) -> Node:
    if launch.num_procs is not None:
        return Node(THIS_MACHINE, launch.num_procs)
    on_cpu = launch.device == "cpu" or launch.environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    count = 0 if on_cpu else num_gpus()
    if count == 0:
        _say("no GPU is used here: 1 process; --num-procs N starts more")
    return Node(THIS_MACHINE, count or 1)


def _say_commands(launch: Launch, needs: Needs, site: Site, arguments: Sequence[str]) -> None:
    _say(f"would run on every rank, in {needs.folder}: permafrost train {shlex.join(arguments)}")
    # Their values may be secrets.
    _say(f"with {', '.join(sorted(launch.environment))} as they are here or --export gives them")
    for node, own in zip(needs.nodes, site.environments):
        _say(f"on {node.name} with " + " ".join(f"{name}={shlex.quote(value)}" for name, value in own.items()))
    if needs.is_remote:
        command = deepspeed_command(Path("HOSTFILE"), address=site.address, port=site.port)
        _say(f"started by {shlex.join(command)} ...")


def _pause(seconds: float, signals: Signals) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not signals.received:
        time.sleep(0.1)


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
