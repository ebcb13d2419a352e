"""The experiment's own arithmetic and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch

from permafrost.data.detection.config import CocoDataConfig
from permafrost.data.video.config import KineticsDataConfig
from permafrost.data.worlds.config import MotionDataConfig, ShapesDataConfig
from permafrost.heads.detection.config import CascadeConfig, HTCConfig, MaskRCNNConfig
from permafrost.heads.segmentation.config import Mask2FormerConfig
from permafrost.heads.video.config import GlobalVideoConfig, LinearVideoConfig, TemporalVideoConfig
from permafrost.launcher.errors import RecipeError
from permafrost.launcher.experiment import (
    EngineConfig,
    Experiment,
    HeadExperiment,
    LoopConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from permafrost.launcher.recipes.overrides import apply_overrides
from permafrost.launcher.recipes.serialise import experiment_from_json, to_json


def torch_rates(
    build: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler], num_steps: int
) -> list[float]:
    """Return what torch's own scheduler makes of a rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = build(optimizer), []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(40, 0), (40, 5), (37, 10)])
def test_multistep_is_the_one_of_torch_after_a_linear_warmup(num_steps: int, warmup_steps: int) -> None:
    config = ScheduleConfig(warmup_steps=warmup_steps, warmup_factor=0.01, milestones=(0.5, 0.9), decay=0.2)
    # A milestone that falls between two steps takes effect at the next one.
    milestones = [math.ceil(0.5 * num_steps), math.ceil(0.9 * num_steps)]
    steps = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones, gamma=0.2), num_steps)
    expected = [0.01 + 0.99 * step / warmup_steps if step < warmup_steps else rate for step, rate in enumerate(steps)]
    assert [config.factor(step, num_steps) for step in range(num_steps)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("final_factor", [0.0, 0.1])
def test_cosine_is_the_one_of_torch_after_a_linear_warmup(final_factor: float) -> None:
    num_steps, warmup_steps = 50, 8
    config = ScheduleConfig(kind="cosine", warmup_steps=warmup_steps, warmup_factor=0.25, final_factor=final_factor)

    def build(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, 1.0, warmup_steps)
        rest = num_steps - warmup_steps
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rest, eta_min=final_factor)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [warmup_steps])

    expected = torch_rates(build, num_steps)
    assert [config.factor(step, num_steps) for step in range(num_steps)] == pytest.approx(expected, rel=1e-9)


def test_constant_stays() -> None:
    config = ScheduleConfig(kind="constant", warmup_steps=2, warmup_factor=0.0)
    assert [config.factor(step, 5) for step in range(5)] == [0.0, 0.5, 1.0, 1.0, 1.0]


def test_the_default_schedule_decays_at_epochs_27_and_33_of_36() -> None:
    config, num_steps = ScheduleConfig(), 36 * 1000
    changes = [s for s in range(500, num_steps) if config.factor(s, num_steps) != config.factor(s - 1, num_steps)]
    assert changes[0] == 500  # the end of the warm-up
    assert changes[1] == 27_000
    assert changes[2] == pytest.approx(33_000, abs=2)
    assert len(changes) == 3
    assert config.factor(num_steps - 1, num_steps) == pytest.approx(0.01)


@pytest.mark.parametrize(("scaling", "expected"), [("linear", 4e-4), ("sqrt", 2e-4), ("none", 1e-4)])
def test_the_rate_belongs_to_a_batch(scaling: str, expected: float) -> None:
    config = OptimizerConfig(learning_rate=1e-4, reference_batch=16, batch_scaling=scaling)
    assert config.scaled_learning_rate(64) == pytest.approx(expected, rel=1e-12)
    assert config.scaled_learning_rate(16) == pytest.approx(1e-4, rel=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimizerConfig(learning_rate=0.0), r"optimizer\.learning_rate is 0\.0"),
        (lambda: OptimizerConfig(reference_batch=0), r"optimizer\.reference_batch is 0"),
        (lambda: OptimizerConfig(clip_norm=0.0), r"optimizer\.clip_norm is 0\.0: use None"),
        (lambda: ScheduleConfig(milestones=(0.9, 0.5)), r"schedule\.milestones"),
        (lambda: ScheduleConfig(milestones=(27.0, 33.0)), r"schedule\.milestones.*between 0 and 1"),
        (lambda: ScheduleConfig(warmup_steps=-1), r"schedule\.warmup_steps is -1"),
        (lambda: ScheduleConfig(decay=10.0), r"schedule\.decay is 10\.0"),
        (lambda: LoopConfig(num_steps=0), r"loop\.num_steps is 0"),
        (lambda: LoopConfig(seed=-1), r"loop\.seed is -1"),
        (lambda: LoopConfig(evaluate_every=0), r"loop\.evaluate_every is 0.*None"),
        (lambda: LoopConfig(process_group_timeout=0), r"loop\.process_group_timeout is 0: .*above 0 seconds"),
        (lambda: LoopConfig(num_workers=-1), r"loop\.num_workers is -1"),
        (lambda: EngineConfig(accumulation=0), r"engine\.accumulation is 0"),
        (lambda: MeshConfig(tensor=0), r"mesh\.tensor is 0"),
    ],
)
def test_impossible_values_name_their_field(build: Callable[[], object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build()


def test_impossible_combinations_name_their_fields(tiny: Callable[..., Experiment]) -> None:
    experiment = tiny(global_batch=6)
    fields = {name: getattr(experiment, name) for name in ("name", "backbone", "data", "heads", "loop")}
    with pytest.raises(RecipeError, match=r"loop\.global_batch 6 does not divide into engine\.accumulation 4"):
        Experiment(**fields, engine=EngineConfig(accumulation=4))
    with pytest.raises(
        RecipeError, match=r"mesh\.tensor is 3: swinv2_nano has 4 and 8 heads .* possible degrees are 1, 2, 4\."
    ):
        Experiment(**fields, mesh=MeshConfig(tensor=3))
    with pytest.raises(RecipeError, match="heads is empty"):
        Experiment(**{**fields, "heads": {}})
    for name in ("my head", "../up", "a/b", ""):
        with pytest.raises(RecipeError, match="not a valid name"):
            Experiment(**{**fields, "heads": {name: fields["heads"]["detection"]}})


def test_a_head_and_data_of_different_tasks_are_refused_by_both_fields(tiny: Callable[..., Experiment]) -> None:
    with pytest.raises(
        RecipeError, match=r"heads\.detection\.model is a MaskRCNNConfig, for detection, but data is a MotionDataConfig"
    ):
        tiny(data=MotionDataConfig())
    with pytest.raises(
        RecipeError, match=r"heads\.pixels\.model is a Mask2FormerConfig, for segmentation, but data is a"
    ):
        tiny(heads={"pixels": HeadExperiment(model=Mask2FormerConfig())})


@pytest.mark.parametrize(
    ("data", "model", "flags", "field", "value"),
    [
        (MotionDataConfig, TemporalVideoConfig, ["--data.clip.num-frames", "4"], "data.clip.num_frames", 4),
        (MotionDataConfig, GlobalVideoConfig, ["--data.world.num-val", "9"], "data.world.num_val", 9),
        (KineticsDataConfig, LinearVideoConfig, ["--data.layout", "csv"], "data.layout", "csv"),
        (KineticsDataConfig, LinearVideoConfig, ["--heads.h.model.dropout", "0.1"], "heads.h.model.dropout", 0.1),
        (MotionDataConfig, TemporalVideoConfig, ["--heads.h.model.num-blocks", "2"], "heads.h.model.num_blocks", 2),
        (CocoDataConfig, CascadeConfig, ["--data.train-share", "0.1"], "data.train_share", 0.1),
        (ShapesDataConfig, HTCConfig, ["--heads.h.model.semantic.level", "2"], "heads.h.model.semantic.level", 2),
        (ShapesDataConfig, MaskRCNNConfig, ["--heads.h.metric", "segm/AP"], "heads.h.metric", "segm/AP"),
    ],
)
def test_the_fields_of_each_task_are_flags_and_survive_the_run_folder(
    tiny: Callable[..., Experiment], data: type, model: type, flags: list[str], field: str, value: object
) -> None:
    changed = apply_overrides(tiny(data=data(), heads={"h": HeadExperiment(model=model())}), flags, prog="permafrost")
    assert type(changed.data) is data
    assert type(changed.heads["h"].model) is model
    found = changed
    for name in field.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value
    assert experiment_from_json(json.loads(json.dumps(to_json(changed)))) == changed
