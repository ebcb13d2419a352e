"""Record the provenance of a run: versions, commit, command and machine, for its folder and to compare ranks. Imports no torch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from permafrost.launcher.machine import versions_of

PACKAGES = (
    "permafrost",
    "torch",
    "torchvision",
    "deepspeed",
    "accelerate",
    "timm",
    "safetensors",
    "pycocotools",
    "numpy",
)
"""Every package that shapes a result."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of PACKAGES."""
    return versions_of(PACKAGES)


def git_commit() -> str | None:
    """Return the commit of the checkout this code runs from, "+changes" when files differ from it; None outside of one."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    head = _git(checkout, ["rev-parse", "HEAD"])
    changes = _git(checkout, ["status", "--porcelain", "--untracked-files=no"])
    return None if head is None else head + ("+changes" if changes else "")


def surroundings() -> dict[str, Any]:
    """Return when, where and with what this process was started, as JSON values."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(sys.argv),
        "folder": os.getcwd(),
        "host": platform.node(),
        "system": platform.platform(),
        "git_commit": git_commit(),
        "versions": versions(),
    }


def _git(checkout: Path, arguments: list[str]) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
