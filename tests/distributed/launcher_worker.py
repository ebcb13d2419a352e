"""Two steps of a small head under whatever launcher started this; the recipe leaves the engine open."""

from __future__ import annotations

import os

from common import GLOBAL_BATCH, SmoothHead, arguments, save_result, train_step

from permafrost.launcher.engines.choose import build_engine, choose_engine
from permafrost.launcher.experiment import EngineConfig, OptimizerConfig
from permafrost.launcher.ranks.exit import run_and_leave
from permafrost.launcher.ranks.process_group import join_process_group


def main() -> None:
    args = arguments()
    group = join_process_group(timeout=180)
    config = EngineConfig(**args.get("engine", {}))
    kind, reason = choose_engine(config)
    engine = build_engine(
        SmoothHead(), optimizer=OptimizerConfig(), engine=config, group=group, global_batch=GLOBAL_BATCH
    )
    engine.train()
    steps = []
    for step in range(2):
        losses, report = train_step(engine, group, step, 1)
        steps.append({**losses, "grad_norm": report.grad_norm})
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    ranks = group.gather_objects({name: os.environ.get(name) for name in names})
    result = {"kind": kind, "reason": reason, "engine": engine.name, "steps": steps, "ranks": ranks}
    save_result(group, args["result"], {**result, "world": group.describe()})
    group.close()


if __name__ == "__main__":
    run_and_leave(main)
