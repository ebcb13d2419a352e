"""Rank 0 of two: gathers, and is told; the other rank may be anybody."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist

from permafrost.launcher.ranks.process_group import join_process_group


class Payload:
    """Code that a stranger would have rank 0 run."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path(os.environ["PAYLOAD"]),))


def main() -> None:
    if os.environ["RANK"] == "1":
        dist.init_process_group(
            "gloo", rank=1, world_size=2, store=dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 2)
        )
        dist.new_group(backend="gloo")
        dist.gather_object(Payload(), None, dst=0)
        return
    group = join_process_group("cpu", timeout=20)
    print("listening", flush=True)
    try:
        print("gathered", group.gather_objects("mine"), flush=True)
    except Exception as error:
        print(f"refused: {type(error).__name__}: {error}", flush=True)
        os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
