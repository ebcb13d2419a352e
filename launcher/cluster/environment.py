"""Choose the variables of the launcher's that its ranks on other nodes get. Imports no torch."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

from permafrost.launcher.errors import LaunchError

FORWARDED = (
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "PYTHONUNBUFFERED",
    "PERMAFROST_*",
    "NCCL_*",
    "GLOO_*",
    "UCX_*",
    "FI_*",
    "TORCH_*",
    "TRITON_*",
    "DS_ACCELERATOR",
    "OMP_*",
    "MKL_*",
    "KMP_*",
    "HF_HOME",
    "HF_HUB_*",
)
"""What is forwarded unasked, where it is set."""

OWN = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_RANK",
    "CROSS_SIZE",
    "CUDA_VISIBLE_DEVICES",
    "PERMAFROST_LAUNCH_ID",
    "PERMAFROST_LAUNCH_NODE",
    "PERMAFROST_LAUNCH_TAKEN",
)
"""What a launcher sets for each rank, and nobody else may."""

# Python itself needs them on the node before a rank can decode anything, so they alone meet its shell.
BEFORE_PYTHON = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
# Nothing in here means anything to a shell or to pdsh (which replaces %h, %n and %u).
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]*")


def forwarded(environ: Mapping[str, str], requests: Sequence[str]) -> dict[str, str]:
    """Return the variables for the ranks.

    Args:
        environ: the launcher's own.
        requests: of --export, in order: NAME takes the launcher's value, NAME=VALUE gives one.

    Raises:
        LaunchError: a request is no such thing, names a variable that is not set here, or one that launchers set.
    """
    found = {
        name: value
        for name, value in environ.items()
        if name not in OWN and any(fnmatch.fnmatchcase(name, pattern) for pattern in FORWARDED)
    }
    return found | requested(environ, requests)


def requested(environ: Mapping[str, str], requests: Sequence[str]) -> dict[str, str]:
    """Return the variables that --export alone asks for, as `forwarded` does."""
    found = {}
    for request in requests:
        name, equals, value = request.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise LaunchError(f"--export {request!r}: {name!r} is not a variable's name: give NAME or NAME=VALUE")
        if name in OWN:
            raise LaunchError(f"--export {name}: the launcher sets it for each rank, so it cannot be given")
        if not equals and name not in environ:
            raise LaunchError(f"--export {name}: it is not set here: export it, or give {name}=VALUE")
        found[name] = value if equals else environ[name]
    return found


def shell_exports(environment: Mapping[str, str]) -> dict[str, str]:
    """Return those variables that a node's shell has to set before Python starts.

    Raises:
        LaunchError: a value that a shell, or pdsh, could change.
    """
    found = {name: environment[name] for name in BEFORE_PYTHON if name in environment}
    for name, value in found.items():
        if not _PLAIN.fullmatch(value):
            odd = next(character for character in value if not _PLAIN.fullmatch(character))
            raise LaunchError(
                f"{name} holds {odd!r}, which the shells of other nodes would not pass on unchanged: it may have letters, "
                "digits and _@+=:,./- only"
            )
    return found
