"""Let work outlive whoever reads its output: a reader that goes away, a full disk behind `>`, a descriptor that never was.

`permafrost train ... | head -1` is a training, and ends when it is trained.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, TextIO

QUIET = (None, "help", "-h", "--help", "-V", "--version", "recipes", "plan", "doctor")
"""First arguments of calls that are over once they have printed: a reader who has seen enough needn't be told."""


def keep_working() -> None:
    """Make this process's standard streams such that no failure of theirs reaches the program.

    A stream whose writing fails is pointed at /dev/null, by its descriptor, so that programs started later write there, too. The
    first failure is said on standard error, if that still works.
    """
    # Else the next file that is opened becomes descriptor 1, and whatever is printed goes into it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    is_quiet = (sys.argv[1] if len(sys.argv) > 1 else None) in QUIET
    sys.stdout, sys.stderr = _lasting(sys.stdout, 1, is_quiet), _lasting(sys.stderr, 2, True)


class Lasting(io.RawIOBase):
    """A descriptor to write to that goes on, into nothing, when it fails."""

    def __init__(self, descriptor: int, is_quiet: bool) -> None:
        super().__init__()
        self._descriptor, self._is_quiet = descriptor, is_quiet

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Return True: it takes writes, even those it has to drop."""
        return True

    def write(self, content: Any) -> int:
        """Write bytes, or drop them; wait for a reader that is slow, even where another program has asked not to."""
        while True:
            try:
                return os.write(self._descriptor, content)
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._descriptor)
                os.close(nowhere)
                if not self._is_quiet:
                    reason = "its reader has gone" if error.errno == errno.EPIPE else error.strerror or str(error)
                    text = f"warning: standard output is lost ({reason}): the work goes on without it"
                    print(text, file=sys.stderr, flush=True)


def _lasting(stream: TextIO | None, descriptor: int, is_quiet: bool) -> TextIO:
    if stream is None:
        # The descriptor was closed when Python started.
        return open(descriptor, "w", encoding="utf-8", closefd=False)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    raw = Lasting(descriptor, is_quiet)
    # Unbuffered under PYTHONUNBUFFERED, as it was.
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering, write_through=stream.write_through
    )
