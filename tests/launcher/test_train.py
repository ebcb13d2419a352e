"""The loop: determinism, resuming, several heads, accumulation, the frozen backbone, faults.

Small real runs, each well under a second.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import permafrost.launcher.run.checkpoint
import permafrost.launcher.run.parts
import permafrost.launcher.run.session
import permafrost.launcher.train as loop
from permafrost.data.build import located
from permafrost.data.detection.config import CocoDataConfig
from permafrost.data.detection.types import DetectionResult
from permafrost.data.errors import DataError
from permafrost.data.stream.sampler import GlobalStream
from permafrost.heads.base import Head, world_mean_counts
from permafrost.heads.detection.config import MaskRCNNConfig
from permafrost.launcher.engines.base import Engine, HeadState
from permafrost.launcher.errors import CheckpointError, RecipeError, RunFolderError, TrainingStopped
from permafrost.launcher.experiment import EngineConfig, Experiment, HeadExperiment
from permafrost.launcher.files import read_json_lines
from permafrost.launcher.run.parts import TrainingParts
from permafrost.launcher.train import train
from permafrost.model import FrozenBackbone, TrainableBackbone
from permafrost.model.config import BackboneConfig

LOSSES = ("loss", "loss_rpn_objectness", "loss_rpn_box", "loss_classifier", "loss_box", "loss_mask", "grad_norm")
NUM_TRAIN = 12


class Killed(BaseException):
    """Ends a run the way a signal would: nothing catches it."""


@dataclass
class ProbeConfig(MaskRCNNConfig):
    """A head of one convolution and a batch norm whose loss is NaN for chosen samples."""

    bad: tuple[tuple[int, int], ...] = ()
    """(epoch, index) of samples."""

    def build(self, *, spec, classes) -> ProbeHead:
        return ProbeHead(spec.channels[-1], self.bad)


class ProbeHead(Head):
    def __init__(self, channels: int, bad: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.bad = bad

    def forward(self, features, batch, counts=world_mean_counts) -> dict[str, Tensor] | list[DetectionResult]:
        if not self.training:
            empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
            masks = torch.zeros(0, 4, 4)
            return [
                DetectionResult(t.image_id, **empty, masks=masks, size=t.size, original_size=t.original_size)
                for t in batch.targets
            ]
        output = self.norm(self.conv(features[-1].float()))
        wanted = torch.tensor([float(len(target.boxes)) for target in batch.targets])
        loss = ((output.mean((1, 2, 3)) - wanted) ** 2).sum() / counts("objects", wanted.sum())
        if any((key.epoch, key.index) in self.bad for key in batch.keys):
            loss = loss * math.nan
        return {"loss_probe": loss}


def metrics(run: str | Path) -> list[dict]:
    return [line for line in read_json_lines(Path(run) / "metrics.jsonl") if "data/epoch" in line]


def losses(run: str | Path, head: str = "detection") -> list[tuple]:
    return [(line["step"], *(line[f"{head}/{name}"] for name in LOSSES)) for line in metrics(run)]


def tensors(run: str | Path, step: int, head: str = "detection") -> dict[str, Tensor]:
    """Everything that was saved of a head: weights and both moments."""
    folder = Path(run) / "checkpoints" / f"step_{step:08d}" / head
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(folder.iterdir())
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len(found) > 20
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


def train_killed(monkeypatch: pytest.MonkeyPatch, experiment: Experiment, num_steps: int) -> None:
    """Train; the run dies after `num_steps` steps of its own, before anything is saved of the last."""
    original, calls = loop.track_replaced, []

    def counted(*arguments: object) -> None:
        original(*arguments)
        calls.append(None)
        if len(calls) == num_steps:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "track_replaced", counted)
        with pytest.raises(Killed):
            train(experiment)


def keys_of_steps(steps: list[int], global_batch: int = 2, seed: int = 0) -> list[tuple[int, int]]:
    """(epoch, index) of the first sample of some steps (0-based)."""
    stream = GlobalStream(NUM_TRAIN, seed)
    return [(key.epoch, key.index) for key in (stream.key(step * global_batch) for step in steps)]


# Two workers on a machine with one core are slow, not wrong.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_seed_decides_everything_whatever_the_number_of_workers(tiny: Callable[..., Experiment]) -> None:
    first, second, other = tiny("a"), tiny("b", num_workers=2), tiny("c", seed=1)
    result = train(first)
    assert train(second) == result
    train(other)
    assert losses(first.output) == losses(second.output)
    assert [line[0] for line in losses(first.output)] == list(range(1, 9))
    assert_same_bits(tensors(second.output, 8), tensors(first.output, 8))
    assert losses(other.output) != losses(first.output)


@pytest.mark.parametrize(
    ("num_done", "resumed_from"),
    [
        pytest.param([5], 4, id="right after a checkpoint within the first epoch"),
        pytest.param([7], 6, id="after a checkpoint at the end of the first epoch"),
        pytest.param([9], 8, id="within the second epoch and a log window"),
        pytest.param([3, 3], 4, id="twice within one epoch"),
        pytest.param([1], 0, id="before the first checkpoint"),
    ],
)
def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    tiny: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch, num_done: list[int], resumed_from: int
) -> None:
    fields = {"num_steps": 11, "checkpoint_every": 2, "log_every": 3, "evaluate_every": 4, "keep_checkpoints": 9}
    whole, stopped = tiny("whole", **fields), tiny("stopped", **fields)
    expected = train(whole)
    for number in num_done:
        train_killed(monkeypatch, stopped, number)
    assert train(stopped) == expected
    assert losses(stopped.output) == losses(whole.output)
    assert_same_bits(tensors(stopped.output, 11), tensors(whole.output, 11))
    starts = read_json_lines(Path(stopped.output) / "provenance.jsonl")
    assert [start["start_step"] for start in starts][-1] == resumed_from
    for file in ("evaluations.jsonl", "best"):
        assert (Path(stopped.output) / file).read_text() == (Path(whole.output) / file).read_text()


def test_a_run_killed_by_a_signal_resumes_bitwise(tiny: Callable[..., Experiment], tmp_path: Path) -> None:
    fields = {"num_steps": 60, "checkpoint_every": 5, "log_every": 7, "num_workers": 1}
    whole, killed = tiny("whole", **fields), tiny("killed", **fields)
    train(whole)
    script = (
        "import sys, json\n"
        "from permafrost.launcher.recipes.serialise import experiment_from_json\n"
        "from permafrost.launcher.train import train\n"
        "train(experiment_from_json(json.load(open(sys.argv[1]))['experiment']))\n"
    )
    recipe = json.loads((Path(whole.output) / "recipe.json").read_text())
    recipe["experiment"]["output"] = killed.output
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "recipe.json")], stdout=subprocess.DEVNULL)
    latest = Path(killed.output) / "latest"
    limit = time.monotonic() + 120
    while not latest.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 5 <= int(latest.read_text()[5:]) < 60
    train(killed, resume="must")
    assert_same_bits(tensors(killed.output, 60), tensors(whole.output, 60))
    assert losses(killed.output) == losses(whole.output)


def test_heads_beside_one_another_train_as_each_alone(
    tiny: Callable[..., Experiment], make_head: Callable[..., HeadExperiment]
) -> None:
    heads = {"small": make_head(), "quick": make_head(learning_rate=5e-3), "probe": make_head(ProbeConfig())}
    both = tiny("both", heads=heads)
    train(both)
    for name, head in heads.items():
        alone = tiny(name, heads={name: head})
        train(alone)
        assert tensors(both.output, 8, name).keys() == tensors(alone.output, 8, name).keys()
        for key, tensor in tensors(alone.output, 8, name).items():
            assert torch.equal(tensors(both.output, 8, name)[key], tensor), key
        tag = f"{name}/loss"
        assert [line[tag] for line in metrics(both.output)] == [line[tag] for line in metrics(alone.output)]
    assert not torch.equal(
        tensors(both.output, 8, "small")["head/neck.output.0.weight"],
        tensors(both.output, 8, "quick")["head/neck.output.0.weight"],
    )


def gradients_of_first_step(experiment: Experiment) -> dict[str, Tensor]:
    """Adam's first moment after one step is (1 - beta1) times the gradient."""
    train(experiment)
    return {name: tensor for name, tensor in tensors(experiment.output, 1).items() if "/exp_avg." in name}


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    norm = math.sqrt(sum(tensor.double().square().sum().item() for tensor in expected.values()))
    return math.sqrt(sum((found[n].double() - expected[n].double()).square().sum().item() for n in expected)) / norm


def test_micro_batches_give_the_gradient_of_the_whole_batch(
    tiny: Callable[..., Experiment],
    make_head: Callable[..., HeadExperiment],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def experiment(output: str, accumulation: int) -> Experiment:
        built = tiny(output, num_steps=1, global_batch=4, heads={"detection": make_head(clip_norm=None)})
        return dataclasses.replace(built, engine=EngineConfig(accumulation=accumulation))

    whole = gradients_of_first_step(experiment("whole", 1))
    for accumulation in (2, 4):
        split = gradients_of_first_step(experiment(f"split{accumulation}", accumulation))
        assert relative_difference(split, whole) < 1e-5
        (found,), (expected,) = losses(tmp_path / f"split{accumulation}"), losses(tmp_path / "whole")
        assert found == pytest.approx(expected, rel=1e-5)

    # With each micro-batch's own counts it would be another gradient: the test can tell.
    class OwnCounts:
        def __init__(self, *arguments: object) -> None:
            self.record = world_mean_counts

        def fix(self) -> None:
            pass

        def __call__(self, name: str, count: Tensor) -> Tensor:
            return world_mean_counts(name, count)

    monkeypatch.setattr(loop, "RecordedCounts", OwnCounts)
    assert relative_difference(gradients_of_first_step(experiment("naive", 2)), whole) > 1e-3


@pytest.mark.parametrize("mode", ["features", "all"])
def test_offload_changes_no_bit(
    tiny: Callable[..., Experiment], make_head: Callable[..., HeadExperiment], mode: str
) -> None:
    """Two heads on one forward, two micro-batches: every map is taken four times."""

    def experiment(output: str, offload: str) -> Experiment:
        built = tiny(output, num_steps=3, global_batch=4, heads={"detection": make_head(), "other": make_head()})
        return dataclasses.replace(built, engine=EngineConfig(accumulation=2, offload=offload))

    expected, found = experiment("off", "off"), experiment("moved", mode)
    train(expected)
    train(found)
    assert losses(found.output) == losses(expected.output)
    assert losses(found.output, "other") == losses(expected.output, "other")
    assert_same_bits(tensors(found.output, 3), tensors(expected.output, 3))
    share = metrics(found.output)[-1]["offload/share"]
    # Most of what this tiny head saves is below the least size worth a copy.
    assert share > (0.5 if mode == "all" else 0)


def test_counting_ahead_leaves_running_statistics_alone(
    tiny: Callable[..., Experiment], make_head: Callable[..., HeadExperiment]
) -> None:
    experiment = tiny(num_steps=3, heads={"detection": make_head(ProbeConfig())})
    train(dataclasses.replace(experiment, engine=EngineConfig(accumulation=2)))
    assert tensors(experiment.output, 3)["head/norm.num_batches_tracked"] == 3 * 2


def test_the_backbone_is_the_same_after_training(
    tiny: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = loop.build_parts, []

    def observed(*arguments: object) -> TrainingParts:
        parts = original(*arguments)
        values = {name: tensor.clone() for name, tensor in parts.backbone.state_dict().items()}
        seen.append((parts.backbone, parts.backbone.checksum(), values))
        return parts

    monkeypatch.setattr(loop, "build_parts", observed)
    experiment = tiny()
    train(experiment)
    ((backbone, checksum, values),) = seen
    assert backbone.checksum() == checksum
    assert all(torch.equal(values[name], tensor) for name, tensor in backbone.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters())
    state = json.loads((Path(experiment.output) / "checkpoints/step_00000008/state.json").read_text())
    assert state["backbone"] == {"name": "swinv2_nano", "fingerprint": backbone.fingerprint}
    # And the heads did learn something, so "unchanged" says something about the backbone.
    assert not torch.equal(*(tensors(experiment.output, step)["head/box.classifier.weight"] for step in (4, 8)))


def test_the_learning_rate_that_is_used_is_the_scheduled_and_scaled_one(
    tiny: Callable[..., Experiment], make_head: Callable[..., HeadExperiment]
) -> None:
    # 2e-3 at 4 images, 2 images: 1e-3. Warm-up over 2 of 8 steps from a thousandth; a tenth from step 4, a hundredth
    # from step 6.
    expected = [1e-6, 1e-3 * (0.001 + 0.999 / 2), 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5]
    experiment = tiny()
    train(experiment)
    assert [line["detection/learning_rate"] for line in metrics(experiment.output)] == pytest.approx(expected, rel=1e-9)
    # That rate is what moves the weights: AdamW's first step, without decay, is -rate * g / (|g| + eps), and g =
    # exp_avg / 0.1.
    name, after = "box.classifier.weight", {}
    for scale in (1.0, 2.0):
        head = make_head(weight_decay=0.0, clip_norm=None, learning_rate=2e-3 * scale)
        head.schedule = dataclasses.replace(head.schedule, warmup_steps=0, milestones=())
        one_step = tiny(f"scale{scale}", num_steps=1, heads={"detection": head})
        train(one_step)
        after[scale] = tensors(one_step.output, 1)
    gradient = after[1.0][f"optimizer/exp_avg.{name}"].double() / 0.1
    moved = after[1.0][f"head/{name}"].double() - after[2.0][f"head/{name}"].double()
    assert gradient.abs().max() > 1e-3
    assert torch.allclose(moved, 1e-3 * gradient / (gradient.abs() + 1e-8), rtol=1e-3, atol=1e-7)


def test_one_step_without_a_finite_loss_is_skipped_and_counted(
    tiny: Callable[..., Experiment], make_head: Callable[..., HeadExperiment], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tuple(keys_of_steps([3]))
    experiment = tiny(heads={"detection": make_head(ProbeConfig(bad=bad))}, checkpoint_every=1, keep_checkpoints=8)
    train(experiment)
    assert [line["detection/skipped_steps"] for line in metrics(experiment.output)] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [step for step, line in enumerate(metrics(experiment.output)) if "detection/loss" not in line] == [3]
    before, after = tensors(experiment.output, 3), tensors(experiment.output, 4)
    assert all(
        torch.equal(before[name], after[name])
        for name in before
        if "norm.running" not in name and "num_batches" not in name
    )
    assert "the loss of step 4 is not finite" in capsys.readouterr().err
    state = json.loads((Path(experiment.output) / "checkpoints/step_00000008/state.json").read_text())
    assert state["heads"]["detection"]["optimizer_step"] == 7


def test_three_in_a_row_stop_that_head_only(
    tiny: Callable[..., Experiment], make_head: Callable[..., HeadExperiment], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tuple(keys_of_steps([1, 4, 5, 6]))
    heads = {"fragile": make_head(ProbeConfig(bad=bad)), "detection": make_head()}
    fields = {"num_steps": 12, "checkpoint_every": 2, "keep_checkpoints": 1}
    both, alone = tiny("both", heads=heads, **fields), tiny("alone", heads={"detection": make_head()}, **fields)
    with pytest.raises(TrainingStopped, match=r"fragile \(after step 7\)"):
        train(both)
    train(alone)
    assert losses(both.output) == losses(alone.output)
    assert_same_bits(tensors(both.output, 12), tensors(alone.output, 12))
    run = Path(both.output)
    # Step 6 holds the last state of the fragile head and outlives keep_checkpoints; the newest has the other head only.
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000006", "step_00000012"]
    assert sorted(path.name for path in (run / "checkpoints/step_00000012").iterdir()) == ["detection", "state.json"]
    assert all(tensor.isfinite().all() for tensor in tensors(run, 6, "fragile").values())
    evidence = json.loads((run / "nonfinite_fragile.json").read_text())
    (rank,) = evidence["ranks"]
    assert [entry["step"] for entry in rank] == [5, 6, 7]
    assert [(e["samples"][0]["epoch"], e["samples"][0]["index"]) for e in rank] == keys_of_steps([4, 5, 6])
    final = json.loads((run / "final.json").read_text())
    assert final["stopped"] == {"fragile": 7}
    assert list(final["metrics"]) == ["detection"]
    assert "head fragile stops" in capsys.readouterr().err
    with pytest.raises(TrainingStopped, match="fragile"):
        train(both)


def test_a_stopped_head_stays_stopped_when_the_run_resumes(
    tiny: Callable[..., Experiment], make_head: Callable[..., HeadExperiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = {"fragile": make_head(ProbeConfig(bad=tuple(keys_of_steps([2, 3, 4])))), "detection": make_head()}
    fields = {"num_steps": 10, "checkpoint_every": 2}
    stopped, whole = tiny("stopped", heads=heads, **fields), tiny("whole", heads=heads, **fields)
    with pytest.raises(TrainingStopped):
        train(whole)
    for number in (5, 5):
        # First in the middle of the bad steps, with two of the three already counted, then after the stop.
        train_killed(monkeypatch, stopped, number)
    with pytest.raises(TrainingStopped, match=r"fragile \(after step 5\)"):
        train(stopped)
    assert_same_bits(tensors(stopped.output, 10), tensors(whole.output, 10))
    assert [start["start_step"] for start in read_json_lines(Path(stopped.output) / "provenance.jsonl")] == [0, 4, 8]


def test_when_no_head_is_left_the_run_ends(
    tiny: Callable[..., Experiment], make_head: Callable[..., HeadExperiment]
) -> None:
    head = make_head(ProbeConfig(bad=tuple(keys_of_steps([2, 3, 4]))))
    experiment = tiny(heads={"detection": head}, num_steps=1000, checkpoint_every=2)
    with pytest.raises(TrainingStopped, match=r"detection \(after step 5\)"):
        train(experiment)
    # The checkpoint of step 4 lies within the bad steps, which changed nothing.
    assert (Path(experiment.output) / "latest").read_text() == "step_00000004\n"
    assert all(tensor.isfinite().all() for tensor in tensors(experiment.output, 4).values())


@pytest.fixture
def own_world(tmp_path: Path, make_data: Callable) -> tuple[object, list[Path]]:
    """Data on files of the test's own: (configuration, the training images)."""
    config = make_data(root=str(tmp_path / "world"))
    images = sorted((Path(located(config).root) / "train2017").iterdir())
    assert len(images) == NUM_TRAIN
    return config, images


def test_a_corrupt_image_is_replaced_counted_and_left_as_it_is(
    tiny: Callable[..., Experiment],
    own_world: tuple[object, list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, images = own_world
    broken = images[5].read_bytes()[:200]
    images[5].write_bytes(broken)
    images[9].write_bytes(b"<html>not found</html>")
    fields = {"data": config, "num_steps": 9, "checkpoint_every": 4}
    first, second = tiny("a", **fields), tiny("b", **fields)
    assert train(first) == train(second)
    assert losses(first.output) == losses(second.output)
    assert metrics(first.output)[-1]["data/replaced_images"] == 2
    listed = json.loads((Path(first.output) / "replaced_images.json").read_text())
    assert sorted(listed) == [str(images[5]), str(images[9])]
    told = capsys.readouterr().err
    assert told.count(str(images[5])) == 2 == told.count(str(images[9]))
    assert images[5].read_bytes() == broken
    # A resumed run goes on counting from where it was.
    resumed = tiny("c", **fields)
    train_killed(monkeypatch, resumed, 7)
    train(resumed)
    assert [line["data/replaced_images"] for line in metrics(resumed.output)] == [
        line["data/replaced_images"] for line in metrics(first.output)
    ]


def test_too_many_corrupt_images_stop_the_run(
    tiny: Callable[..., Experiment], own_world: tuple[object, list[Path]]
) -> None:
    config, images = own_world
    for image in images[1:]:
        image.write_bytes(b"")
    with pytest.raises(DataError, match=r"11 of 12 training images cannot be read"):
        train(tiny(data=config, num_steps=1000))


def test_another_backbone_is_refused(tiny: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = tiny()
    train_killed(monkeypatch, experiment, 5)
    # The same recipe, but the weights behind its name have changed.
    original = permafrost.launcher.run.parts.build_network

    def other(config: BackboneConfig, device: object = "cpu", **fields: object) -> FrozenBackbone | TrainableBackbone:
        return original(dataclasses.replace(config, weights="random:7"), device, **fields)

    monkeypatch.setattr(permafrost.launcher.run.parts, "build_network", other)
    with pytest.raises(CheckpointError) as caught:
        train(experiment)
    state = json.loads((Path(experiment.output) / "checkpoints/step_00000004/state.json").read_text())
    assert state["backbone"]["fingerprint"] in str(caught.value)
    assert other(experiment.backbone).fingerprint in str(caught.value)


def test_weights_that_are_no_longer_finite_are_not_saved(
    tiny: Callable[..., Experiment], make_head: Callable[..., HeadExperiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss need not be NaN for a step to spoil a weight that the loss does not reach."""
    original = permafrost.launcher.run.session.build_engine

    def spoiling(head: Head, **fields: object) -> Engine:
        engine = original(head, **fields)
        if isinstance(head, ProbeHead):
            export, calls = engine.export_state, []

            def export_state() -> HeadState:
                state = export()
                calls.append(None)
                if len(calls) == 2:
                    state.parameters["conv.bias"][0] = math.inf
                return state

            engine.export_state = export_state
        return engine

    monkeypatch.setattr(permafrost.launcher.run.session, "build_engine", spoiling)
    heads = {"fragile": make_head(ProbeConfig()), "detection": make_head()}
    both, alone = tiny("both", heads=heads, checkpoint_every=2), tiny("alone", heads={"fragile": heads["fragile"]})
    with pytest.raises(TrainingStopped, match=r"fragile \(after step 4\)"):
        train(both)
    assert losses(both.output)[-1][0] == 8
    assert sorted(path.name for path in (Path(both.output) / "checkpoints/step_00000004").iterdir()) == [
        "detection",
        "state.json",
    ]
    with pytest.raises(TrainingStopped, match=r"fragile \(after step 8\)"):
        train(alone)
    assert (Path(alone.output) / "latest").read_text() == "step_00000004\n"


def test_a_damaged_newest_checkpoint_costs_its_interval_only(
    tiny: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, damaged = tiny("whole", checkpoint_every=2), tiny("damaged", checkpoint_every=2)
    train(whole)
    train_killed(monkeypatch, damaged, 7)
    newest = Path(damaged.output) / "checkpoints/step_00000006/detection/head.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    capsys.readouterr()
    train(damaged)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert read_json_lines(Path(damaged.output) / "provenance.jsonl")[-1]["start_step"] == 4
    assert_same_bits(tensors(damaged.output, 8), tensors(whole.output, 8))
    assert_same_bits(tensors(damaged.output, 6), tensors(whole.output, 6))


def test_a_run_that_has_ended_is_not_run_again(
    tiny: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = tiny()
    result = train(experiment)
    capsys.readouterr()

    def fail(*arguments: object) -> None:
        raise AssertionError("nothing is built for a run that has ended")

    monkeypatch.setattr(loop, "build_parts", fail)
    assert train(experiment) == result
    assert "has ended after 8 steps" in capsys.readouterr().out


def test_an_evaluation_that_was_cut_off_is_made_up_for(
    tiny: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tiny("whole", evaluate_every=4), tiny("stopped", evaluate_every=4)
    expected = train(whole)
    original = permafrost.launcher.run.session.evaluate_heads

    def train_dying_in_evaluation(number: int) -> None:
        calls = []

        def dying(*arguments: object, **fields: object) -> object:
            calls.append(None)
            if len(calls) == number:
                raise Killed
            return original(*arguments, **fields)

        with monkeypatch.context() as patch:
            patch.setattr(permafrost.launcher.run.session, "evaluate_heads", dying)
            with pytest.raises(Killed):
                train(stopped)

    train_dying_in_evaluation(1)  # of step 4: the checkpoint is there, its score is not
    assert not (Path(stopped.output) / "evaluations.jsonl").exists()
    train_dying_in_evaluation(2)  # of step 8, after that of step 4 was made up for
    assert len(read_json_lines(Path(stopped.output) / "evaluations.jsonl")) == 1
    assert train(stopped) == expected
    for file in ("evaluations.jsonl", "best", "final.json"):
        assert (Path(stopped.output) / file).read_text() == (Path(whole.output) / file).read_text()


def test_a_full_disk_costs_a_checkpoint_not_the_run(
    tiny: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, full = safetensors.torch.save_file, [True]

    def save_file(tensors: object, path: Path, **fields: object) -> None:
        if full and "step_00000004" in str(path):
            raise safetensors.SafetensorError("No space left on device")
        original(tensors, path, **fields)

    monkeypatch.setattr(permafrost.launcher.run.checkpoint.safetensors.torch, "save_file", save_file)
    experiment = tiny(checkpoint_every=2)
    train(experiment)
    assert "checkpoint of step 4 could not be written" in capsys.readouterr().err
    assert [path.name for path in sorted((Path(experiment.output) / "checkpoints").iterdir())] == [
        "step_00000002",
        "step_00000006",
        "step_00000008",
    ]
    last = tiny("last", num_steps=4, checkpoint_every=2)
    with pytest.raises(CheckpointError, match="step 4 could not be written"):
        train(last)
    assert not (Path(last.output) / "final.json").exists()
    full.clear()
    train(last)
    assert (Path(last.output) / "latest").read_text() == "step_00000004\n"


def test_the_best_checkpoint_is_the_first_with_the_highest_metric(
    tiny: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.1, 0.3, 0.3, 0.2, 0.25])

    def scored(engines, *arguments: object, **fields: object) -> dict[str, dict[str, float]]:
        value = next(values)
        return {name: {"bbox/AP": value, "segm/AP": value} for name in engines}

    monkeypatch.setattr(permafrost.launcher.run.session, "evaluate_heads", scored)
    experiment = tiny(num_steps=10, evaluate_every=2, checkpoint_every=2, keep_checkpoints=2)
    assert train(experiment) == {"detection": {"bbox/AP": 0.25, "segm/AP": 0.25}}
    run = Path(experiment.output)
    assert json.loads((run / "best").read_text()) == {"detection": {"step": 4, "metric": "bbox/AP", "value": 0.3}}
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000008",
        "step_00000010",
    ]


def test_a_metric_that_does_not_exist_is_refused_at_once(
    tiny: Callable[..., Experiment], make_head: Callable[..., HeadExperiment]
) -> None:
    head = dataclasses.replace(make_head(), metric="box/AP")
    with pytest.raises(RecipeError, match=r"heads\.detection\.metric is 'box/AP'.*bbox/AP"):
        train(tiny(heads={"detection": head}))


def test_an_unwritable_output_is_refused_before_anything_is_built(
    tiny: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(loop, "build_parts", lambda *arguments: pytest.fail("something was built"))
    with pytest.raises(RunFolderError, match=r"file/run"):
        train(tiny("file/run"))


def test_a_mistake_at_the_start_leaves_no_run_behind(
    tiny: Callable[..., Experiment], make_data: Callable[..., object], tmp_path: Path
) -> None:
    missing = tiny(data=CocoDataConfig(root=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="nowhere"):
        train(missing)
    assert not Path(missing.output).exists()
    # The mended command is another recipe, for the same folder.
    assert train(tiny(num_steps=1)).keys() == {"detection"}


def test_the_run_folder_says_what_was_chosen(
    tiny: Callable[..., Experiment], capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = tiny(num_steps=2, image_every=1, log_every=2)
    train(experiment)
    (start,) = read_json_lines(Path(experiment.output) / "provenance.jsonl")
    assert start["global_batch"] == 2
    assert start["world_size"] == 1
    assert start["learning_rates"] == {"detection": pytest.approx(1e-3)}
    assert start["num_samples"] == {"train": NUM_TRAIN, "val": 5}
    assert start["parameters"]["backbone"]["trainable"] == 0
    assert start["parameters"]["detection"]["trainable"] == start["parameters"]["detection"]["all"] > 10_000
    assert (
        start["versions"]["torch"] == torch.__version__.split("+")[0] or start["versions"]["torch"] == torch.__version__
    )
    assert start["command"] == sys.argv
    printed = capsys.readouterr().out
    for line in start["lines"]:
        assert line in printed
    assert start["backbone"]["fingerprint"][:12] in printed
    assert "step 1/2" in printed
    (line,) = metrics(experiment.output)
    for tag in (
        "speed/images_per_second",
        "time/step",
        "time/data_wait",
        "time/backbone",
        "time/heads",
        "memory/host_gib",
    ):
        assert line[tag] > 0
    parts = sum(line[f"time/{part}"] for part in ("data_wait", "backbone", "heads"))
    assert parts <= line["time/step"]


def test_the_module_runs(tmp_path: Path) -> None:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "permafrost.launcher.train", "no_such_recipe"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environ)
    assert result.returncode == 2
    assert "no_such_recipe" in result.stderr
    assert "Traceback" not in result.stderr
    assert shutil.which("git") is None or not (tmp_path / "runs").exists()
