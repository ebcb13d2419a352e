"""One machine's ranks under torchrun's elastic agent, without its tracebacks: what failed has been said by the rank.

    python -m permafrost.launcher.local_ranks --nproc-per-node N ... -m permafrost.launcher.launched WORD
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run what torchrun's arguments say; returns 0, or the exit code of the first rank that failed (1 for a signal)."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(list(argv)))
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
