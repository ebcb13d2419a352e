"""Rank 1 stays away from a collective of a group that a library made with torch's own time limit."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from common import arguments

from permafrost.launcher.ranks.exit import run_and_leave
from permafrost.launcher.ranks.process_group import join_process_group


def main() -> None:
    group = join_process_group("cpu")
    library_group = dist.new_group([0, 1])
    group.limit_collectives(arguments()["limit"])
    if group.is_main:
        start = time.monotonic()
        try:
            dist.all_reduce(torch.ones(1), group=library_group)
            error = None
        except RuntimeError as raised:
            error = str(raised)
        # Not by save_result, which ends with a collective that nobody would join.
        torch.save({"seconds": time.monotonic() - start, "error": error}, arguments()["result"])
    else:
        # Longer than the limit, so that the connection is there while rank 0 waits.
        time.sleep(arguments()["limit"] + 3)


if __name__ == "__main__":
    run_and_leave(main)
