"""Runs whose backbone learns: against a plain loop around timm's network, and through the whole loop and its commands."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import permafrost.launcher.train as loop
from permafrost.data.build import train_set, val_set
from permafrost.data.stream.loader import collate
from permafrost.data.types import Batch, SampleKey
from permafrost.heads.base import world_mean_counts
from permafrost.launcher.engines.base import parameter_groups
from permafrost.launcher.engines.choose import build_engine
from permafrost.launcher.errors import CheckpointError, RecipeError, RunFolderError
from permafrost.launcher.evaluate import evaluate_run
from permafrost.launcher.experiment import EngineConfig, Experiment, MeshConfig, OptimizerConfig
from permafrost.launcher.files import read_json_lines
from permafrost.launcher.predict import predict_run
from permafrost.launcher.ranks.process_group import ProcessGroup
from permafrost.launcher.run.fine_tune import FineTuned
from permafrost.launcher.run.parts import build_heads, join_heads
from permafrost.launcher.run.restore import load_trained
from permafrost.launcher.train import train
from permafrost.model import build_backbone
from permafrost.model.config import BackboneConfig
from permafrost.model.spec import SWINV2_SIZES

GROUP = ProcessGroup(0, 1, 0, torch.device("cpu"))
TRAINED = BackboneConfig("swinv2_nano", "random", frozen=False, drop_path_rate=0.2, learning_rate_factor=0.1)


class Killed(BaseException):
    """Ends a run the way a signal would."""


def losses(run: str | Path) -> list[float]:
    return [line["detection/loss"] for line in read_json_lines(Path(run) / "metrics.jsonl") if "data/epoch" in line]


def saved(run: str | Path, step: int) -> dict[str, Tensor]:
    folder = Path(run) / "checkpoints" / f"step_{step:08d}" / "detection"
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(folder.iterdir())
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def make_batch(experiment: Experiment, num_images: int, side: int) -> Batch:
    """Training images in the middle of a larger one: of a size that timm's network was built for."""
    dataset = train_set(experiment.data)
    batch = collate([dataset[SampleKey(0, 0, index)] for index in range(num_images)])
    images = torch.zeros(num_images, 3, side, side, dtype=torch.uint8)
    images[..., : batch.images.shape[-2], : batch.images.shape[-1]] = batch.images
    masks = [
        nn.functional.pad(t.masks, (0, side - t.masks.shape[-1], 0, side - t.masks.shape[-2])) for t in batch.targets
    ]
    targets = [dataclasses.replace(t, masks=own) for t, own in zip(batch.targets, masks)]
    return dataclasses.replace(batch, images=images, targets=targets)


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm has the step between stages at the start of the next one."""
    return {
        re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name): value.clone()
        for name, value in state.items()
    }


def test_it_takes_the_steps_of_a_plain_loop_around_timms_network(tiny: Callable[..., Experiment]) -> None:
    side, num_steps, rate, factor = 128, 4, 1e-3, 0.1
    config = BackboneConfig("swinv2_nano", "random", dtype="float64", frozen=False, learning_rate_factor=factor)
    experiment = tiny(backbone=config)
    batch = make_batch(experiment, 2, side)
    classes = [str(number) for number in range(8)]
    backbone = build_backbone(config)
    _, heads = join_heads(experiment, backbone, classes)
    model = heads["detection"].double()
    assert isinstance(model, FineTuned)

    size = SWINV2_SIZES["swinv2_nano"]
    network = timm.models.swin_transformer_v2.SwinTransformerV2(
        img_size=side,
        embed_dim=size.embed_dim,
        depths=size.depths,
        num_heads=size.num_heads,
        window_size=8,
        pretrained_window_sizes=(8, 8, 8, 8),
        drop_path_rate=0.0,
        num_classes=0,
    )
    network.norm = nn.Identity()
    network.load_state_dict(to_timm(backbone.network.state_dict()), strict=False)
    head = build_heads(experiment, backbone.spec, classes)["detection"]
    network, head = network.double().train(), head.double().train()
    groups = []
    for module, own_rate in ((network, factor * rate), (head, rate)):
        for decayed in (True, False):
            chosen = [
                parameter
                for name, parameter in module.named_parameters()
                if decayed
                == (parameter.ndim > 1 and not any(part in name for part in ("norm", "bias", "cpb_mlp", "logit_scale")))
            ]
            groups.append({"params": chosen, "lr": own_rate, "weight_decay": 0.05 if decayed else 0.0})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    expected = []
    for _ in range(num_steps):
        maps = network.forward_intermediates((batch.images.double() / 255 - mean) / std, intermediates_only=True)
        total = torch.stack(list(head(maps, batch, world_mean_counts).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        expected.append(total.item())

    engine = build_engine(
        model, optimizer=OptimizerConfig(), engine=EngineConfig(), group=GROUP, global_batch=2, environ={}
    )
    engine.train()
    found = []
    for _ in range(num_steps):
        total = torch.stack(list(engine((batch.images,), batch, world_mean_counts).values())).sum()
        engine.backward(total)
        engine.step(rate)
        found.append(total.item())
    # Means of the images are rounded to float32 in ours.
    assert found == pytest.approx(expected, rel=1e-6)
    assert expected[-1] < expected[0]
    theirs = network.state_dict()
    for name, value in to_timm(model.backbone.network.state_dict()).items():
        assert torch.allclose(value, theirs[name], rtol=1e-5, atol=1e-7), name


def test_a_run_that_was_killed_resumes_bitwise(
    tiny: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tiny("whole", backbone=TRAINED, num_steps=6, checkpoint_every=3), None
    train(whole)
    killed = tiny("killed", backbone=TRAINED, num_steps=6, checkpoint_every=3)
    original, calls = loop.track_replaced, []

    def counted(*arguments: object) -> None:
        original(*arguments)
        calls.append(None)
        if len(calls) == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "track_replaced", counted)
        with pytest.raises(Killed):
            train(killed)
    train(killed)
    assert losses(killed.output) == losses(whole.output)
    found, expected = saved(killed.output, 6), saved(whole.output, 6)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]
    # Everything is in there: of backbone and head, the weights and both moments.
    built = build_backbone(TRAINED)
    names = [f"backbone.{name}" for name, _ in built.named_parameters()]
    for prefix in ("head/", "optimizer/exp_avg.", "optimizer/exp_avg_sq."):
        assert all(f"{prefix}{name}" in expected for name in names)
    start = dict(built.named_parameters())
    assert all(not torch.equal(expected[f"head/{name}"], start[name.removeprefix("backbone.")]) for name in names)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny recipe, its backbone trained."""
    from permafrost.launcher.recipes.overrides import parse_experiment

    recipe = f"{Path(__file__).parents[1] / 'tiny_recipe.py'}:tiny"
    output = tmp_path_factory.mktemp("fine_tune") / "run"
    train(parse_experiment(recipe, ["--backbone.frozen", "False", "--output", str(output)]))
    return output


def test_evaluation_and_prediction_use_the_trained_backbone(run: Path, tmp_path: Path) -> None:
    trained = load_trained(run, GROUP)
    model = trained.heads["detection"].head
    assert isinstance(model, FineTuned)
    content = saved(run, 4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, content[f"head/{name}"]), name
    final = json.loads((run / "final.json").read_text())["metrics"]
    assert evaluate_run(run, device="cpu", say=lambda text: None) == final
    dataset = val_set(trained.experiment.data)
    options = {"score_threshold": 0.0, "device": "cpu", "say": lambda text: None}
    done = predict_run(run, [str(dataset.image_path(0))], tmp_path / "out", **options)
    batch = collate([dataset[SampleKey(0, 0, 0)]])
    (expected,) = trained.heads["detection"](trained.backbone(batch.images), batch)
    scores = sorted(entry["score"] for entry in done.results)
    assert scores == pytest.approx(sorted(expected.scores.tolist()), abs=1e-5)
    assert scores


def test_other_weights_to_start_from_are_refused(run: Path) -> None:
    experiment = load_trained(run, GROUP).experiment
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["experiment"]["backbone"]["weights"] = "random:1"
    try:
        before = (run / "recipe.json").read_text()
        (run / "recipe.json").write_text(json.dumps(recipe))
        with pytest.raises(CheckpointError, match="was trained on the backbone swinv2_nano with fingerprint"):
            load_trained(run, GROUP)
    finally:
        (run / "recipe.json").write_text(before)
    other = dataclasses.replace(experiment, backbone=dataclasses.replace(experiment.backbone, frozen=True))
    with pytest.raises(RunFolderError, match=r"backbone\.frozen"):
        train(other)


def test_groups_follow_the_published_rules(tiny: Callable[..., Experiment]) -> None:
    experiment = tiny(backbone=TRAINED)
    _, heads = join_heads(experiment, build_backbone(TRAINED), ["a", "b"])
    groups = parameter_groups(heads["detection"], OptimizerConfig())
    assert sorted((group.learning_rate_factor, group.decayed) for group in groups) == [
        (0.1, False),
        (0.1, True),
        (1.0, False),
        (1.0, True),
    ]
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in heads["detection"].named_parameters())
    decayed = [name for group in groups if group.decayed for name in group.parameters]
    assert any(name.endswith("attn.qkv.weight") for name in decayed)
    assert not [name for name in decayed if re.search("cpb_mlp|logit_scale|norm|bias", name)]
    for group in groups:
        assert all(name.startswith("backbone.") == (group.learning_rate_factor == 0.1) for name in group.parameters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 2}, r"backbone\.frozen is False but there are 2 heads \(a, b\).*one run per head"),
        ({"mesh": MeshConfig(tensor=2)}, r"mesh\.tensor is 2 but backbone\.frozen is False.*ZeRO 3"),
        ({"engine": EngineConfig(offload="features")}, r"engine\.offload is 'features' but backbone\.frozen is False"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused(
    tiny: Callable[..., Experiment], make_head: Callable, changes: dict, message: str
) -> None:
    experiment = tiny(backbone=TRAINED)
    if "heads" in changes:
        changes = {"heads": {"a": make_head(), "b": make_head()}}
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(experiment, **changes)


def test_offload_of_everything_changes_no_bit(tiny: Callable[..., Experiment]) -> None:
    runs = {}
    for mode in ("off", "all"):
        experiment = tiny(mode, backbone=TRAINED, num_steps=2)
        experiment.engine = EngineConfig(offload=mode)
        train(experiment)
        runs[mode] = losses(experiment.output)
    assert runs["all"] == runs["off"]
    shares = [
        line["offload/share"]
        for line in read_json_lines(Path(experiment.output) / "metrics.jsonl")
        if "offload/share" in line
    ]
    assert min(shares) > 0.8
