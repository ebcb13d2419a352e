"""Replace files and folders whole: whoever reads them, whenever a process is killed, finds the old or the new content."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, folder: bool = False, durable: bool = False) -> Iterator[Path]:
    """Give an empty file or folder beside `path` to write, and put it in the place of `path` when the block ends.

    Its name is new, so nothing that somebody else made is written to, followed or removed: neither a file or folder of a likely
    name nor what a link points to. A process that is killed meanwhile leaves it behind, as .NAME.<12 hex digits>.partial.

    Args:
        path: what is replaced; a folder must be absent or empty.
        folder: whether a folder is to be written, in place of a file.
        durable: hold this through a power failure, too, at the price of waiting for the disk.

    Raises:
        OSError: the disk is full or gone. `path` is as it was.
    """
    partial = new_beside(path, "partial", folder=folder)
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    except BaseException:
        if folder:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def new_beside(path: Path, ending: str, *, folder: bool = False) -> Path:
    """Make an empty file or folder beside `path`, with the permissions that this process gives its files; return its path."""
    while True:
        made = path.with_name(f".{path.name}.{secrets.token_hex(6)}.{ending}")
        with contextlib.suppress(FileExistsError):
            if folder:
                made.mkdir()
            else:
                os.close(os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return made


def sync(path: Path) -> None:
    """Make a file's content, or the names inside a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
