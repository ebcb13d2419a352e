"""Pretraining: the schedule, the batches, the losses, resuming, and the file of weights."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from permafrost.configs.pretrain import nano_glyphs, nano_glyphs_debug
from permafrost.data.worlds import glyphs
from permafrost.launcher.cli import main
from permafrost.launcher.errors import CheckpointError, RecipeError, RunFolderError, TrainingStopped
from permafrost.launcher.pretraining import model as pretrain_model, trainer as pretrain
from permafrost.launcher.pretraining.batches import augment, difficulty_limit, generator, train_batches
from permafrost.launcher.pretraining.config import PretrainExperiment
from permafrost.model import load_backbone
from permafrost.model.spec import FeatureSpec

pytestmark = pytest.mark.filterwarnings("ignore:.*distutils Version classes:DeprecationWarning")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def world(cache, monkeypatch) -> None:
    monkeypatch.setenv("PERMAFROST_CACHE", str(cache))


@pytest.fixture
def tiny(tmp_path) -> Callable[..., PretrainExperiment]:
    """tiny(**fields): six steps on 32 px pictures."""

    def build(**fields) -> PretrainExperiment:
        values = {
            "num_train_images": 40,
            "num_val_images": 20,
            "num_steps": 6,
            "batch_size": 4,
            "warmup_steps": 2,
            "log_every": 2,
            "evaluate_every": 4,
            "checkpoint_every": 2,
            "output": str(tmp_path / "run"),
        }
        return dataclasses.replace(nano_glyphs_debug(), **values | fields)

    return build


def tensors_of(path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


class TestRecipe:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("num_steps", 0),
            ("batch_size", 0),
            ("learning_rate", 0.0),
            ("label_smoothing", 1.0),
            ("curriculum", -0.1),
            ("dense_weight", -1.0),
            ("image_size", 100),
            ("num_train_images", 10),
            ("warmup_steps", 10**6),
        ],
    )
    def test_impossible_values_are_named(self, field, value) -> None:
        with pytest.raises(RecipeError, match=field):
            dataclasses.replace(nano_glyphs(), **{field: value})

    def test_windows_are_no_larger_than_their_maps(self) -> None:
        assert nano_glyphs().windows == (8, 8, 8, 4)
        assert dataclasses.replace(nano_glyphs(), image_size=32).windows == (8, 4, 2, 1)

    def test_learning_rate(self) -> None:
        recipe = dataclasses.replace(nano_glyphs(), num_steps=110, warmup_steps=10, learning_rate=2.0)
        assert pretrain.learning_rate(recipe, 4) == pytest.approx(1.0)
        assert pretrain.learning_rate(recipe, 10) == pytest.approx(2.0)
        assert pretrain.learning_rate(recipe, 35) == pytest.approx(1 + math.cos(math.pi / 4))
        assert pretrain.learning_rate(recipe, 110) == pytest.approx(0)

    def test_difficulty_limit(self) -> None:
        recipe = dataclasses.replace(nano_glyphs(), num_steps=100, curriculum=0.5, first_difficulty=0.2, warmup_steps=1)
        assert difficulty_limit(recipe, 0) == pytest.approx(0.2)
        assert difficulty_limit(recipe, 25) == pytest.approx(0.6)
        assert difficulty_limit(recipe, 50) == difficulty_limit(recipe, 99) == 1
        assert difficulty_limit(dataclasses.replace(recipe, curriculum=0.0), 0) == 1


class TestBatches:
    def test_the_stream_is_a_function_of_the_step(self, tiny) -> None:
        experiment = tiny()
        split = glyphs.load_split("train", 40, image_size=32)
        whole = list(train_batches(split, experiment, 0))
        tail = list(train_batches(split, experiment, 4))
        assert [batch[0] for batch in whole] == list(range(6))
        for one, other in zip(whole[4:], tail, strict=True):
            assert one[0] == other[0]
            assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))
        assert not torch.equal(whole[0][1], whole[1][1])

    def test_the_curriculum_takes_easy_pictures_first(self, tiny) -> None:
        """The red value of picture i is i, so that a batch tells which pictures it took."""
        count = 200
        images = np.zeros((count, 32, 32, 4), dtype=np.uint8)
        difficulties = np.random.default_rng(0).permutation(count) / count
        split = glyphs.GlyphSplit(images, np.arange(count), difficulties, ("none",) * count)
        experiment = tiny(
            num_train_images=count, num_steps=40, batch_size=16, curriculum=0.5, first_difficulty=0.2, warmup_steps=0
        )
        hardest = [difficulties[labels.numpy()].max() for _, _, _, labels in train_batches(split, experiment, 0)]
        for step, value in enumerate(hardest):
            assert value <= difficulty_limit(experiment, step)
        assert max(hardest[:3]) < 0.35
        assert max(hardest[20:]) > 0.9

    def test_pixels_and_coverage_move_together(self) -> None:
        pictures = torch.from_numpy(np.stack([glyphs.render("train", i)[0] for i in range(8)])).permute(0, 3, 1, 2)
        pictures = pictures[:, 3:].expand(-1, 4, -1, -1).contiguous()
        images, coverage = augment(pictures, generator(0, 1, 0))
        for image, mask in zip(images, coverage, strict=True):
            for channel in image:
                pair = np.corrcoef(channel.flatten().numpy(), mask.flatten().numpy())
                assert abs(pair[0, 1]) > 0.9
        assert (coverage - pictures[:, 3] / 255).abs().mean() > 0.02

    def test_without_freedom_nothing_turns(self) -> None:
        pictures = torch.zeros(32, 4, 64, 64, dtype=torch.uint8)
        pictures[:, 3, 32:, 40:] = 255
        _, kept = augment(pictures, generator(0, 1, 0), freedom=0.0)
        _, turned = augment(pictures, generator(0, 1, 0), freedom=1.0)
        corners = [(slice(24), slice(24)), (slice(24), slice(40, 64)), (slice(40, 64), slice(24)), (slice(40, 64),) * 2]

        def fullest(coverage) -> torch.Tensor:
            return torch.stack([coverage[:, rows, columns].mean((1, 2)) for rows, columns in corners], dim=1).argmax(1)

        assert (fullest(kept) == 3).all()
        assert set(fullest(turned).tolist()) == {0, 1, 2, 3}


class TestModel:
    def test_starting_values_let_every_block_count(self) -> None:
        model = pretrain_model.build_classifier(nano_glyphs_debug(), 100).eval()
        image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = model.forward_features(image)
            for stage in model.layers:
                for block in stage.blocks:
                    block.norm1.weight.zero_()
                    block.norm2.weight.zero_()
            after = model.forward_features(image)
        for one, other in zip(before, after, strict=True):
            assert (one - other).norm() > 0.3 * one.norm()

    def test_readout_loss_by_hand(self) -> None:
        rng = np.random.default_rng(0)
        num_classes, smoothing, size = 3, 0.1, 32
        readouts = pretrain_model.Readouts(FeatureSpec((4, 6, 8, 10), (4, 8, 16, 32)), num_classes)
        coverage = np.zeros((2, size, size))
        coverage[0, :20, 4:14] = 1.0
        coverage[1, 17:, 15:] = 0.7
        labels = [2, 0]
        logits = [rng.normal(size=(2, size // s, size // s, n)) for s, n in ((4, 1), (8, 1), (16, num_classes + 1))]

        def blocks(stride) -> np.ndarray:
            return coverage.reshape(2, size // stride, stride, size // stride, stride).mean((2, 4))

        expected = 0.0
        for level, stride in ((0, 4), (1, 8)):
            probability, share = 1 / (1 + np.exp(-logits[level][..., 0])), blocks(stride)
            expected -= (share * np.log(probability) + (1 - share) * np.log(1 - probability)).mean() / 2
        terms = {True: [], False: []}
        for b, row, column in np.ndindex(2, 2, 2):
            scores = logits[2][b, row, column]
            log_probability = scores - np.log(np.exp(scores).sum())
            figure = bool(blocks(16)[b, row, column] >= 0.25)
            wanted = np.full(num_classes + 1, smoothing / (num_classes + 1))
            wanted[labels[b] if figure else num_classes] += 1 - smoothing
            terms[figure].append(-(wanted * log_probability).sum())
        assert terms[True]
        assert terms[False]
        expected += (np.mean(terms[True]) + np.mean(terms[False])) / 2
        found = readouts.loss(
            [torch.from_numpy(x) for x in logits], torch.from_numpy(coverage), torch.tensor(labels), smoothing
        )
        assert found.item() == pytest.approx(expected, rel=1e-6)

    def test_a_batch_without_a_figure_has_a_finite_loss(self) -> None:
        readouts = pretrain_model.Readouts(FeatureSpec((4, 6, 8, 10), (4, 8, 16, 32)), 3)
        maps = tuple(torch.randn(1, c, 32 // s, 32 // s) for c, s in ((4, 4), (6, 8), (8, 16), (10, 32)))
        assert readouts.loss(readouts(maps), torch.zeros(1, 32, 32), torch.tensor([1]), 0.1).isfinite()

    def test_decay_spares_what_is_not_a_matrix(self) -> None:
        model = pretrain_model.build_classifier(nano_glyphs_debug(), 100)
        optimizer = pretrain_model.build_optimizer((model,), nano_glyphs_debug())
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed = {names[id(parameter)] for parameter in optimizer.param_groups[0]["params"]}
        spared = {names[id(parameter)] for parameter in optimizer.param_groups[1]["params"]}
        assert decayed | spared == set(names.values())
        assert not [
            name for name in decayed if "norm" in name or name.endswith("bias") or "cpb" in name or "scale" in name
        ]
        assert {"head.weight", "layers.0.blocks.0.attn.qkv.weight", "patch_embed.proj.weight"} <= decayed

    def test_it_learns(self) -> None:
        """Eight pictures by heart in a few steps, image label and read-outs together."""
        experiment = dataclasses.replace(nano_glyphs_debug(), drop_path_rate=0.0, label_smoothing=0.0, curriculum=0.0)
        experiment = dataclasses.replace(experiment, num_steps=40, warmup_steps=5)
        torch.manual_seed(0)
        pictures = np.stack([glyphs.render("train", index, image_size=32)[0] for index in range(8)])
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        batch = (images[:, :3], images[:, 3], torch.arange(8))
        model = pretrain_model.build_classifier(experiment, 100)
        readouts = pretrain_model.Readouts(model.spec, 100)
        optimizer = pretrain_model.build_optimizer((model, readouts), experiment)
        losses = [pretrain.train_step(model, readouts, optimizer, batch, experiment, step)[0] for step in range(40)]
        assert losses[0] > 4
        assert losses[-1] < 1.0

    def test_average_follows_by_its_decay(self) -> None:
        average, model = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        start, target = average.weight.detach().clone(), model.weight.detach().clone()
        pretrain.update_average(average, model, 0.9, 10**6)
        torch.testing.assert_close(average.weight, 0.9 * start + 0.1 * target)


class TestRun:
    def test_a_run_folder_and_its_weights(self, tiny, tmp_path, capsys) -> None:
        results = pretrain.run(tiny(), command="permafrost pretrain tiny --output 'some where' --resume auto --seed 0")
        folder = tmp_path / "run"
        path = folder / "swinv2_nano_glyphs_debug.safetensors"
        with safe_open(path, "pt") as file:
            header = file.metadata()
        assert header["name"] == "swinv2_nano"
        assert header["command"] == "permafrost pretrain tiny --seed 0"
        assert json.loads(header["window_size"]) == [8, 4, 2, 1]
        assert json.loads(header["recipe"])["output"] is None, "no folder of the machine that trained"
        assert float(header["accuracy"]) == pytest.approx(results["val/accuracy"], abs=1e-4)
        tensors = tensors_of(path)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert not [name for name in tensors if "readout" in name or "level" in name]
        assert path.stat().st_size < 6e6

        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6]
        assert [line["step"] for line in lines if "val/accuracy" in line] == [4, 6]
        record = json.loads((folder / "recipe.json").read_text())
        assert record["command"].startswith("permafrost pretrain tiny")
        assert record["recipe"]["batch_size"] == 4
        assert list((folder / "tensorboard").iterdir())
        assert "parameters" in capsys.readouterr().out

    def test_the_shipped_weights_are_scored_as_they_are_stored(self, tiny, tmp_path) -> None:
        results = pretrain.run(tiny())
        model = pretrain_model.build_classifier(tiny(), 100).eval()
        tensors = tensors_of(tmp_path / "run" / "swinv2_nano_glyphs_debug.safetensors")
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        split = glyphs.load_split("val", 20, image_size=32)
        images = torch.from_numpy(split.images[..., :3].copy()).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            logits = model(pretrain_model.normalise(images))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(split.labels))
        assert results["val/loss"] == pytest.approx(loss.item(), rel=1e-5)

    def test_the_weights_load_as_a_frozen_backbone(self, tiny, tmp_path) -> None:
        pretrain.run(tiny())
        path = tmp_path / "run" / "swinv2_nano_glyphs_debug.safetensors"
        backbone = load_backbone("swinv2_nano", weights=str(path), dtype=torch.float32)
        model = pretrain_model.build_classifier(tiny(), 100).eval()
        model.load_state_dict({name: tensor.float() for name, tensor in tensors_of(path).items()})
        images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        with torch.no_grad():
            expected = model.forward_features(pretrain_model.normalise(images / 255))
        for one, other in zip(backbone(images), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    def test_a_resumed_run_is_the_uninterrupted_one(self, tiny, tmp_path, monkeypatch) -> None:
        pretrain.run(tiny(output=str(tmp_path / "whole")))
        update = pretrain.update_average

        def stop_at_step_5(average, model, decay, step) -> None:
            if step == 5:
                raise KeyboardInterrupt
            update(average, model, decay, step)

        with monkeypatch.context() as patch:
            patch.setattr(pretrain, "update_average", stop_at_step_5)
            with pytest.raises(KeyboardInterrupt):
                pretrain.run(tiny(output=str(tmp_path / "parts")))
        pretrain.run(tiny(output=str(tmp_path / "parts")), resume="must")
        whole, parts = (
            torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True) for name in ("whole", "parts")
        )
        assert whole["step"] == parts["step"] == 6
        for part in ("model", "average", "readouts"):
            for name, tensor in whole[part].items():
                assert torch.equal(tensor, parts[part][name]), (part, name)
        steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps)
        assert steps.count(4) == 2  # one line of training, one of validation

    def test_mistakes_about_the_folder(self, tiny, tmp_path) -> None:
        with pytest.raises(RunFolderError, match="no checkpoint to resume"):
            pretrain.run(tiny(), resume="must")
        pretrain.run(tiny())
        with pytest.raises(RunFolderError, match="already holds a run"):
            pretrain.run(tiny(), resume="never")
        with pytest.raises(RunFolderError, match=r"learning_rate was 0\.001, is 0\.5"):
            pretrain.run(tiny(learning_rate=0.5))
        (tmp_path / "run" / "checkpoints" / "last.pt").write_bytes(b"cut off")
        with pytest.raises(CheckpointError, match=r"last\.pt"):
            pretrain.run(tiny())

    def test_a_loss_that_is_not_finite_stops_the_run(self, tiny, monkeypatch) -> None:
        monkeypatch.setattr(pretrain, "train_step", lambda *args: (math.nan, 0))
        with pytest.raises(TrainingStopped, match="learning_rate"):
            pretrain.run(tiny())

    def test_compiled_stages_keep_the_names(self, tiny, monkeypatch) -> None:
        """`compile` goes stage by stage and in place; the compiler itself is left out here."""
        compiled = []
        monkeypatch.setattr("permafrost.model.swin.v2.Stage.compile", lambda stage, **_: compiled.append(stage))
        pretrain.run(tiny(compile=True, num_steps=2))
        assert len(compiled) == 4

    def test_as_a_command(self, tmp_path, capsys) -> None:
        arguments = ["nano_glyphs_debug", "--num-steps", "2", "--warmup-steps", "1", "--output", str(tmp_path / "run")]
        arguments += ["--num-train-images", "40", "--num-val-images", "20", "--batch-size", "4"]
        assert main(["pretrain", *arguments]) == 0
        assert (tmp_path / "run" / "swinv2_nano_glyphs_debug.safetensors").exists()
        command = json.loads((tmp_path / "run" / "recipe.json").read_text())["command"]
        assert command.startswith("permafrost pretrain nano_glyphs_debug --num-steps 2")
