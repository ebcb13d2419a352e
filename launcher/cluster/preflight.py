"""Look at every node before anything starts there, so that a launch fails in seconds and says where and why.

Each problem names its node and what to do about it; all of them are found before any is reported. Imports no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from permafrost.data.cache import cache_folder
from permafrost.launcher.cluster.connections import CONNECT_TIMEOUT, Connections
from permafrost.launcher.cluster.hostfile import Node
from permafrost.launcher.errors import LaunchError
from permafrost.launcher.machine import code_hash, sha256_of
from permafrost.launcher.provenance import PACKAGES, versions
from permafrost.launcher.run.folder import RunFolder
from permafrost.model.weights.known import find_public

if TYPE_CHECKING:
    from permafrost.launcher.experiment import Experiment

ANSWER_TIMEOUT = 60.0
"""Seconds for a node to say what it is: the first look at a slow file system takes some."""
GIB = 2**30


@dataclass(frozen=True)
class Needs:
    """Everything that a launch needs of its nodes.

    Attributes:
        nodes: in rank order; one, named "this machine", where nothing is remote.
        folder: every rank's current folder.
        environment: the ranks' variables.
        device: of `permafrost train`.
        interface: network interface for the ranks' messages; None: GLOO_SOCKET_IFNAME, else the one that ssh came by.
        port: for the ranks to meet at; 0 takes a free one.
        files: files that must have the same content everywhere.
        paths: files and folders that must be readable on every node.
        output: the run folder.
        cache: folder that every node fills; None where none does.
        min_free: bytes that must be free in `output` and `cache`.
        is_remote: whether ssh and pdsh are used.
    """

    nodes: Sequence[Node]
    folder: str
    environment: Mapping[str, str]
    device: str
    interface: str | None
    port: int
    files: Sequence[str]
    paths: Sequence[str]
    output: str
    cache: str | None
    min_free: int
    is_remote: bool


@dataclass(frozen=True)
class Site:
    """Nodes that a launch can start on.

    Attributes:
        address: IPv4 address of rank 0's node.
        port: free there a moment ago.
        environments: of each node, its own variables.
        lines: what was found, for people.
    """

    address: str
    port: int
    environments: Sequence[Mapping[str, str]]
    lines: Sequence[str]


def needs_of(experiment: Experiment, recipe: str) -> dict[str, Any]:
    """Return the fields of Needs that say what an experiment reads and writes: files, paths, output, cache.

    Args:
        experiment: with the command line's overrides.
        recipe: its name as it was given.
    """
    location = recipe.partition(":")[0]
    files = [location] if location.endswith(".py") or "/" in location else []
    config = experiment.engine.deepspeed_config
    if config is not None and os.path.isfile(config):
        files.append(config)
    paths = [str(path) for path in experiment.data.required_paths()]
    fills_cache = experiment.data.fills_cache
    weights = experiment.backbone.weights
    if os.path.exists(os.path.expanduser(weights)) or "/" in weights:
        paths.append(weights)
    else:
        fills_cache = fills_cache or find_public(weights) is not None
    return {
        "files": files,
        "paths": paths,
        "output": os.path.abspath(RunFolder.of(experiment).path),
        "cache": str(cache_folder()) if fills_cache else None,
    }


def inspect(needs: Needs, connections: Connections) -> Site:
    """Look at every node.

    Args:
        needs: of the launch.
        connections: the first len(needs.nodes) are the nodes', in their order.

    Raises:
        LaunchError: listing every problem that was found.
    """
    names = [node.name for node in needs.nodes]
    request = {
        "do": "facts",
        "folder": needs.folder,
        "environment": {k: v for k, v in needs.environment.items() if k != "LD_LIBRARY_PATH"},
        "sys_path": [entry for entry in needs.environment.get("PYTHONPATH", "").split(os.pathsep) if entry],
        "packages": list(PACKAGES),
        "files": list(needs.files),
        "paths": list(needs.paths),
        "rooms": [needs.output, *([needs.cache] if needs.cache else [])],
    }
    limit = ANSWER_TIMEOUT + CONNECT_TIMEOUT
    answers = connections.ask_all(dict.fromkeys(range(len(names)), request), limit)
    unreachable = [
        f"{names[index]}: not reached: {answer} (`ssh {names[index]} true` must work without a question, and "
        f"{sys.executable} must be there too)"
        for index, answer in answers.items()
        if isinstance(answer, str)
    ]
    if unreachable:
        raise _refusal(unreachable)
    ordered = (answers[index] for index in range(len(names)))
    facts = [answer for answer in ordered if not isinstance(answer, str)]
    wanted = {
        "versions": versions(),
        "code": code_hash(),
        "files": {path: sha256_of(os.path.expanduser(path)) for path in needs.files},
    }
    problems = []
    uses_gpus = needs.device.startswith("cuda") or (needs.device == "auto" and any(fact["gpus"] for fact in facts))
    if needs.environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        uses_gpus = needs.device.startswith("cuda")
    interfaces = []
    for index, (node, fact) in enumerate(zip(needs.nodes, facts)):
        found = [
            *_software_problems(fact, wanted),
            *_hardware_problems(node, fact, uses_gpus=uses_gpus, is_remote=needs.is_remote),
            *_file_problems(fact, needs, holds_run=index == 0),
        ]
        interface, problem = _interface(needs, fact)
        interfaces.append(interface)
        problems += [f"{node.name}: {text}" for text in [*found, *([problem] if problem else [])]]
    if problems:
        raise _refusal(problems)
    address = facts[0]["interfaces"].get(interfaces[0]) or facts[0]["address"]
    port, notes = _meet(needs, connections, names, address)
    lines = [_line(*row, needs, uses_gpus=uses_gpus) for row in zip(needs.nodes, facts, interfaces)]
    lines.append(f"ranks meet at {address}, port {port}")
    environments = [
        _own_environment(needs, node, fact, interface) for node, fact, interface in zip(needs.nodes, facts, interfaces)
    ]
    return Site(address, port, environments, [*lines, *(f"note: {note}" for note in notes)])


def _refusal(problems: Sequence[str]) -> LaunchError:
    count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
    return LaunchError(f"nothing was started: {count} found before the start\n" + "\n".join(f"  {p}" for p in problems))


def _software_problems(fact: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{package} is {version} there and {wanted['versions'][package]} here: install the same versions on every node"
        for package, version in fact["versions"].items()
        if version != wanted["versions"][package]
    ]
    if not fact["code"]:
        problems.append("permafrost cannot be imported there: install it as here, at the same path")
    elif fact["code"] != wanted["code"]:
        problems.append(
            f"permafrost's source differs (its hash is {fact['code'][:12]} there, {wanted['code'][:12]} here): bring "
            "every node to the same checkout"
        )
    for path, digest in fact["files"].items():
        if digest != wanted["files"][path]:
            state = "differs from the one here" if digest else "cannot be read there"
            problems.append(f"{path} {state}: copy it, or use a folder that all nodes share")
    return problems


def _hardware_problems(node: Node, fact: Mapping[str, Any], *, uses_gpus: bool, is_remote: bool) -> list[str]:
    available, what = (fact["gpus"], "GPU(s)") if uses_gpus else (fact["cores"], "core(s) and no GPU")
    if node.slots <= available:
        return []
    where = f"slots={node.slots} in the hostfile" if is_remote else f"--num-procs {node.slots}"
    remedy = f"give {available} or fewer" if available else "leave the node out, or run with --device cpu"
    return [f"{where}, but it has {available} {what}: {remedy}"]


def _file_problems(fact: Mapping[str, Any], needs: Needs, *, holds_run: bool) -> list[str]:
    problems = []
    if not fact["folder"]:
        problems.append(
            f"the folder {needs.folder}, from which this was called, is not there: call it from one that every node has"
        )
    for path, readable in fact["paths"].items():
        if not readable:
            problems.append(f"{path} is not there or cannot be read: copy it, or mount the folder that holds it")
    places = {needs.output: ("the run folder", "--output"), needs.cache: ("the cache", "PERMAFROST_CACHE")}
    for path, room in fact["rooms"].items():
        what, option = places[path]
        if path == needs.output and not holds_run:
            continue
        if room["error"]:
            problems.append(
                f"{what} {path} cannot be written ({room['place']}: {room['error']}): give another {option}"
            )
        elif room["free"] < needs.min_free:
            problems.append(
                f"{what} {path} has {room['free'] / GIB:.2f} GiB free on its disk, less than {needs.min_free / GIB:.2f}: "
                f"free some, give another {option}, or accept less with --min-free"
            )
    return problems


def _interface(needs: Needs, fact: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return (the interface for a node's messages, what is wrong with it)."""
    interfaces = fact["interfaces"]
    chosen = needs.interface or (needs.environment.get("GLOO_SOCKET_IFNAME", "") if needs.is_remote else "")
    if not chosen:
        chosen = next((name for name, address in interfaces.items() if address == fact["address"]), "")
        if chosen:
            return chosen, None
        return "", f"no interface has {fact['address']}, to which ssh connected: name one with --interface"
    usable = ", ".join(sorted(f"{name} ({address})" for name, address in interfaces.items() if address)) or "none"
    if not interfaces.get(chosen):
        source = "--interface" if needs.interface else "GLOO_SOCKET_IFNAME"
        return "", f"{source} {chosen} is not up there with an IPv4 address: these are: {usable}"
    return chosen, None


def _meet(needs: Needs, connections: Connections, names: Sequence[str], address: str) -> tuple[int, list[str]]:
    """Try rank 0's port from every other node. Returns the port, and notes."""
    offer = connections.ask_all({0: {"do": "offer", "port": needs.port, "output": needs.output}}, ANSWER_TIMEOUT)[0]
    if isinstance(offer, str):
        raise _refusal([f"{names[0]}: {offer}"])
    if offer["error"]:
        raise _refusal([f"{names[0]}: {offer['error']}: give another --master-port, or leave it out for a free one"])
    ask = {"do": "meet", "address": address, "port": offer["port"], "mark": offer["mark"]}
    answers = connections.ask_all(dict.fromkeys(range(1, len(names)), ask), ANSWER_TIMEOUT)
    connections.ask_all({0: {"do": "withdraw"}}, ANSWER_TIMEOUT)
    problems, blind = [], []
    for index, answer in answers.items():
        error = answer if isinstance(answer, str) else answer["error"]
        if error:
            problems.append(
                f"{names[index]}: port {offer['port']} of {address} ({names[0]}) is not reached: {error}: open the "
                "firewall between the nodes, or choose another network with --interface"
            )
        elif not isinstance(answer, str) and not answer["sees_mark"]:
            blind.append(names[index])
    if problems:
        raise _refusal(problems)
    notes = []
    if blind:
        notes.append(f"the run folder {needs.output} is on {names[0]} alone: {', '.join(blind)} do not see it")
    return offer["port"], notes


def _own_environment(needs: Needs, node: Node, fact: Mapping[str, Any], interface: str) -> dict[str, str]:
    own = {"GLOO_SOCKET_IFNAME": interface}
    if needs.interface:
        # Unasked, NCCL chooses better than by the way that ssh came.
        own["NCCL_SOCKET_IFNAME"] = interface
    if "OMP_NUM_THREADS" not in needs.environment:
        own["OMP_NUM_THREADS"] = str(max(1, fact["cores"] // node.slots))
    return own


def _line(node: Node, fact: Mapping[str, Any], interface: str, needs: Needs, *, uses_gpus: bool) -> str:
    device = f"{fact['gpus']} GPU(s)" if uses_gpus else "no GPU used"
    first = node is needs.nodes[0]
    free = f", {fact['rooms'][needs.output]['free'] / GIB:.0f} GiB free for the run folder" if first else ""
    return (
        f"{node.name}: {node.slots} process(es); {device}, {fact['cores']} cores, {interface} "
        f"{fact['interfaces'].get(interface, '')}{free}"
    )
