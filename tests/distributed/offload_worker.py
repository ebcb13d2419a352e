"""A head with weights that are worth offloading: what leaves in a step, and the weights after it, under one kind of engine."""

from __future__ import annotations

import torch
from common import arguments, save_result
from torch import nn

from permafrost.data.types import Batch, SampleKey
from permafrost.launcher.engines.choose import build_engine
from permafrost.launcher.experiment import EngineConfig, OptimizerConfig
from permafrost.launcher.ranks.exit import run_and_leave
from permafrost.launcher.ranks.process_group import join_process_group
from permafrost.launcher.run.offload import ActivationOffload, KeptFeatures


class WideHead(nn.Module):
    """Weights of 64 and 128 KiB, activations of 32 and 64 KiB."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 128)

    def forward(self, features, batch: Batch, counts) -> dict[str, torch.Tensor]:
        return {"loss": torch.tanh(self.second(torch.tanh(self.first(features[0])))).square().mean()}


def step(group, mode: str, engine: EngineConfig) -> dict:
    built = build_engine(
        WideHead(), optimizer=OptimizerConfig(), engine=engine, group=group, global_batch=group.world_size
    )
    built.train()
    offload = ActivationOffload(mode, group.device)
    maps = torch.randn(64, 64, generator=torch.Generator().manual_seed(group.rank))
    batch = Batch(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), [None], [SampleKey(0, 0, 0)])
    with offload.saving(built.head, KeptFeatures((), []), ()):
        loss = built((maps,), batch, lambda name, count: count)["loss"]
    built.backward(loss)
    built.step(1e-3)
    counted = offload.take_statistics()
    return {"weights": built.export_state().parameters, "offloaded": counted.offloaded_bytes, "loss": loss.item()}


def main() -> None:
    args = arguments()
    group = join_process_group("cpu", timeout=120)
    zero3 = EngineConfig(kind="deepspeed", deepspeed_config=args["zero3"])
    result = {"plain": step(group, "off", EngineConfig(kind="accelerate"))}
    result["accelerate"] = step(group, "all", EngineConfig(kind="accelerate"))
    result["zero3"] = step(group, "all", zero3)
    save_result(group, args["result"], result)
    group.close()


if __name__ == "__main__":
    run_and_leave(main)
