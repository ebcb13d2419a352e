"""The process that decodes for one data worker: it reads a question per line on stdin and answers with a header line and bytes.

Run by `decoder.Decoder`. No torch in here: it starts in a fraction of a second and takes little memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from permafrost.data.video.errors import VideoError
from permafrost.data.video.resize import resize_video
from permafrost.data.video.sampling import choose_frames

MEMORY_LIMIT = 16 << 30
"""Bytes of address space: a header of a few kilobytes can claim frames of gigabytes."""
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with(int(sys.argv[1]))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    # What decoders print themselves must not get into the answers, nor thousands of lines about a damaged file into the log.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    answers.write(b'{"ready": true}\n')
    os.dup2(nowhere, 2)
    for line in sys.stdin.buffer:
        header, content = _answer(json.loads(line))
        _write(answers, json.dumps({**header, "size": 0 if content is None else content.nbytes}).encode() + b"\n")
        if content is not None:
            _write(answers, np.ascontiguousarray(content).data.cast("B"))


def _die_with(parent: int) -> None:
    """End when the data worker does, however it ends."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _write(stream: BinaryIO, content: bytes | memoryview) -> None:
    view = memoryview(content)
    while len(view):
        view = view[stream.write(view) :]


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    path = Path(request.pop("path"))
    try:
        if request.pop("job") == "resize":
            return resize_video(path, Path(request["target"]), request["short_side"]), None
        module, _, function = request.pop("reader").partition(":")
        open_reader = getattr(importlib.import_module(module), function)
        video = open_reader(path, request.pop("backend"), request.pop("num_threads"))
        try:
            indices = choose_frames(video.num_frames, **request)
            frames = video.frames(indices)
        finally:
            video.close()
    except VideoError as error:
        return {"error": str(error)}, None
    except MemoryError:
        return {"error": "its frames take more memory than there is"}, None
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".split("\n")[0]}, None
    facts = {"num_frames": video.num_frames, "rate": video.rate, "indices": np.asarray(indices).tolist()}
    return {"shape": frames.shape, **facts}, frames


if __name__ == "__main__":
    main()
