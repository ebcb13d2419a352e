"""Write a built-in world once into a folder, by one process or several, without leaving half a world."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from permafrost.data.cache import cache_folder
from permafrost.data.errors import DataError

MANIFEST = "world.json"


_MOST_PROCESSES = 16


@dataclass(frozen=True)
class WorldFiles:
    """Recipe of the files of one kind of world; equal worlds give equal files, however many processes render.

    Attributes:
        kind: the world's name.
        renderer: part of the cache folder's name: raised when what unchanged parameters give changes.
        unit: what a split is counted in, to be said when it is written ("images").
        per_process: a further process pays from this many on: it takes half a second to start.
        folders: made before anything is rendered, relative to the world's folder.
        render_part: takes a world, its folder, part and parts; writes every `parts`-th of both splits from `part` on, and returns
            JSON values.
        finish: takes a world, its folder and what all parts returned, in their order; writes what describes the whole.
        module: its __main__ calls `main`: a rendering process is `python -m module JOB`.
    """

    kind: str
    renderer: int
    unit: str
    per_process: int
    folders: tuple[str, ...]
    render_part: Callable[[Any, Path, int, int], Any]
    finish: Callable[[Any, Path, list[Any]], None]
    module: str

    def manifest(self, world: Any) -> str:
        """Return the world's parameters as text; another text is another world."""
        return (
            json.dumps({"world": self.kind, "renderer": self.renderer, **asdict(world)}, sort_keys=True, indent=1)
            + "\n"
        )

    def folder(self, world: Any) -> Path:
        """Return the cache folder of a world; its name ends with a hash of the parameters."""
        return cache_folder() / f"{self.kind}-{hashlib.sha256(self.manifest(world).encode()).hexdigest()[:12]}"

    def ensure(self, world: Any, folder: Path | None = None) -> Path:
        """Write a world unless it is there already, and return its folder.

        Files are written to a temporary folder that is renamed when complete, so an interrupted run leaves no half world
        and processes that start together do not disturb one another: the first to finish wins, the others discard equal
        bytes.

        Args:
            world: its parameters, a dataclass with num_train and num_val.
            folder: where it belongs; None is its place in the cache.

        Raises:
            DataError: the folder holds something else, or cannot be written.
        """
        folder = self.folder(world) if folder is None else folder
        if self._is_there(world, folder):
            return folder
        start = time.monotonic()
        staging = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            self.write(world, staging)
            staging.chmod(0o755)
            try:
                staging.rename(folder)
            except OSError:
                # Another process was faster: what it wrote is equal, unless the folder is somebody else's.
                if not self._is_there(world, folder):
                    raise
                return folder
        except OSError as error:
            raise DataError(
                f"cannot write the {self.kind} world to {folder}: {error}. Set PERMAFROST_CACHE or data.root to another folder"
            ) from error
        finally:
            if staging is not None and staging.exists():
                shutil.rmtree(staging, ignore_errors=True)
        content = f"{world.num_train + world.num_val} {self.unit}"
        print(f"wrote the {self.kind} world: {content} to {folder} in {time.monotonic() - start:.1f} s", flush=True)
        return folder

    def _is_there(self, world: Any, folder: Path) -> bool:
        """Return whether the folder holds this world; an empty or absent folder does not, any other content is refused."""
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return False
        file = folder / MANIFEST
        found = file.read_text(encoding="utf-8") if file.is_file() else None
        if found == self.manifest(world):
            return True
        what = "a world of other parameters" if found else f"something other than a {self.kind} world"
        raise DataError(
            f"{folder} holds {what}: name an empty data.root, or delete that folder to have it rendered anew"
        )

    def write(self, world: Any, folder: Path, num_processes: int | None = None) -> None:
        """Render both splits into an existing folder, and MANIFEST last.

        Args:
            world: its parameters.
            folder: exists and is empty.
            num_processes: rendering processes, this one included; None is one for each core that this process may use,
                fewer for a small world.

        Raises:
            OSError: the folder cannot be written.
            DataError: A rendering process died.
        """
        if num_processes is None:
            worth = (world.num_train + world.num_val) // self.per_process
            num_processes = min(len(os.sched_getaffinity(0)), worth, _MOST_PROCESSES)
        for name in self.folders:
            (folder / name).mkdir(parents=True)
        self.finish(world, folder, self._render(world, folder, max(1, num_processes)))
        (folder / MANIFEST).write_text(self.manifest(world), encoding="utf-8")

    def _render(self, world: Any, folder: Path, parts: int) -> list[Any]:
        """Render part 0 in this process, the others each in one of its own, which prints its result as JSON.

        Its own command, not multiprocessing's: the caller may hold threads, which forbids a fork, and a spawned process would run
        the user's script again where that has no main guard.
        """
        job = {"world": asdict(world), "folder": str(folder), "parts": parts}
        children = [_start_process(self.module, {**job, "part": part}) for part in range(1, parts)]
        try:
            results = [self.render_part(world, folder, 0, parts)]
            for child in children:
                output, _ = child.communicate()
                if child.returncode:
                    raise DataError(
                        f"a process that renders the {self.kind} world ended with {child.returncode}; see above"
                    )
                results.append(json.loads(output))
        finally:
            for child in children:
                child.kill()
                child.wait()
                if child.stdout is not None:
                    child.stdout.close()
        return results

    def main(self, make: Callable[..., Any]) -> None:
        """Run one rendering process: its argument is the job, what render_part returns goes to stdout as JSON.

        Args:
            make: the world's dataclass.
        """
        job = json.loads(sys.argv[1])
        # JSON knows no tuples.
        world = {name: tuple(value) if isinstance(value, list) else value for name, value in job["world"].items()}
        found = self.render_part(make(**world), Path(job["folder"]), job["part"], job["parts"])
        json.dump(found, sys.stdout, separators=(",", ":"))


def _start_process(module: str, job: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, json.dumps(job)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
