"""SIGTERM and SIGUSR1, as Slurm, Kubernetes and launchers send them: the ranks agree on a step, save, and end.

The first signal is noted; the loop acts on it, since only there all ranks are at the same place. A second one ends this
process at once. Notes come from a thread, for the main one may be waiting in a collective, where no Python handler runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Final

from permafrost.launcher.exit_codes import of_signal

SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1)

SAME = 2.0
"""Seconds within which a repeated signal is taken for the same one: Slurm signals a launcher and its ranks, and the
launcher passes it on."""


class Interruption:
    """Request to end, which this process may receive as a signal."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal; None before it comes."""
        self._when = 0.0

    def wait(self, seconds: float) -> bool:
        """Return whether a signal has come, or comes within this time: it may reach other processes of a job earlier."""
        limit = time.monotonic() + seconds
        while self.received is None and time.monotonic() < limit:
            time.sleep(0.02)
        return self.received is not None

    @contextlib.contextmanager
    def catch(self) -> Iterator[Interruption]:
        """Note the signals while inside. Python sets handlers in the main thread only: elsewhere nothing changes."""
        global _reading
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        former_handlers = {number: signal.signal(number, _do_nothing) for number in SIGNALS}
        former_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._read, args=(reading,), name="signals", daemon=True)
        thread.start()
        _reading = True
        try:
            yield self
        finally:
            _reading = False
            signal.set_wakeup_fd(former_fd)
            for number, handler in former_handlers.items():
                signal.signal(number, handler)
            # Not by an end of file: data workers hold the pipe open.
            os.write(writing, b"\0")
            thread.join()
            os.close(reading)
            os.close(writing)

    def _read(self, descriptor: int) -> None:
        # Other signals with handlers in Python arrive here too, and a 0 when `catch` is left.
        while True:
            for number in os.read(descriptor, 64):
                if number == 0:
                    return
                if number in SIGNALS:
                    self._note(signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._when = number.name, now
        elif now - self._when > SAME:
            print(f"{number.name} again: ending at once", file=sys.stderr, flush=True)
            os._exit(of_signal(number))


_reading = False


def _do_nothing(number: int, frame: object) -> None:
    """Handle a signal, so that the default action is not taken and the number reaches the wakeup descriptor."""


def _in_child() -> None:
    """Leave the pipe that a data worker shares: what is sent to it must not count as sent to this process."""
    if not _reading:
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Slurm sends it to every process of a job step, of which the ranks alone act.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


os.register_at_fork(after_in_child=_in_child)
