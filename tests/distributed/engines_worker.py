"""Everything the engines must do alike, on however many ranks this was started: one launch, one result.

The float64 head runs under Accelerate only: DeepSpeed's masters are float32.
"""

from __future__ import annotations

import torch
from common import GLOBAL_BATCH, SmoothHead, arguments, micro_batches, save_result, train_step

from permafrost.launcher.engines.base import Engine
from permafrost.launcher.engines.choose import build_engine
from permafrost.launcher.experiment import EngineConfig, OptimizerConfig
from permafrost.launcher.ranks.exit import run_and_leave
from permafrost.launcher.ranks.process_group import join_process_group

KINDS = ("accelerate", "zero1", "zero2", "zero3")
NUM_STEPS = 20
MIDDLE = 10


def build(group, kind: str, *, seed: int = 0, double: bool = False, clip_norm=None, **engine) -> Engine:
    """An engine of one kind around a new head."""
    head = SmoothHead(seed)
    if kind != "accelerate":
        engine.update(kind="deepspeed")
        engine.setdefault("deepspeed_config", kind)
    built = build_engine(
        head.double() if double else head,
        optimizer=OptimizerConfig(clip_norm=clip_norm),
        engine=EngineConfig(**engine),
        group=group,
        global_batch=GLOBAL_BATCH,
    )
    if kind == "accelerate":
        # Whatever variables are set, by a launcher or by DeepSpeed: a world of one has no DDP.
        assert isinstance(built._model, torch.nn.parallel.DistributedDataParallel) == (group.world_size > 1)
    built.train()
    return built


def run(engine, group, first: int, last: int, accumulation: int = 1) -> list[dict]:
    """Losses and gradient norms of some steps."""
    steps = []
    for step in range(first, last):
        losses, report = train_step(engine, group, step, accumulation)
        assert not report.skipped
        steps.append({**losses, "grad_norm": report.grad_norm})
    return steps


def whole_run(group, kind: str, double: bool = False) -> dict:
    """20 steps, with the state at the start, after the first and in the middle."""
    engine = build(group, kind, double=double)
    result = {"name": engine.name, "start": engine.export_state()}
    result["steps"] = run(engine, group, 0, 1)
    result["first"] = engine.export_state()
    result["steps"] += run(engine, group, 1, MIDDLE)
    result["middle"] = engine.export_state()
    result["steps"] += run(engine, group, MIDDLE, NUM_STEPS)
    result["end"] = engine.export_state()
    return result


def continuations(group, sources: dict) -> dict:
    """Every source's middle state, continued by every kind of engine: {(source, kind): steps}."""
    results = {}
    for kind in KINDS:
        # The same engine takes one state after the other: the first into a fresh one, the others over what it did.
        engine = build(group, kind, seed=7)
        for source, state in sources.items():
            engine.import_state(state)
            results[source, kind] = {"imported": engine.export_state(), "steps": run(engine, group, MIDDLE, NUM_STEPS)}
    return results


def evaluate(engine, group) -> torch.Tensor:
    """This rank's results of step 99, which no training step uses, in rank order: (GLOBAL_BATCH, 3)."""
    engine.train(False)
    ((features, batch, counts),) = micro_batches(99, group.rank, group.world_size, 1)
    rows = engine(features, batch, counts)
    engine.train()
    assert all(not row.requires_grad for row in rows)
    gathered = group.gather_objects([row.cpu() for row in rows])
    return torch.stack([row for part in gathered for row in part]) if group.is_main else torch.empty(0)


def skipping(group, kind: str, **engine) -> dict:
    """Skips of every sort between steps leave no trace: the steps around them, and the states before and after."""
    built = build(group, kind, accumulation=2, **engine)
    steps = run(built, group, 0, 2, accumulation=2)
    before = built.export_state()
    micro = list(micro_batches(50, group.rank, group.world_size, 2))
    built.skip_step()
    built(*micro[0])
    built.skip_step()
    for num_backward in (1, 2):
        for part in micro[:num_backward]:
            built.backward(sum(built(*part).values()))
        built.skip_step()
    for part in micro:
        built.backward(sum(built(*part).values()) * float("nan"))
    built.skip_step()
    reports = []
    for bad in (float("nan"), float("inf")):
        # One rank's last micro-batch is enough.
        for index, part in enumerate(micro):
            loss = sum(built(*part).values())
            built.backward(loss * bad if index and group.rank == group.world_size - 1 else loss)
        reports.append(built.step(0.1))
    # Right before a real step: an unfinished one must not be added to it.
    built.backward(sum(built(*micro[0]).values()))
    built.skip_step()
    after = built.export_state()
    after.buffers = before.buffers  # counts forwards, which were made
    return {
        "steps": steps + run(built, group, 2, 4, accumulation=2),
        "before": before,
        "after": after,
        "reports": reports,
    }


def side_by_side(group, kind: str) -> dict:
    """Two engines in one process, step by step in turn: {seed: steps}."""
    engines = {seed: build(group, kind, seed=seed) for seed in (1, 2)}
    steps = {seed: [] for seed in engines}
    for step in range(3):
        for seed, engine in engines.items():
            steps[seed] += run(engine, group, step, step + 1)
    alone = {seed: run(build(group, kind, seed=seed), group, 0, 3) for seed in engines}
    return {"together": steps, "alone": alone}


def evaluating(group, kind: str) -> dict:
    """Evaluation between steps: its results, and that training does not notice."""
    engine = build(group, kind)
    steps = run(engine, group, 0, 2)
    results = evaluate(engine, group)
    return {"steps": steps + run(engine, group, 2, 4), "results": results}


def counting(group, kind: str) -> dict:
    """Every micro-batch goes forward without gradients before the step, as in a loop that counts first."""
    engine = build(group, kind, accumulation=2)
    steps = []
    for step in range(4):
        with torch.no_grad():
            for features, batch, counts in micro_batches(step, group.rank, group.world_size, 2):
                engine(features, batch, counts)
        steps += run(engine, group, step, step + 1, accumulation=2)
    return steps


def bfloat16(group, kind: str) -> dict:
    """Autocast: the steps, and what the parameters and the state are kept in."""
    engine = build(group, kind, precision="bfloat16")
    steps = run(engine, group, 0, 5)
    dtypes = {p.dtype for p in engine.head.parameters()} | {p.dtype for p in engine.export_state().parameters.values()}
    return {"steps": steps, "dtypes": dtypes, "results": evaluate(engine, group)}


def offloading(group, folder: str) -> dict:
    """The optimizer on the CPU by the JSON's wish: whole steps, and a state in and out, for stages 1 to 3."""
    results = {}
    for stage in (1, 2, 3):
        engine = build(group, f"zero{stage}", deepspeed_config=f"{folder}/offload{stage}.json")
        steps = run(engine, group, 0, 2)
        state = engine.export_state()
        other = build(group, f"zero{stage}", seed=5, deepspeed_config=f"{folder}/offload{stage}.json")
        other.import_state(state)
        results[stage] = {"name": engine.name, "steps": steps + run(other, group, 2, 4)}
        results[stage]["skipping"] = skipping(group, f"zero{stage}", deepspeed_config=f"{folder}/offload{stage}.json")
    return results


def mesh(group) -> dict:
    """Find what ranks tell each other."""
    try:
        group.all_reduce_mean({f"name{group.rank}": 1.0})
        disagreement = None
    except RuntimeError as error:
        disagreement = str(error)
    return {
        "mean": group.all_reduce_mean({"b": float(group.rank), "a": 1e-9 + group.rank * 1e9}),
        "any": [group.any_true(group.rank == 1), group.any_true(False)],
        "gathered": group.gather_objects({"rank": group.rank}),
        "broadcast": group.broadcast_object(f"from {group.rank}"),
        "describe": group.describe(),
        "disagreement": disagreement,
    }


def main() -> None:
    args = arguments()
    group = join_process_group("cpu", timeout=180)
    result = {"world_size": group.world_size, "mesh": mesh(group)}
    sources = torch.load(args["sources"], weights_only=False) if "sources" in args else {}
    if "only_continue" not in args:
        result["runs"] = {kind: whole_run(group, kind) for kind in KINDS}
        result["float64"] = whole_run(group, "accelerate", double=True)
        sources |= {(group.world_size, kind): run["middle"] for kind, run in result["runs"].items()}
        result["accumulated"] = {kind: run(build(group, kind, accumulation=2), group, 0, 4, 2) for kind in KINDS}
        result["clipped"] = {kind: run(build(group, kind, clip_norm=0.05), group, 0, 4) for kind in KINDS}
        result["skipping"] = {kind: skipping(group, kind) for kind in KINDS}
        result["side_by_side"] = {kind: side_by_side(group, kind) for kind in KINDS}
        result["evaluating"] = {kind: evaluating(group, kind) for kind in KINDS}
        result["counting"] = {kind: counting(group, kind) for kind in KINDS}
        result["offloading"] = offloading(group, args["folder"])
        result["bfloat16"] = {kind: bfloat16(group, kind) for kind in KINDS}
    result["continued"] = continuations(group, sources)
    if group.world_size == 1:
        # A second run in the same process.
        group.close()
        group = join_process_group("cpu", timeout=180)
        result["reopened"] = {kind: run(build(group, kind), group, 0, 4) for kind in KINDS}
    save_result(group, args["result"], result)
    group.close()


if __name__ == "__main__":
    run_and_leave(main)
