"""Fetch files once into the cache folder: resumed where they broke off, by one process while the others wait.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from permafrost.model.errors import WeightsError

OFFLINE_VARIABLES = ("PERMAFROST_OFFLINE", "HF_HUB_OFFLINE")
NUM_ATTEMPTS = 5
"""Attempts in a row that may bring nothing new."""
RETRY_SECONDS = 1.0
"""Wait before the second attempt; doubled for each further one."""
TIMEOUT_SECONDS = 60
_CHUNK = 1 << 20


def weights_folder() -> Path:
    """Return `weights` in the cache folder: $PERMAFROST_CACHE, or ~/.cache/permafrost."""
    given = os.environ.get("PERMAFROST_CACHE")
    return (Path(given).expanduser() if given else Path.home() / ".cache" / "permafrost") / "weights"


def fetch(url: str, *, file: str, sha256: str | None = None) -> Path:
    """Download a file unless it is there already.

    Args:
        url: where it is.
        file: its name in the weights folder.
        sha256: its checksum, if known.

    Returns:
        The file, complete.

    Raises:
        WeightsError: if it cannot be had, or the environment forbids to download; says where it can be put by hand.
    """
    target = weights_folder() / file
    if target.is_file():
        return target
    by_hand = f"Or fetch {url} elsewhere and put it at {target}."
    forbidding = [name for name in OFFLINE_VARIABLES if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")]
    if forbidding:
        raise WeightsError(
            f"{file} is not at hand and {forbidding[0]} forbids to download it. Fetch {url} where there is a network, "
            f"and put it at {target}."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            if not target.is_file():
                _download(url, target, sha256, by_hand)
    except OSError as error:
        raise WeightsError(
            f"{target} cannot be written ({error}); set PERMAFROST_CACHE to a folder with room. {by_hand}"
        ) from error
    return target


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Keep other processes from downloading the same file; the lock ends with the process."""
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that downloads {target.name}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Broken(Exception):
    """A connection that was not made or broke off; another attempt may do better."""


def _download(url: str, target: Path, sha256: str | None, by_hand: str) -> None:
    partial, validator = target.with_name(target.name + ".partial"), target.with_name(target.name + ".etag")
    print(f"downloading {url} to {target.parent}", file=sys.stderr, flush=True)
    failures = 0
    while True:
        before = partial.stat().st_size if partial.is_file() else 0
        try:
            total = _attempt(url, partial, validator, by_hand)
        except _Broken as error:
            size = partial.stat().st_size if partial.is_file() else 0
            failures = 1 if size > before else failures + 1
            if failures >= NUM_ATTEMPTS:
                raise WeightsError(
                    f"Downloading {url} broke off after {size:,} bytes ({error}); the same command continues there. "
                    f"{by_hand}"
                ) from error
            time.sleep(RETRY_SECONDS * 2 ** (failures - 1))
            continue
        break
    validator.unlink(missing_ok=True)
    if sha256 is not None:
        with partial.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            partial.unlink()
            raise WeightsError(
                f"{url} gave a file of {total:,} bytes with SHA-256 {found}, expected {sha256}: it was damaged on the "
                f"way or replaced. {by_hand}"
            )
    partial.replace(target)
    print(f"downloaded {total:,} bytes", file=sys.stderr, flush=True)


def _attempt(url: str, partial: Path, validator: Path, by_hand: str) -> int:
    """Make one request, from where the last one broke off if the file on the server is still the same.

    Returns:
        Size of the complete file.
    """
    have = partial.stat().st_size if partial.is_file() and validator.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "permafrost"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", validator.read_text())
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            validator.unlink()
            raise _Broken("what was there is not part of the file") from error
        if error.code >= 500 or error.code in (408, 429):
            raise _Broken(f"the server answered {error.code} {error.reason}") from error
        raise WeightsError(f"{url}: the server answered {error.code} {error.reason}. {by_hand}") from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", None), socket.gaierror):
            raise WeightsError(f"{url} cannot be reached ({error}); is there a network? {by_hand}") from error
        raise _Broken(str(error) or type(error).__name__) from error
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            validator.unlink()
            raise _Broken(f"the server sent {response.headers.get('Content-Range')!r} instead of what follows")
        length = response.headers.get("Content-Length")
        have = have if resumed else 0
        total = None if length is None else have + int(length)
        if total is not None and shutil.disk_usage(partial.parent).free < total - have:
            raise WeightsError(
                f"{url} has {total:,} bytes, more than is free in {partial.parent}; set PERMAFROST_CACHE to a folder "
                f"with room. {by_hand}"
            )
        etag = response.headers.get("ETag", "")
        if etag and not etag.startswith("W/"):
            validator.write_text(etag)
        else:
            validator.unlink(missing_ok=True)
        # The name is fixed, for the next try goes on with what is there; what a link points to is not written over.
        with open(partial, "ab" if resumed else "wb", opener=_without_links) as file:
            for chunk in _chunks(response):
                if not file.tell() and chunk.lstrip()[:1] == b"<":
                    raise WeightsError(f"{url} was answered with a web page instead of the file. {by_hand}")
                file.write(chunk)
            size = file.tell()
    if total is not None and size != total:
        raise _Broken(f"{size:,} of {total:,} bytes came")
    return size


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _Broken(str(error) or type(error).__name__) from error
        if not chunk:
            return
        yield chunk


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
