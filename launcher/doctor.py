"""Report what this machine offers and lacks: `permafrost doctor`. It is made to work where little else does.

Packages and devices are examined in a child process, so that a library that crashes or hangs on import becomes a line
of the report.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from permafrost.data.cache import cache_folder
from permafrost.launcher.machine import memory, room, version_of

Status = Literal["ok", "missing", "absent"]

# Distribution, module to import, what it is for, whether the quickstart needs it.
PACKAGES: tuple[tuple[str, str, str, bool], ...] = (
    ("torch", "torch", "everything", True),
    ("torchvision", "torchvision", "heads and augmentation", True),
    ("numpy", "numpy", "everything", True),
    ("pillow", "PIL.Image", "reading images", True),
    ("pycocotools", "pycocotools.mask", "masks and AP", True),
    ("safetensors", "safetensors", "weights and checkpoints", True),
    ("accelerate", "accelerate", "training in one process or on one node", True),
    ("tensorboard", "tensorboard.compat.proto.event_pb2", "TensorBoard files", True),
    ("tyro", "tyro", "options for every field of a recipe", True),
    ("rich", "rich", "the progress line", True),
    ("matplotlib", "matplotlib", "plots", False),
    ("scipy", "scipy.optimize", "segmentation: matching queries to segments", False),
    ("msgpack", "msgpack", "training on several processes", False),
    ("deepspeed", "deepspeed", "ZeRO and training on many nodes", False),
    ("timm", "timm", "backbones called timm/...", False),
    ("fairscale", "fairscale.nn.model_parallel", "splitting a backbone over GPUs", False),
    ("av", "av", "video: the built-in world, resizing, and decoding where decord is absent", False),
    ("decord", "decord", "video", False),
)
PYTHON = (3, 11)
# The quickstart stays under 4 GB with its data workers; what is free is an estimate, so a little less may do.
QUICKSTART_MEMORY_GB = 3.5
QUICKSTART_DISK_GB = 0.5
SHARED_MEMORY_GB = 0.25
PROBE_TIMEOUT = 60.0
GB = 1e9


@dataclass
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: "ok"; "missing" when the quickstart cannot run so; "absent" when only something else cannot.
        found: what is there, or what is wrong.
        remedy: what it is needed for and how to get it; "" when all is well.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def diagnose(folder: Path | None = None) -> dict[str, list[Check]]:
    """Make every check; return them by section.

    Args:
        folder: where runs would be written; None is the current folder.
    """
    probed = run_probe()
    return {
        "packages": check_packages(probed),
        "devices": [*check_processor(probed), *check_gpus(probed)],
        "room": check_room(folder or Path.cwd()),
        "compilers": check_compilers(),
        "several processes": [*check_backends(probed), *check_remote_shells()],
    }


def can_run_quickstart(report: dict[str, list[Check]]) -> bool:
    """Return whether nothing that the quickstart needs is missing."""
    return not any(check.status == "missing" for checks in report.values() for check in checks)


def format_report(report: dict[str, list[Check]]) -> str:
    """Return the report as text."""
    lines = [
        f"permafrost {version_of('permafrost') or '(not installed)'}, "
        f"Python {platform.python_version()}, {platform.platform()}"
    ]
    for section, checks in report.items():
        lines += ["", section]
        width = max(len(check.name) for check in checks)
        for check in checks:
            mark = {"ok": "ok", "missing": "MISSING", "absent": "-"}[check.status]
            lines.append(f"  {mark:<8}{check.name:<{width}}  {check.found}")
            if check.remedy:
                lines.append(f"  {'':<8}{'':<{width}}  {check.remedy}")
    missing = [check.name for checks in report.values() for check in checks if check.status == "missing"]
    verdict = "The quickstart can run here: permafrost train quickstart"
    if missing:
        verdict = f"The quickstart cannot run here: see {', '.join(missing)} above."
    return "\n".join([*lines, "", verdict])


def check_packages(probed: dict[str, Any]) -> list[Check]:
    """Check Python and each package: its version, whether that is new enough, and whether it imports."""
    found_python = sys.version_info[:2] >= PYTHON
    own = platform.python_version()
    remedy = "" if found_python else f"needed for everything: Python {'.'.join(map(str, PYTHON))} or newer"
    checks = [Check("python", "ok" if found_python else "missing", own, remedy)]
    bounds = lower_bounds()
    for package, module, purpose, required in PACKAGES:
        version, bound = version_of(package), bounds.get(package, "")
        error = probed.get(module, "was not examined: the examining process ended early")
        lacking: Status = "missing" if required else "absent"
        install = f"needed for {purpose}; pip install '{package}{'>=' + bound if bound else ''}'"
        if version is None:
            checks.append(Check(package, lacking, "not installed", install))
        elif error is not None:
            again = f"needed for {purpose}; pip install --force-reinstall {package}"
            if package in ("torch", "torchvision"):
                again = f"needed for {purpose}; both from one place: pip install --force-reinstall torch torchvision"
            checks.append(Check(package, lacking, f"{version}, but it does not import: {error}", again))
        elif bound and not at_least(version, bound):
            checks.append(Check(package, lacking, f"{version}, older than {bound}", f"{install} --upgrade"))
        else:
            checks.append(Check(package, "ok", version))
    return checks


def check_processor(probed: dict[str, Any]) -> list[Check]:
    """Check cores, instruction set and memory."""
    devices = probed.get("devices") or {}
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = f"{usable} of {os.cpu_count()} cores" if usable != os.cpu_count() else f"{usable} cores"
    checks = [Check("CPU", "ok", f"{cores}, {platform.machine()}, torch uses {devices.get('cpu', 'unknown')}")]
    total, available = memory()
    if available is None or total is None:
        return [*checks, Check("memory", "ok", "unknown")]
    found = f"{available / GB:.1f} GB free of {total / GB:.1f} GB"
    if available < QUICKSTART_MEMORY_GB * GB:
        remedy = f"the quickstart wants {QUICKSTART_MEMORY_GB} GB: end other programs, or lower --loop.global-batch"
        return [*checks, Check("memory", "missing", found, remedy)]
    return [*checks, Check("memory", "ok", found)]


def check_gpus(probed: dict[str, Any]) -> list[Check]:
    """Check each GPU that torch sees: memory, bfloat16, and whether it computes."""
    devices = probed.get("devices") or {}
    gpus = devices.get("gpus") or []
    if not gpus:
        why = devices.get("no_gpu") or "torch was not examined"
        remedy = "large backbones want one: install a driver for this torch's CUDA, or another torch build"
        return [Check("GPU", "absent", f"none ({why})", remedy)]
    checks = []
    for index, gpu in enumerate(gpus):
        found = f"{gpu['name']}, {gpu['memory'] / GB:.0f} GB, compute capability {gpu['capability']}, "
        found += "bfloat16" if gpu["bfloat16"] else "no bfloat16"
        if gpu["error"]:
            remedy = "train with --device cpu, or install a torch build that supports this GPU and driver"
            checks.append(Check(f"GPU {index}", "absent", f"{found}; a test computation fails: {gpu['error']}", remedy))
        else:
            checks.append(Check(f"GPU {index}", "ok", found))
    return checks


def check_room(folder: Path) -> list[Check]:
    """Check the shipped weights, the cache, the current folder and shared memory."""
    weights = Path(__file__).resolve().parents[1] / "model" / "pretrained"
    files = sorted(path.name for path in weights.glob("*.safetensors"))
    if files:
        checks = [Check("pretrained weights", "ok", ", ".join(files))]
    else:
        remedy = "needed for the quickstart: install permafrost again; a checkout needs its model/pretrained folder"
        checks = [Check("pretrained weights", "missing", f"no .safetensors in {weights}", remedy)]
    checks.append(
        check_writable("cache", cache_folder(), "built-in data sets", "set PERMAFROST_CACHE to a folder with room")
    )
    checks.append(check_writable("runs", folder, "run folders", "change to a folder with room, or give --output"))
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        status: Status = "ok" if free >= SHARED_MEMORY_GB * GB else "absent"
        remedy = (
            ""
            if status == "ok"
            else "data workers pass batches through it: give a container --shm-size 1g, or set --loop.num-workers 0"
        )
        checks.append(Check("shared memory", status, f"{free / GB:.1f} GB free", remedy))
    return checks


def check_writable(name: str, folder: Path, purpose: str, remedy: str) -> Check:
    """Check whether a file can be made in a folder, or in the nearest one above it that exists, and whether it has room."""
    found = room(str(folder))
    if found.error:
        return Check(name, "missing", f"{folder} cannot be written: {found.error}", f"needed for {purpose}: {remedy}")
    shown = f"{folder}, {found.free / GB:.1f} GB free"
    if found.free < QUICKSTART_DISK_GB * GB:
        return Check(name, "missing", shown, f"the quickstart wants {QUICKSTART_DISK_GB} GB for {purpose}: {remedy}")
    return Check(name, "ok", shown)


def check_compilers() -> list[Check]:
    """Look for g++ and ninja, with which DeepSpeed and torch.compile build what they do not bring."""
    ops = "DeepSpeed's compiled ops, such as its optimizer on the CPU"
    checks = [
        check_program("g++", f"needed for torch.compile on a CPU, and {ops}; apt install g++"),
        check_program("ninja", f"needed for {ops}; pip install ninja"),
    ]
    beside = Path(sys.executable).with_name("ninja")
    if checks[1].status != "ok" and beside.is_file():
        checks[1] = Check("ninja", "absent", f"{beside}, not on PATH", f"needed for {ops}; activate the environment")
    return checks


def check_backends(probed: dict[str, Any]) -> list[Check]:
    """Check the backends of torch.distributed."""
    backends = (probed.get("devices") or {}).get("backends") or {}
    purpose = {"gloo": "several processes on CPUs", "nccl": "several GPUs"}
    return [
        Check(name, "ok", str(backends[name]))
        if backends.get(name)
        else Check(name, "absent", "not in this torch", f"needed for {why}; pip install a torch build that has it")
        for name, why in purpose.items()
    ]


def check_remote_shells() -> list[Check]:
    """Look for ssh and pdsh, with which the deepspeed launcher starts other nodes."""
    needed = "needed for `permafrost launch --hostfile` and `deepspeed --hostfile`; apt install"
    return [
        check_program(name, f"{needed} {package}") for name, package in (("ssh", "openssh-client"), ("pdsh", "pdsh"))
    ]


def check_program(name: str, remedy: str) -> Check:
    """Look for a program on PATH."""
    path = shutil.which(name)
    return Check(name, "ok", path) if path else Check(name, "absent", "not found", remedy)


def lower_bounds() -> dict[str, str]:
    """Return the smallest version of each package that permafrost's own metadata asks for."""
    try:
        requirements = metadata.requires("permafrost") or []
    except metadata.PackageNotFoundError:
        return {}
    matches = (re.match(r"([A-Za-z0-9_.-]+?)\s*>=\s*([\d.]+)\s*$", line) for line in requirements)
    return {match[1].lower(): match[2] for match in matches if match}


def at_least(version: str, bound: str) -> bool:
    """Return whether a version such as 2.15.0+cu132 or 2.12.0rc1 reaches a bound such as 2.11, number by number."""

    def numbers(text: str) -> list[int]:
        return [int(match[0]) for part in text.split("+")[0].split(".") if (match := re.match(r"\d+", part))]

    found, least = numbers(version), numbers(bound)
    return found + [0] * (len(least) - len(found)) >= least


def run_probe(modules: Iterable[str] | None = None, *, timeout: float = PROBE_TIMEOUT) -> dict[str, Any]:
    """Import modules in a child process, starting another after each one that kills or stalls it.

    Args:
        modules: None takes those of PACKAGES.
        timeout: seconds for each child.

    Returns:
        of each module None or why it does not import, and "devices" as `describe_devices` returns it, where torch
        imports.
    """
    waiting = [*(module for _, module, _, _ in PACKAGES), "devices"] if modules is None else list(modules)
    found: dict[str, Any] = {}
    code = f"import sys; from {__name__} import probe; probe(sys.argv[1:])"
    while waiting:
        child = subprocess.Popen(
            [sys.executable, "-c", code, *waiting],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        try:
            output, _ = child.communicate(timeout=timeout)
            ending = f"the process importing it ended with code {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            ending = f"importing it took more than {timeout:.0f} s"
        for line in output.splitlines():
            with contextlib.suppress(ValueError):
                found.update(json.loads(line))
        waiting = [name for name in waiting if name not in found]
        if waiting:
            found[waiting[0]] = {"no_gpu": ending} if waiting[0] == "devices" else ending
            waiting = waiting[1:]
    return found


def probe(names: Sequence[str]) -> None:
    """Examine each name and print one JSON object a line on the real stdout, whatever libraries print: run in the child."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("ignore")
    for name in names:
        result = describe_devices() if name == "devices" else import_error(name)
        print(json.dumps({name: result}), file=out, flush=True)


def import_error(module: str) -> str | None:
    """Return why a module does not import, or None."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(module)
            if module == "torchvision":
                # Imports with a torch of another build can succeed until the first compiled op.
                importlib.import_module("torchvision.ops")
                importlib.import_module("torch").ops.torchvision.nms  # noqa: B018 - the lookup is the test
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    return None


def describe_devices() -> dict[str, Any]:
    """Return what torch says of the processor, the GPUs and its distributed backends; JSON values only."""
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:
        return {"no_gpu": f"torch does not import: {error}"}
    backends: dict[str, str] = {}
    if dist.is_available():
        if dist.is_gloo_available():
            backends["gloo"] = "available"
        if dist.is_nccl_available():
            backends["nccl"] = _attempt(lambda: ".".join(map(str, torch.cuda.nccl.version()))) or "available"
    described: dict[str, Any] = {"cpu": torch.backends.cpu.get_cpu_capability(), "backends": backends, "gpus": []}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        built = torch.version.cuda or torch.version.hip
        described["no_gpu"] = (
            f"torch {torch.__version__} finds no usable device"
            if built
            else f"torch {torch.__version__} is a CPU build"
        )
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        described["gpus"].append(
            {
                "name": properties.name,
                "memory": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "bfloat16": properties.major >= 8 or torch.version.hip is not None,
                "error": _computation_error(index),
            }
        )
    return described


def _computation_error(index: int) -> str | None:
    """Return why a small product does not come out right on a GPU, or None."""
    import torch

    try:
        left = torch.arange(64.0, device=f"cuda:{index}").reshape(8, 8)
        right = torch.eye(8, device=left.device) * 2
        return None if torch.equal((left @ right).cpu(), torch.arange(64.0).reshape(8, 8) * 2) else "a product is wrong"
    except RuntimeError as error:
        return str(error).splitlines()[0]


def _attempt(function: Callable[[], str]) -> str | None:
    try:
        return function()
    except Exception:
        return None
