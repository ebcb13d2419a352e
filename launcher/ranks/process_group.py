"""The process group: which process this is, how many there are, on which device, and the few things they tell each other.

Ranks come from the standard variables that `deepspeed`, `accelerate launch` and `torchrun` set; under a bare `srun`
they are derived from Slurm's; without any of them the run is one process and no process group exists.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import sys
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from permafrost._wire import broadcast, gather
from permafrost.launcher.errors import USER_ERRORS, Interrupted, LaunchError
from permafrost.launcher.ranks.division import require_mesh

if TYPE_CHECKING:
    from permafrost.model.split.fairscale_groups import TensorGroup

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
RENDEZVOUS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
FOR_EVER = timedelta(days=365)
"""The time limit of waits that something else ends."""


@dataclass
class ProcessGroup:
    """This process among all that train together.

    Attributes:
        rank: 0-based number of this process in the whole group.
        world_size: number of processes.
        local_rank: 0-based number of this process on its node.
        device: where this process computes.
        source: where the numbers came from, for the start-up lines.
        watched: whether the ranks see each other's heartbeats; set on all of them at the same place, or on none.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    source: str = "no launcher"
    watched: bool = False
    _control_group: dist.ProcessGroup | None = field(default=None, repr=False)
    _patient_group: dist.ProcessGroup | None = field(default=None, repr=False)
    _owns_process_group: bool = field(default=True, repr=False)

    @property
    def is_main(self) -> bool:
        """Return whether this process writes files and prints."""
        return self.rank == 0

    def describe(self) -> str:
        """Return one line for the start of a run."""
        backend = f", {dist.get_backend()}" if self.world_size > 1 else ""
        return f"{self.world_size} process(es) from {self.source}{backend}; rank {self.rank} on {self.device}"

    def all_reduce_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of every value over all ranks, in float64. Collective; every rank passes the same names."""
        names = sorted(values)
        if self.world_size == 1 or not names:
            return {name: float(values[name]) for name in names}
        # The checksum of the names rides along: ranks that disagree on what they average must not average it.
        checksum = float(zlib.crc32("\n".join(names).encode()))
        total = torch.tensor([float(values[name]) for name in names] + [checksum], dtype=torch.float64)
        dist.all_reduce(total, group=self._control_group)
        mean = total / self.world_size
        if mean[-1].item() != checksum:
            raise RuntimeError(f"ranks average different values; rank {self.rank} has {', '.join(names)}")
        return dict(zip(names, mean[:-1].tolist()))

    def any_true(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank. Collective."""
        if self.world_size == 1:
            return bool(flag)
        total = torch.tensor([int(flag)], dtype=torch.int64)
        dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self._control_group)
        return bool(total.item())

    def gather_objects(self, value: Any) -> list[Any] | None:
        """Return every rank's value, in rank order, on rank 0; None elsewhere. Collective; what travels, see `permafrost._wire`."""
        return [value] if self.world_size == 1 else gather(value, group=self._control_group)

    def broadcast_object(self, value: Any, *, patient: bool = False) -> Any:
        """Return rank 0's value on every rank. Collective; what travels, see `permafrost._wire`.

        Args:
            value: what rank 0 has to say; passed over elsewhere.
            patient: rank 0 worked on it alone, for however long: where the ranks see each other's heartbeats, they end the
                wait, not the process group's timeout.
        """
        if self.world_size == 1:
            return value
        return broadcast(value, group=self._patient_group if patient and self.watched else self._control_group)

    def on_main(self, make: Callable[[], T]) -> T:
        """Return on every rank what `make` returns on the main one; a user's mistake there is raised everywhere. Collective.

        It may take longer than the process group's timeout, see `broadcast_object`.
        """
        outcome: tuple[str, Any] | None = None
        if self.is_main:
            try:
                outcome = ("value", make())
            except USER_ERRORS as error:
                outcome = ("error", error)
        kind, content = self.broadcast_object(outcome, patient=True)
        if kind == "error":
            raise content
        return content

    def on_all(self, make: Callable[[], T]) -> T:
        """Return `make()` of every rank; a user's mistake on any is raised everywhere, the first rank's where several differ.

        Collective.
        """
        made: list[T] = []
        problem: Exception | None = None
        try:
            made.append(make())
        except USER_ERRORS as error:
            problem = error
        problems = self.gather_objects(problem)

        def check() -> None:
            assert problems is not None
            for found in problems:
                if found is not None:
                    raise found

        self.on_main(check)
        return made[0]

    def main_first(self, make: Callable[[], T]) -> T:
        """Return `make()` of every rank, the main one first; a user's mistake there is raised everywhere. Collective."""
        made: list[T] = []
        self.on_main(lambda: made.append(make()))
        return made[0] if self.is_main else make()

    def barrier(self) -> None:
        """Wait until every rank is here. Collective."""
        if self.world_size > 1:
            dist.barrier(group=self._control_group)

    def require_mesh(self, tensor: int) -> None:
        """Check that the group divides into tensor groups.

        Raises:
            LaunchError: naming the numbers that would fit.
        """
        require_mesh(world_size=self.world_size, tensor=tensor)

    def tensor_group(self, tensor: int) -> TensorGroup | None:
        """Return this process's tensor group, of consecutive ranks; None where nothing is to be split. Collective.

        Args:
            tensor: processes of a group.

        Raises:
            LaunchError: the group does not divide.
        """
        self.require_mesh(tensor)
        if tensor == 1:
            return None
        # Only here: it needs fairscale.
        from permafrost.model.split.fairscale_groups import join_tensor_group

        return join_tensor_group(tensor)

    def groups_across_nodes(self, tensor: int) -> int:
        """Count the tensor groups that have members on several nodes. Collective.

        Args:
            tensor: processes of a group, which are consecutive ranks.
        """
        # The first rank of a node stands for it.
        nodes = self.broadcast_object(self.gather_objects(self.rank - self.local_rank))
        return sum(len(set(nodes[first : first + tensor])) > 1 for first in range(0, self.world_size, tensor))

    def limit_collectives(self, timeout: float) -> None:
        """Give every process group that there is by now one time limit, those that libraries made for themselves too.

        DeepSpeed and fairscale make groups with torch's default of ten or thirty minutes, whatever the first one has.

        Args:
            timeout: seconds after which a collective that a rank did not join is an error.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not self._patient_group:
                _set_timeout(group, timedelta(seconds=timeout))

    def close(self) -> None:
        """Take down the process group, if this object (or an engine on it) brought it up. Safe to call twice.

        Ranks leave together, unless an exception is on its way: one that still works on its last message while
        another takes the group down, or while its own interpreter ends, may abort. They do after a signal, too, which all of
        them answer at the same place: a launcher ends the others, with another code, when the first one has left with one.
        """
        if self._owns_process_group and dist.is_available() and dist.is_initialized():
            if sys.exc_info()[0] in (None, Interrupted):
                # A rank that died says so itself; this one is done.
                with contextlib.suppress(RuntimeError):
                    self.barrier()
            groups = sys.modules.get("permafrost.model.split.fairscale_groups")
            if groups is not None:
                groups.leave_tensor_group()
            # DeepSpeed keeps groups of its own; taken down through it, a later run in this process can bring up others.
            comm = sys.modules.get("deepspeed.comm")
            if comm is not None and comm.is_initialized():
                comm.destroy_process_group()
            else:
                dist.destroy_process_group()
        self._control_group = self._patient_group = None

    def abandon(self) -> None:
        """Leave the process group as it is: the other ranks are lost, and taking it down might wait for them."""
        self._owns_process_group = False


def join_process_group(device: str = "auto", backend: str | None = None, *, timeout: float = 1800.0) -> ProcessGroup:
    """Find out which process this is, choose its device, and join the process group when there are several.

    Args:
        device: "cpu", "cuda" (this node's device number LOCAL_RANK), "cuda:N" (single process only), or "auto": cuda
            where
            there is CUDA and Accelerate's configuration does not say use_cpu, else cpu.
        backend: of torch.distributed; None is nccl on CUDA and gloo on a CPU.
        timeout: seconds after which a collective that a rank did not join is an error.

    Raises:
        LaunchError: variables are missing, contradict each other or do not fit the devices.
    """
    joined = dist.is_available() and dist.is_initialized()
    if joined:
        rank, world_size, source = dist.get_rank(), dist.get_world_size(), "the process group that was there"
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
    else:
        rank, world_size, local_rank, source = read_ranks(os.environ)
    if device == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        device = "cpu"
    chosen = choose_device(device, local_rank=local_rank, world_size=world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    limit = timedelta(seconds=timeout)
    if world_size > 1 and not joined:
        backend = backend or ("nccl" if chosen.type == "cuda" else "gloo")
        store = local_store(os.environ, rank=rank, world_size=world_size, timeout=limit)
        # Without one env:// rather than an address: torchrun's agent already serves a store at MASTER_PORT, and only env:// knows.
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    control_group = patient_group = None
    if world_size > 1:
        patient_group = _gloo_group(limit)
        _set_timeout(patient_group, FOR_EVER)
        if dist.get_backend() == "nccl":
            # Objects and a few floats go from memory to memory: the device is not synchronised for them.
            control_group = _gloo_group(limit)
    return ProcessGroup(
        rank,
        world_size,
        local_rank,
        chosen,
        source,
        _control_group=control_group,
        _patient_group=patient_group,
        _owns_process_group=not joined,
    )


def read_ranks(environ: MutableMapping[str, str]) -> tuple[int, int, int, str]:
    """Return (rank, world_size, local_rank, source) from the environment; under Slurm, complete it with the standard variables.

    Raises:
        LaunchError: naming the variables that are missing or contradict each other.
    """
    given = [name for name in RANK_VARIABLES if environ.get(name, "") != ""]
    source = "RANK, WORLD_SIZE and LOCAL_RANK"
    if not given and environ.get("SLURM_STEP_ID") and environ.get("SLURM_PROCID"):
        # SLURM_STEP_ID is set in what srun starts, and not in a batch script, which has a SLURM_PROCID all the same.
        _complete_from_slurm(environ)
        given, source = list(RANK_VARIABLES), "Slurm (srun)"
    if not given:
        return 0, 1, 0, "no launcher"
    if "WORLD_SIZE" in given and _integer(environ, "WORLD_SIZE") == 1 and "RANK" not in given:
        given.append("RANK")
        environ["RANK"] = "0"
    if "RANK" in given and "WORLD_SIZE" in given and "LOCAL_RANK" not in given and _integer(environ, "WORLD_SIZE") == 1:
        given.append("LOCAL_RANK")
        environ["LOCAL_RANK"] = "0"
    missing = [name for name in RANK_VARIABLES if name not in given]
    if missing:
        raise LaunchError(
            f"{_is_or_are(given)} set but {_is_or_are(missing)} not: start with deepspeed, accelerate launch, torchrun "
            f"or srun, which set all of them, or unset {', '.join(given)} for a single process"
        )
    rank, world_size, local_rank = (_integer(environ, name) for name in RANK_VARIABLES)
    if world_size < 1:
        raise LaunchError(f"WORLD_SIZE is {world_size}: it counts the processes and is at least 1")
    if not 0 <= rank < world_size:
        raise LaunchError(f"RANK is {rank} but WORLD_SIZE is {world_size}: RANK must lie in 0..{world_size - 1}")
    if not 0 <= local_rank <= rank:
        raise LaunchError(
            f"LOCAL_RANK is {local_rank} but RANK is {rank}: a process's number on its node cannot exceed its RANK"
        )
    if environ.get("LOCAL_WORLD_SIZE"):
        local_world_size = _integer(environ, "LOCAL_WORLD_SIZE")
        if not local_rank < local_world_size <= world_size:
            raise LaunchError(
                f"LOCAL_WORLD_SIZE is {local_world_size} but LOCAL_RANK is {local_rank} and WORLD_SIZE is "
                f"{world_size}: it counts this node's processes, so it is above LOCAL_RANK and at most WORLD_SIZE"
            )
    if world_size > 1:
        absent = [name for name in RENDEZVOUS_VARIABLES if not environ.get(name)]
        if absent:
            raise LaunchError(
                f"WORLD_SIZE is {world_size} but {_is_or_are(absent)} not set: give rank 0's host and a free port on "
                "it, the same on every process"
            )
        if not 0 < _integer(environ, "MASTER_PORT") < 65536:
            raise LaunchError(f"MASTER_PORT is {environ['MASTER_PORT']}: a port lies in 1..65535")
    return rank, world_size, local_rank, source


def choose_device(device: str, *, local_rank: int, world_size: int) -> torch.device:
    """Return the device this process computes on.

    Raises:
        LaunchError: the device does not exist here, or several processes would share one.
    """
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if num_cuda else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise LaunchError(f"device is {device!r}: give auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return torch.device("cpu")
    if not num_cuda:
        raise LaunchError(
            f"device is {device!r} but torch sees no CUDA device: run with --device cpu, or see `permafrost doctor`"
        )
    if device == "cuda":
        index = local_rank
        if index >= num_cuda:
            raise LaunchError(
                f"LOCAL_RANK is {local_rank} but this process sees {num_cuda} CUDA device(s): start at most that many "
                "processes on the node, check CUDA_VISIBLE_DEVICES, or run with --device cpu"
            )
        return torch.device("cuda", index)
    index = int(device.removeprefix("cuda:"))
    if world_size > 1:
        raise LaunchError(
            f"device is {device!r} but WORLD_SIZE is {world_size}: give cuda, and each process takes its LOCAL_RANK's"
        )
    if index >= num_cuda:
        raise LaunchError(f"device is {device!r} but this node shows {num_cuda} CUDA device(s), numbered from 0")
    return torch.device("cuda", index)


def local_store(environ: Mapping[str, str], *, rank: int, world_size: int, timeout: timedelta) -> dist.TCPStore | None:
    """Return the store where the processes of one machine meet, which nothing outside of it reaches.

    torch's own listens on all interfaces, and asks nobody who he is.

    Args:
        environ: MASTER_PORT, and LOCAL_WORLD_SIZE or a MASTER_ADDR of this machine's loopback.
        rank: of this process; 0 serves.
        world_size: number of processes.
        timeout: of a wait for the others.

    Returns:
        None where there are several machines, or torchrun's agent serves the store.

    Raises:
        LaunchError: the port is in use.
    """
    is_served = environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
    if is_served or not (environ.get("LOCAL_WORLD_SIZE") == str(world_size) or _is_loopback(environ["MASTER_ADDR"])):
        return None
    port, descriptor = int(environ["MASTER_PORT"]), None
    if rank == 0:
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((LOOPBACK, port))
            listening.listen(world_size + 16)
        except OSError as error:
            listening.close()
            raise LaunchError(
                f"MASTER_PORT {port} cannot be used: {error.strerror or error}; choose a free port"
            ) from None
        descriptor = listening.detach()
    return dist.TCPStore(
        LOOPBACK, port, world_size, rank == 0, timeout, wait_for_workers=False, master_listen_fd=descriptor
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except (OSError, ValueError):
        return False


def complete_single_process(environ: MutableMapping[str, str]) -> None:
    """Fill in the standard variables of a group of one, for a library that needs a process group even then.

    DeepSpeed without them looks for MPI and fails on mpi4py.
    """
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        if not environ.get(name):
            environ[name] = value
    if not environ.get("MASTER_PORT"):
        environ["MASTER_PORT"] = str(free_port())


def free_port() -> int:
    """Return a TCP port that nothing listens on at this moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def first_slurm_host(nodelist: str) -> str:
    """Return the first host of Slurm's compressed list: `gpu[03-05,09],login1` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodelist)
    if match is None:
        raise LaunchError(
            f"SLURM_STEP_NODELIST is {nodelist!r}: expected a list of hosts such as gpu[03-05]; set MASTER_ADDR by hand"
        )
    return "".join(part or "" for part in match.groups())


def _gloo_group(timeout: timedelta) -> dist.ProcessGroup:
    """Make a group of all ranks; collective."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert not isinstance(group, int), "only who is no member gets a number"
    return group


def _set_timeout(group: dist.ProcessGroup, limit: timedelta) -> None:
    # Older torch has the same function under a private name.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(limit, group)


def _complete_from_slurm(environ: MutableMapping[str, str]) -> None:
    size_name = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    absent = [name for name in (size_name, "SLURM_LOCALID") if not environ.get(name)]
    if absent:
        raise LaunchError(
            f"SLURM_PROCID is set but {' and '.join(absent)} not: start with srun, or set {', '.join(RANK_VARIABLES)}"
        )
    environ["RANK"], environ["LOCAL_RANK"] = environ["SLURM_PROCID"], environ["SLURM_LOCALID"]
    environ["WORLD_SIZE"] = environ[size_name]
    if not environ.get("MASTER_ADDR"):
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
        if environ.get("SLURM_STEP_NUM_NODES") == "1":
            environ["MASTER_ADDR"] = LOOPBACK
        elif nodes:
            environ["MASTER_ADDR"] = first_slurm_host(nodes)
    if not environ.get("MASTER_PORT"):
        # A function of job and step: the same for every process, and below the range that systems give out.
        job, step = environ.get("SLURM_JOB_ID", "0"), environ["SLURM_STEP_ID"]
        environ["MASTER_PORT"] = str(20000 + zlib.crc32(f"{job}.{step}".encode()) % 10000)


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise LaunchError(f"{name} is {environ[name]!r}: it must be an integer") from None


def _is_or_are(names: list[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"
