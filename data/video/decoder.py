"""Decode in a process of its own that can be killed: a stuck or crashing decode costs one video, never the run.

Decoders are C libraries fed with damaged files: they loop, abort and overrun. Each data worker owns one decoding process
(`decode_process.py`) and waits for it with a deadline; past it, or when the process dies, it is killed and replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import numpy as np

from permafrost.data.video.errors import VideoError

START_TIMEOUT = 120.0
"""Seconds that a decoding process may take to start: imports from a slow network file system."""
_PIPE_BYTES = 1 << 20


class Decoder:
    """One decoding process, started at first use, and once more in each process that this object is copied into by a fork.

    Args:
        timeout: seconds for one video.
        backend: see `reader.chosen_backend`.
        num_threads: decoding threads.
        reader: "module:function" that opens a video, of `open_video`'s form.
    """

    def __init__(
        self,
        *,
        timeout: float = 20.0,
        backend: str = "auto",
        num_threads: int = 1,
        reader: str = "permafrost.data.video.reader:open_video",
    ) -> None:
        self.timeout = timeout
        self._options = {"backend": backend, "num_threads": num_threads, "reader": reader}
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the process out: a worker that is spawned starts its own."""
        return {**vars(self), "_process": None, "_owner": 0}

    def read(self, path: Path, **sampling: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Read frames of a video.

        Args:
            path: the file.
            sampling: `kind` "dense" or "segment" and the arguments of `sampling.dense_indices` or `segment_indices`
                without the number of frames; or `kind` "frames" and `indices`; or `kind` "all" and `most`.

        Returns:
            (T, H, W, 3) uint8, and `num_frames`, `rate` and `indices` of the file.

        Raises:
            VideoError: it cannot be decoded, took too long, or killed the decoder.
        """
        header, content = self._ask({"job": "read", "path": str(path), **self._options, **sampling})
        return content.reshape(header["shape"]), header

    def resize(self, path: Path, target: Path, short_side: int, timeout: float | None = None) -> dict[str, Any]:
        """Write a copy of a video whose shorter side is `short_side`; see `resize.resize_video`.

        Raises:
            VideoError: as for `read`.
        """
        job = {"job": "resize", "path": str(path), "target": str(target), "short_side": short_side}
        return self._ask(job, timeout)[0]

    def _ask(self, request: dict[str, Any], timeout: float | None = None) -> tuple[dict[str, Any], np.ndarray]:
        process = self._running()
        seconds = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            header = json.loads(self._line(deadline))
            content = np.empty(header.get("size", 0), dtype=np.uint8)
            self._fill(content.data, deadline)
        except TimeoutError:
            self.close()
            raise VideoError(f"decoding was not done after {seconds:g} s (data.decode_timeout) and was ended") from None
        except (OSError, EOFError, ValueError):
            code = self.close()
            what = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
            raise VideoError(f"it killed the process that decoded it ({what})") from None
        except BaseException:
            # Interrupted half way through an answer: the next question would get the rest of it.
            self.close()
            raise
        if "error" in header:
            raise VideoError(header["error"])
        return header, content

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():
            # After a fork the process is the parent's to talk to.
            self._process = None
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._owner = os.getpid()
            # Its own command, not multiprocessing's: data workers are daemons, which may have no such children.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "permafrost.data.video.decode_process", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
            )
            with contextlib.suppress(OSError, AttributeError):
                fcntl.fcntl(self._answers, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            try:
                self._line(time.monotonic() + START_TIMEOUT)
            except (TimeoutError, OSError, EOFError):
                code = self.close()
                raise RuntimeError(
                    f"a decoding process did not start (exit code {code}): see what it printed above"
                ) from None
        return self._process

    @property
    def _answers(self) -> IO[bytes]:
        """The pipe that the process answers through."""
        if self._process is None or self._process.stdout is None:
            raise EOFError
        return self._process.stdout

    def _line(self, deadline: float) -> bytes:
        line = bytearray()
        while not line.endswith(b"\n"):
            self._wait(deadline)
            byte = os.read(self._answers.fileno(), 1)
            if not byte:
                raise EOFError
            line += byte
        return bytes(line)

    def _fill(self, view: memoryview, deadline: float) -> None:
        filled = 0
        while filled < len(view):
            self._wait(deadline)
            count = os.readv(self._answers.fileno(), [view[filled:]])
            if not count:
                raise EOFError
            filled += count

    def _wait(self, deadline: float) -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([self._answers], [], [], remaining)[0]:
            raise TimeoutError

    def close(self) -> int | None:
        """End the process; returns its exit code, negative for a signal of its own."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            # One that died on its own, or waits for a question, ends within this.
            process.wait(0.2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        process.stdout.close()
        return code

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()
