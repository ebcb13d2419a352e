"""Watch over the other ranks while one trains: it beats, and when it waits in vain it says for whom."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from permafrost.launcher.errors import Interrupted, RankLost
from permafrost.launcher.exit_codes import FAILED
from permafrost.launcher.ranks.heartbeat import ENDS, Culprit, Heartbeat, Watch, find_culprits, kill_culprits

if TYPE_CHECKING:
    from pathlib import Path

    from permafrost.launcher.ranks.process_group import ProcessGroup

OF_COMMUNICATION = re.compile(
    r"gloo|nccl|c10d|process ?group|tcpstore|connection (closed|reset|refused)|broken pipe", re.IGNORECASE
)
"""What an error's text holds when another rank could not be reached; torch raises bare RuntimeErrors."""

OF_TIME = re.compile(r"time[d ]*out", re.IGNORECASE)

GRACE = 3.0
"""Seconds beyond the timeout that a rank without a sign of life is given, so that an exception comes first."""

UNHURRIED = ("start", "checkpoint", "evaluate")
"""Phases in which one rank may legitimately keep the others waiting for long."""


@contextmanager
def among_ranks(group: ProcessGroup, folder: Path, timeout: float) -> Iterator[Heartbeat]:
    """Beat while inside, and turn what is another rank's fault into an error that names it.

    Args:
        group: this process among the others.
        folder: heartbeats/ of the run folder.
        timeout: seconds after which the process group gives up; at half of it the rank that is waited for is named.

    Raises:
        RankLost: another rank died, or did not answer within the process group's timeout. It is killed where it is
            a stopped or stuck process of this machine, since a launcher's SIGTERM would not end it.

    A rank that has shown no sign of life for that long ends this process even where no exception can, because it is
    computing by itself or waits for what may take its time.
    """
    heartbeat, watch = Heartbeat(folder, rank=group.rank, world_size=group.world_size), Watch(folder)
    if group.world_size > 1:
        heartbeat.notice(timeout / 2, lambda: _name_early(group, heartbeat, watch, timeout))
        heartbeat.at_each_beat(lambda: _leave_the_lifeless(group, heartbeat, watch, timeout))
        group.watched = True
    try:
        yield heartbeat
    except Interrupted as error:
        heartbeat.close("done", str(error))
        raise
    except BaseException as error:
        if group.world_size == 1 or not (isinstance(error, RuntimeError) and OF_COMMUNICATION.search(str(error))):
            heartbeat.close("failed", f"{type(error).__name__}: {error}".partition("\n")[0])
            raise
        text = _explain(group, heartbeat, watch, error)
        heartbeat.close("lost", text)
        group.abandon()
        raise RankLost(text) from error
    heartbeat.close()


def _explain(group: ProcessGroup, heartbeat: Heartbeat, watch: Watch, error: BaseException) -> str:
    beat = heartbeat.beat
    reason = str(error).partition("\n")[0].rpartition("] ")[2] or str(error)
    where = f"rank {group.rank} of {group.world_size}, in phase {beat.phase} of step {beat.step}"
    waited_in_vain = bool(OF_TIME.search(reason))
    culprits = find_culprits(watch.beats(), group.world_size, exclude=group.rank)
    limit = time.monotonic() + GRACE
    while not waited_in_vain and all(culprit.is_guess for culprit in culprits) and time.monotonic() < limit:
        # A process loses its connections a moment before it is gone, and before it has said why.
        time.sleep(0.05)
        culprits = find_culprits(watch.beats(), group.world_size, exclude=group.rank)
    while (
        any(c.beat and c.beat.phase == "failed" and c.beat.is_running_here for c in culprits)
        and time.monotonic() < limit
    ):
        # Its traceback comes first.
        time.sleep(0.05)
    if not culprits:
        return f"{where}, lost the other ranks: {reason}"
    text = f"{where}, {'waited in vain' if waited_in_vain else 'lost its connection'} ({reason}). "
    text += "; ".join(map(str, culprits))
    if waited_in_vain:
        killed = kill_culprits([c for c in culprits if c.beat is not None and c.beat.phase not in ENDS])
        text += "".join(f". {culprit.beat.describe()} was killed" for culprit in killed if culprit.beat)
    return text


def _leave_the_lifeless(group: ProcessGroup, heartbeat: Heartbeat, watch: Watch, timeout: float) -> None:
    """End this process, from the thread of the heartbeat, when another one has shown no sign of life for too long."""
    seen = watch.poll()
    lifeless = [
        Culprit(
            rank,
            beat,
            f"has given no sign of life for {silence:.0f} s; last heard in phase {beat.phase} of step {beat.step}",
        )
        for rank, (beat, silence) in seen.items()
        # A rank in a collective finds out by itself at the timeout, and can say more.
        if rank != group.rank and not beat.has_ended and silence > timeout + GRACE
    ]
    own = heartbeat.beat
    if not lifeless and 0 not in seen and own.phase in UNHURRIED and time.time() - own.since > timeout + GRACE:
        lifeless = [
            Culprit(0, None, f"has given no sign of life at all: is {heartbeat.folder} the same folder on all nodes?")
        ]
    if not lifeless:
        return
    text = f"rank {group.rank} of {group.world_size}, in phase {own.phase} of step {own.step}, gives up. "
    text += "; ".join(map(str, find_culprits(watch.beats(), group.world_size, exclude=group.rank) or lifeless))
    text += "".join(f". {c.beat.describe()} was killed" for c in kill_culprits(lifeless) if c.beat)
    heartbeat.close("lost", text)
    print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(FAILED)


def _name_early(group: ProcessGroup, heartbeat: Heartbeat, watch: Watch, timeout: float) -> None:
    """Let one rank say, half way to the timeout, who is waited for: where NCCL ends a process, nothing can be said later."""
    beat = heartbeat.beat
    if beat.phase in UNHURRIED:
        return
    culprits = find_culprits(watch.beats(), group.world_size, exclude=group.rank)
    named = {culprit.rank for culprit in culprits}
    speaker = min(set(range(group.world_size)) - named, default=0)
    if culprits and group.rank == speaker:
        print(
            f"warning: rank {group.rank} has been in phase {beat.phase} of step {beat.step} for {timeout / 2:.0f} s. "
            f"{'; '.join(map(str, culprits))}. The process group gives up after {timeout:g} s "
            "(loop.process_group_timeout)",
            file=sys.stderr,
            flush=True,
        )
