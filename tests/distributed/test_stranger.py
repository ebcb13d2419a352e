"""Whoever reaches the rendezvous can say he is a rank: nothing that he sends runs, and from another machine he doesn't reach it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from permafrost.launcher.errors import LaunchError
from permafrost.launcher.ranks.process_group import free_port, local_store

WORKER = Path(__file__).with_name("stranger_worker.py")


def start(rank: int, port: int, payload: Path, address: str = "127.0.0.1") -> subprocess.Popen[str]:
    ranks = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    environment = {**os.environ, **ranks, "PAYLOAD": str(payload)}
    return subprocess.Popen([sys.executable, WORKER], env=environment, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with process:
        pass


def listening_addresses(port: int) -> set[str]:
    """Local addresses, in hexadecimal as /proc has them, on which something listens at a port."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, _, state = line.split()[1:4]
            address, number = local.split(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


def test_a_strangers_pickle_does_not_run(tmp_path: Path) -> None:
    port, payload = free_port(), tmp_path / "payload_ran"
    processes = [start(rank, port, payload) for rank in (0, 1)]
    try:
        output, _ = processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            end(process)
    assert processes[0].returncode == 3, output
    assert "refused: " in output
    assert not payload.exists()


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_on_one_machine_the_store_listens_on_loopback_only(tmp_path: Path, address: str) -> None:
    port = free_port()
    process = start(0, port, tmp_path / "payload_ran", address)
    try:
        limit = time.monotonic() + 60
        while not listening_addresses(port) and time.monotonic() < limit:
            time.sleep(0.05)
        assert listening_addresses(port) == {"0100007F"}
    finally:
        end(process)


def test_several_machines_and_torchruns_agent_have_their_own_store() -> None:
    wait = timedelta(seconds=5)
    several = {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}
    assert local_store(several, rank=0, world_size=2, timeout=wait) is None
    assert local_store({**several, "LOCAL_WORLD_SIZE": "1"}, rank=0, world_size=2, timeout=wait) is None
    served = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert local_store(served, rank=0, world_size=2, timeout=wait) is None


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LaunchError, match=f"MASTER_PORT {port} cannot be used"):
            local_store(
                {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                rank=0,
                world_size=2,
                timeout=timedelta(seconds=5),
            )


def test_no_collective_of_ours_pickles(root: Path) -> None:
    calls = (
        "gather_object(",
        "all_gather_object(",
        "broadcast_object_list(",
        "scatter_object_list(",
        "send_object_list(",
    )
    found = [
        f"{file.name}: {call}"
        for folder in ("launcher", "model", "heads", "data", "permafrost")
        for file in (root / folder).rglob("*.py")
        for call in calls
        if f"dist.{call}" in file.read_text() or f"distributed.{call}" in file.read_text()
    ]
    assert not found
