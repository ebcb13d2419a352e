"""Ask this machine: processes, memory, disks, GPUs, network, versions, the hash of permafrost's source.

The standard library alone, Linux. A launch sends this file's source to its nodes together with the node agent's, and they run
where nothing is installed: so nothing else of permafrost may be imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import struct
import tempfile
from typing import NamedTuple

FOLDERS = ("configs", "data", "heads", "launcher", "model")
SOURCES = (".py", ".json", ".yaml", ".cu", ".cuh", ".cpp", ".h")


class Process(NamedTuple):
    """State of a process, as the kernel says it.

    Attributes:
        state: its letter, "R", "S", "T" (stopped), "Z" (ended, not yet waited for) or another; "" where there is no process.
        parent: the parent's pid.
        started: when, in ticks since boot; with the pid it names one process for good.
    """

    state: str = ""
    parent: int = -1
    started: str = ""

    @property
    def has_ended(self) -> bool:
        """Return whether it is gone, or nothing but an entry that its parent has not looked at."""
        return self.state in ("", "Z", "X")

    @property
    def is_stopped(self) -> bool:
        """Return whether SIGSTOP or a debugger holds it."""
        return self.state in ("T", "t")


def process(pid: int) -> Process:
    """Look at a process of this machine."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # After the name, which may hold anything.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return Process()
    return Process(fields[0], int(fields[1]), fields[19])


def memory() -> tuple[int | None, int | None]:
    """Return (total, available) bytes: the machine's, or the control group's where that allows less; None where unknown."""
    values = {}
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0]) * 1024
    total, available = values.get("MemTotal"), values.get("MemAvailable")
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as now:
            limit, used = int(most.read()), int(now.read())
        if total is not None and limit < total:
            total, available = limit, min(available or limit, limit - used)
    return total, available


class Room(NamedTuple):
    """Room in a folder, and whether it can be written.

    Attributes:
        place: the nearest folder that exists.
        free: bytes on its disk.
        error: why no file can be made there; None where one can.
    """

    place: str
    free: int
    error: str | None


def room(path: str) -> Room:
    """Find out whether a file can be made where `path` is or would be."""
    place = existing(path)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"permafrost")
            file.flush()
        return Room(place, shutil.disk_usage(place).free, None)
    except OSError as error:
        return Room(place, 0, error.strerror or str(error))


def existing(path: str) -> str:
    """Return the path itself, or the nearest folder above it that exists."""
    path = os.path.abspath(path)
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def sha256_of(path: str) -> str:
    """Return the SHA-256 of a file's content; "" where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return ""


def version_of(package: str) -> str | None:
    """Return a package's version by its metadata, or None where it is not installed; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions_of(packages: tuple[str, ...] | list[str]) -> dict[str, str]:
    """Return the versions of Python and of packages, "not installed" where one is not."""
    found = {package: version_of(package) or "not installed" for package in packages}
    return {"python": platform.python_version(), **found}


def code_hash() -> str:
    """Return the SHA-256 of the installed permafrost's sources, by their paths inside it; "" where it is not installed."""
    digest = hashlib.sha256()
    for name in ("permafrost", *(f"permafrost.{folder}" for folder in FOLDERS)):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin is None:
            return ""
        root = os.path.dirname(spec.origin)
        for path, folders, files in os.walk(root):
            # Those of the package itself come by themselves: in a checkout they lie elsewhere.
            folders[:] = sorted(folder for folder in folders if folder != "__pycache__" and name != "permafrost")
            for file in sorted(file for file in files if file.endswith(SOURCES)):
                relative = os.path.relpath(os.path.join(path, file), root)
                digest.update(f"{name}/{relative}\0{sha256_of(os.path.join(path, file))}".encode())
    return digest.hexdigest()


def num_gpus() -> int:
    """Count the GPUs that a driver serves here, without importing torch; CUDA_VISIBLE_DEVICES hides some."""
    count = _nvidia_gpus() or _amd_gpus()
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        visible = os.environ.get(variable)
        if visible is not None:
            shown = [entry.strip() for entry in visible.split(",")]
            # CUDA stops at the first entry that is none.
            length = next((i for i, entry in enumerate(shown) if entry in ("", "-1")), len(shown))
            count = min(count, length)
    return count


def _nvidia_gpus() -> int:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    if nvml.nvmlInit_v2() != 0:
        return 0
    count = ctypes.c_uint()
    failed = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return 0 if failed else count.value


def _amd_gpus() -> int:
    nodes = "/sys/class/kfd/kfd/topology/nodes"
    count = 0
    for name in os.listdir(nodes) if os.path.isdir(nodes) else []:
        with contextlib.suppress(OSError, ValueError), open(f"{nodes}/{name}/gpu_id") as file:
            count += int(file.read()) != 0
    return count


def interfaces() -> dict[str, str]:
    """Return the network interfaces that are up: name -> IPv4 address, "" where it has none."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                flags = struct.unpack("H", fcntl.ioctl(probe, 0x8913, request)[16:18])[0]  # SIOCGIFFLAGS
            except OSError:
                continue
            if not flags & 1:  # IFF_UP
                continue
            address = ""
            with contextlib.suppress(OSError):
                address = socket.inet_ntoa(fcntl.ioctl(probe, 0x8915, request)[20:24])  # SIOCGIFADDR
            found[name] = address
    return found
