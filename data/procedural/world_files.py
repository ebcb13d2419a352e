"""Writing a built-in world once into a folder, by one process or several, without leaving half a world."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from permafrost.data.cache import cache_folder
from permafrost.data.errors import DataError

MANIFEST = "world.json"


def default_folder(kind: str, manifest: str) -> Path:
    """The cache folder of a world; its name ends with a hash of the manifest."""
    return cache_folder() / f"{kind}-{hashlib.sha256(manifest.encode()).hexdigest()[:12]}"


def ensure_folder(
    kind: str, manifest: str, folder: Path | None, write: Callable[[Path], None], *, content: str
) -> Path:
    """Write a world unless it is there already, and return its folder.

    Files are written to a temporary folder that is renamed when complete, so an interrupted run leaves no half world
    and processes that start together do not disturb one another: the first to finish wins, the others discard equal
    bytes.

    Args:
        kind: The world's name.
        manifest: Its parameters as text; another text is another world.
        folder: Where it belongs; None is its place in the cache.
        write: Fills an existing, empty folder, MANIFEST included.
        content: What is in it, to be said when it is written ("2300 images").

    Raises:
        DataError: The folder holds something else, or cannot be written.
    """
    folder = default_folder(kind, manifest) if folder is None else folder
    if _is_there(kind, manifest, folder):
        return folder
    start = time.monotonic()
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        write(staging)
        staging.chmod(0o755)
        try:
            staging.rename(folder)
        except OSError:
            # Another process was faster: what it wrote is equal, unless the folder is somebody else's.
            if not _is_there(kind, manifest, folder):
                raise
            return folder
    except OSError as error:
        raise DataError(
            f"cannot write the {kind} world to {folder}: {error}. Set PERMAFROST_CACHE or data.root to another folder"
        ) from error
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging, ignore_errors=True)
    print(f"wrote the {kind} world: {content} to {folder} in {time.monotonic() - start:.1f} s", flush=True)
    return folder


def _is_there(kind: str, manifest: str, folder: Path) -> bool:
    """Whether the folder holds this world; an empty or absent folder does not, any other content is refused."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    file = folder / MANIFEST
    found = file.read_text(encoding="utf-8") if file.is_file() else None
    if found == manifest:
        return True
    what = "a world of other parameters" if found else f"something other than a {kind} world"
    raise DataError(f"{folder} holds {what}: name an empty data.root, or delete that folder to have it rendered anew")


def run_parts(kind: str, module: str, job: dict[str, Any], parts: int, own: Callable[[], Any]) -> list[Any]:
    """Part 0 in this process, the others each in one of its own: `python -m module JOB`, which prints its result as JSON.

    Its own command, not multiprocessing's: the caller may hold threads, which forbids a fork, and a spawned process would run the
    user's script again where that has no main guard.

    Args:
        kind: The world's name.
        module: Its __main__ takes the job, with `part` and `parts` added, as its argument.
        job: JSON values.
        parts: Processes, this one included.
        own: Part 0.

    Raises:
        DataError: A process died.
    """
    children = [_start_process(module, {**job, "part": part, "parts": parts}) for part in range(1, parts)]
    try:
        results = [own()]
        for child in children:
            output, _ = child.communicate()
            if child.returncode:
                raise DataError(f"a process that renders the {kind} world ended with {child.returncode}; see above")
            results.append(json.loads(output))
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.stdout.close()
    return results


def _start_process(module: str, job: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, json.dumps(job)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
