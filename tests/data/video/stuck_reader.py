"""Decoders that misbehave: what a damaged file can do to a C library."""

from __future__ import annotations

import os
import signal
import time

from permafrost.data.video.reader import VideoReader, open_video as real


def open_video(path, backend, num_threads) -> VideoReader:
    """Never returns, even when asked to; aborts; overruns; or does its work, by the file's name."""
    if "stuck" in path.name:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)
    if "abort" in path.name:
        os.abort()
    if "exit" in path.name:
        os._exit(3)
    return real(path, backend, num_threads)
