"""The exit codes with which the `permafrost` command, every rank and what launches them end.

`doctor` ends with FAILED where a machine is found wanting, `plan` where no layout fits, `predict` where some of its inputs could
not be read. `launch` ends with DONE when every rank did and the run folder has its final.json; with FAILED or SAVED where
ranks did; with USAGE_ERROR when nothing was started, or the ranks said so; with LOST; with `of_signal` when it was sent a signal
and the ranks left no code of their own.
"""

from __future__ import annotations

import signal

DONE = 0

FAILED = 1
"""The work itself failed: a head was stopped by losses that are not finite, another rank was lost, a program broke."""

USAGE_ERROR = 2
"""A mistake in the command, the recipe or the input files, printed as `error: ...`."""

LOST = 3
"""Of `launch`: a rank, a node or the network was lost."""

SAVED = 75
"""A training that SIGTERM or SIGUSR1 ended, saved, to be continued by the same command (EX_TEMPFAIL of sysexits.h)."""


def of_signal(number: int) -> int:
    """Return what a shell says of a program that a signal ended."""
    return 128 + number


INTERRUPTED = of_signal(signal.SIGINT)
