"""20 steps of a float64 Mask R-CNN on a float64 backbone, from images on, in one layout of the ranks this was started on.

Where the first argument is no JSON but --write-golden, the losses of one process are written to golden_losses.json:

    python tests/distributed/equality_worker.py --write-golden
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from common import arguments, save_result
from mask_rcnn_worker import CONFIG, GLOBAL_BATCH, SIDE, image

from permafrost.data.types import Batch, SampleKey
from permafrost.heads.base import world_mean_counts
from permafrost.heads.build import build_head
from permafrost.launcher.engines.base import StepReport, parameter_groups
from permafrost.launcher.engines.choose import build_engine
from permafrost.launcher.experiment import EngineConfig, OptimizerConfig
from permafrost.launcher.ranks.exit import run_and_leave
from permafrost.launcher.ranks.process_group import join_process_group
from permafrost.launcher.run.fine_tune import FineTuned, ImagesOn
from permafrost.model import build_backbone
from permafrost.model.config import BackboneConfig

GOLDEN = Path(__file__).with_name("golden_losses.json")
NUM_STEPS = 20
CLASSES = ("circle", "square", "star")
# Of each step's four images, again and again: one rank without objects, none at all, many.
NUM_BOXES = ((3, 1, 2, 4), (2, 1, 0, 0), (0, 0, 0, 0), (1, 3, 1, 2))


def local_batch(rank: int, world_size: int, step: int) -> Batch:
    """This rank's contiguous share of a step's images: noise, with a patch of another brightness where an object is."""
    size = GLOBAL_BATCH // world_size
    images, targets, keys = [], [], []
    for index in range(rank * size, (rank + 1) * size):
        key = SampleKey(11, step, index)
        _, target = image(step, index, NUM_BOXES[step % len(NUM_BOXES)][index])
        pixels = torch.randint(100, (3, SIDE, SIDE), dtype=torch.uint8, generator=key.generator("pixels"))
        for mask in target.masks:
            pixels[:, mask] += 100
        images.append(pixels.clamp(max=255))
        targets.append(target)
        keys.append(key)
    return Batch(torch.stack(images), targets, keys)


class PlainLoop:
    """The loop that every PyTorch user would write, with an engine's methods: backward, clip, torch's AdamW. No engine is in it."""

    def __init__(self, head: torch.nn.Module, optimizer: OptimizerConfig) -> None:
        self.head, self.clip_norm = head, optimizer.clip_norm
        groups = parameter_groups(head, optimizer)
        self.factors = [group.learning_rate_factor for group in groups]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(group.parameters.values()), "weight_decay": optimizer.weight_decay * group.decayed}
                for group in groups
            ],
            betas=optimizer.betas,
            eps=optimizer.eps,
        )

    def __call__(self, *given) -> dict[str, torch.Tensor]:
        return self.head(*given)

    def train(self) -> None:
        self.head.train()

    def backward(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()

    def step(self, learning_rate: float) -> StepReport:
        norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.clip_norm)
        for group, factor in zip(self.optimizer.param_groups, self.factors):
            group["lr"] = factor * learning_rate
        self.optimizer.step()
        return StepReport(grad_norm=norm.item(), skipped=False)


def run(
    group, *, tensor: int = 1, frozen: bool = True, plain: bool = False, num_steps: int = NUM_STEPS
) -> list[dict[str, float]]:
    """Losses and gradient norm of every step."""
    fields = {} if frozen else {"drop_path_rate": 0.2, "learning_rate_factor": 0.1}
    config = BackboneConfig("swinv2_nano", "random", dtype="float64", frozen=frozen, **fields)
    backbone = build_backbone(config, tensor_group=group.tensor_group(tensor))
    torch.manual_seed(0)
    head = build_head(CONFIG, spec=backbone.spec, classes=list(CLASSES)).double()
    if not frozen:
        head = FineTuned(backbone, head, learning_rate_factor=config.learning_rate_factor)
        backbone = ImagesOn(backbone)
    optimizer = OptimizerConfig(clip_norm=5.0)
    engine = PlainLoop(head, optimizer)
    if not plain:
        engine = build_engine(
            head,
            optimizer=optimizer,
            engine=EngineConfig(kind="accelerate"),
            group=group,
            global_batch=GLOBAL_BATCH,
            environ={},
        )
    engine.train()
    steps = []
    for step in range(num_steps):
        batch = local_batch(group.rank, group.world_size, step)
        losses = engine(backbone(batch.images), batch, world_mean_counts)
        engine.backward(torch.stack(list(losses.values())).sum())
        report = engine.step(1e-3)
        assert not report.skipped
        means = group.all_reduce_mean({name: loss.item() for name, loss in losses.items()})
        steps.append({**means, "grad_norm": report.grad_norm})
    return steps


def main() -> None:
    if "--write-golden" in sys.argv:
        group = join_process_group("cpu")
        content = {
            "command": "python tests/distributed/equality_worker.py --write-golden",
            "torch": torch.__version__,
            **{name: run(group, frozen=name == "frozen") for name in ("frozen", "trained")},
        }
        GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
        return
    options = arguments()
    group = join_process_group("cpu", timeout=180)
    results = {name: run(group, **layout) for name, layout in options["layouts"].items()}
    save_result(group, options["result"], results)
    group.close()


if __name__ == "__main__":
    run_and_leave(main)
