"""The choice of an engine from settings, and states in one process. The engines' equality is tested in tests/distributed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from permafrost.data.types import Batch
from permafrost.launcher.engines.base import Engine, HeadState, resolve_precision, split_decay
from permafrost.launcher.engines.choose import build_engine, choose_engine
from permafrost.launcher.engines.deepspeed_json import load_json, merge_settings, read_settings
from permafrost.launcher.errors import CheckpointError, LaunchError
from permafrost.launcher.experiment import EngineConfig, OptimizerConfig
from permafrost.launcher.ranks.division import micro_batch_size
from permafrost.launcher.ranks.process_group import ProcessGroup

GROUP = ProcessGroup(0, 1, 0, torch.device("cpu"))


class LinearHead(nn.Module):
    """The smallest head: a norm, a linear layer, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.out = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, features, batch, counts) -> dict[str, torch.Tensor] | torch.Tensor:
        output = self.out(self.norm(features[0]))
        if not self.training:
            return output
        self.mean.copy_(output.detach().float().mean(0))
        return {"loss": (output**2).sum() / counts("images", torch.tensor(float(len(output))))}


def make_engine(head: nn.Module | None = None, **engine) -> Engine:
    return build_engine(
        head or LinearHead(),
        optimizer=OptimizerConfig(),
        engine=EngineConfig(**engine),
        group=GROUP,
        global_batch=4,
        environ={},
    )


def take_step(engine, seed: int) -> float:
    features = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))]
    batch = Batch(torch.zeros(4, 3, 1, 1, dtype=torch.uint8), [], [])
    loss = engine(features, batch, lambda name, count: count)["loss"]
    engine.backward(loss)
    engine.step(0.01)
    return loss.item()


class TestChoice:
    @pytest.mark.parametrize(
        ("config", "environ", "kind", "reason"),
        [
            ({}, {}, "accelerate", "nothing asks"),
            ({"kind": "accelerate"}, {}, "accelerate", "the recipe says"),
            ({"kind": "deepspeed"}, {}, "deepspeed", "the recipe says"),
            ({"deepspeed_config": "zero3"}, {}, "deepspeed", "'zero3'"),
            ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed", "distributed_type is DEEPSPEED"),
            ({}, {"ACCELERATE_DISTRIBUTED_TYPE": "DEEPSPEED"}, "deepspeed", "distributed_type is DEEPSPEED"),
            ({}, {"ACCELERATE_USE_DEEPSPEED": "false"}, "accelerate", "nothing asks"),
        ],
    )
    def test_kind(self, config, environ, kind, reason) -> None:
        found = choose_engine(EngineConfig(**config), environ)
        assert found[0] == kind
        assert reason in found[1]

    def test_contradictions(self) -> None:
        with pytest.raises(LaunchError, match=r"kind is 'accelerate'.*'zero2'"):
            choose_engine(EngineConfig(kind="accelerate", deepspeed_config="zero2"), {})
        with pytest.raises(LaunchError, match=r"kind is 'accelerate'.*DEEPSPEED"):
            choose_engine(EngineConfig(kind="accelerate"), {"ACCELERATE_USE_DEEPSPEED": "true"})

    def test_batch_must_divide(self) -> None:
        assert micro_batch_size(global_batch=16, world_size=4, accumulation=2) == 2
        with pytest.raises(LaunchError, match=r"global_batch 16 .* 3 process\(es\) x engine.accumulation 2"):
            micro_batch_size(global_batch=16, world_size=3, accumulation=2)
        with pytest.raises(LaunchError, match="multiple of 8"):
            micro_batch_size(global_batch=4, world_size=4, accumulation=2)

    def test_precision(self) -> None:
        assert resolve_precision("auto", "cpu") == "float32"
        assert resolve_precision("auto", "cuda") == "bfloat16"
        assert resolve_precision("float32", "cuda") == "float32"

    @pytest.mark.parametrize(
        ("environ", "words"),
        [
            ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
            ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
            ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "'INDUCTOR'"),
            ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "'bf16'.*float32"),
            ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "'fp16'.*float32"),
        ],
    )
    def test_unsupported_by_accelerate_engine(self, environ, words) -> None:
        with pytest.raises(LaunchError, match=words):
            build_engine(
                LinearHead(),
                optimizer=OptimizerConfig(),
                engine=EngineConfig(),
                group=GROUP,
                global_batch=4,
                environ=environ,
            )

    def test_frozen_or_empty_head(self) -> None:
        head = LinearHead()
        head.out.bias.requires_grad_(False)
        with pytest.raises(LaunchError, match=r"out\.bias is frozen"):
            make_engine(head)
        with pytest.raises(LaunchError, match="no parameters"):
            make_engine(nn.Identity())

    def test_decay_groups(self) -> None:
        head = nn.ModuleDict({"norm": nn.Conv2d(2, 2, 1), "body": nn.Linear(2, 2), "scale": nn.PReLU(3)})
        decayed, not_decayed = split_decay(head, ("norm", "bias"))
        assert list(decayed) == ["body.weight"]
        assert list(not_decayed) == ["norm.weight", "norm.bias", "body.bias", "scale.weight"]


def merge(settings: dict, **changes) -> dict:
    recipe = {"micro_batch": 2, "accumulation": 3, "world_size": 4, "clip_norm": 1.5, "precision": "float32"}
    return merge_settings(settings, "my.json", **{**recipe, "zero_stage": None, **changes})


class TestDeepSpeedJSON:
    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_shipped(self, stage) -> None:
        settings = load_json(f"zero{stage}")
        untouched = copy.deepcopy(settings)
        merged = merge(settings)
        assert settings == untouched
        assert merged["zero_optimization"]["stage"] == stage
        assert merged["train_micro_batch_size_per_gpu"] == 2
        assert merged["gradient_accumulation_steps"] == 3
        assert merged["train_batch_size"] == 24
        assert merged["gradient_clipping"] == 1.5
        assert not {"optimizer", "bf16", "fp16", "torch_autocast"} & merged.keys()

    def test_same_values_pass(self) -> None:
        given = {"train_batch_size": 24, "gradient_clipping": 1.5, "gradient_accumulation_steps": "auto"}
        assert merge(given)["gradient_accumulation_steps"] == 3
        assert merge({}, clip_norm=None)["gradient_clipping"] == 0.0
        assert merge({"bf16": {"enabled": False}}) == merge({})

    @pytest.mark.parametrize(
        ("settings", "found", "wanted"),
        [
            ({"train_batch_size": 32}, "train_batch_size to 32", "24 (loop.global_batch)"),
            ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu to 4", "recipe says 2"),
            ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps to 1", "3 (engine.accumulation)"),
            ({"gradient_clipping": 1.0}, "gradient_clipping to 1.0", "1.5 (the head's optimizer.clip_norm)"),
            ({"optimizer": {"type": "Adam"}}, "'optimizer'", "heads.<name>.optimizer"),
            ({"scheduler": {"type": "WarmupLR"}}, "'scheduler'", "heads.<name>.schedule"),
            ({"bf16": {"enabled": True}}, "'bf16'", "engine.precision"),
            ({"fp16": {}}, "'fp16'", "engine.precision"),
            ({"torch_autocast": {"enabled": True}}, "torch_autocast", "float32"),
            ({"zero_optimisation": {"stage": 1}}, "zero_optimisation", "not passed on"),
            ({"zero_optimization": {"stage": 0}}, "stage to 0", "'accelerate'"),
            ({"zero_optimization": 2}, "zero_optimization is 2", "object"),
            ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param.device to cpu", "optimizer"),
            ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "to nvme", "'cpu'"),
            ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "all or nothing", "ratio"),
            ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights", "True"),
        ],
    )
    def test_contradictions_are_refused(self, settings, found, wanted) -> None:
        with pytest.raises(LaunchError) as error:
            merge(settings)
        for words in ("my.json", found, wanted):
            assert words in str(error.value)

    def test_stage(self) -> None:
        assert merge({}, zero_stage=3)["zero_optimization"]["stage"] == 3
        assert merge({})["zero_optimization"]["stage"] == 2
        with pytest.raises(LaunchError, match=r"stage to 1 but engine\.zero_stage is 3"):
            merge(load_json("zero1"), zero_stage=3)

    def test_bfloat16_is_torch_autocast(self) -> None:
        assert merge({}, precision="bfloat16")["torch_autocast"] == {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
        with pytest.raises(LaunchError, match=r"float16.*bfloat16"):
            merge({"torch_autocast": {"enabled": True, "dtype": "float16"}}, precision="bfloat16")

    def test_offload_keeps_torch_adamw(self) -> None:
        merged = merge({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
        assert merged["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
        assert merged["zero_force_ds_cpu_optimizer"] is False

    def test_which_file(self, tmp_path) -> None:
        mine = tmp_path / "mine.json"
        mine.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
        recipe = EngineConfig(deepspeed_config=str(mine))
        assert read_settings(recipe, {}) == ({"zero_optimization": {"stage": 1}}, f"engine.deepspeed_config {mine}")
        assert read_settings(EngineConfig(kind="deepspeed"), {})[1] == "configs/deepspeed/zero2.json"
        assert read_settings(EngineConfig(zero_stage=3), {})[1] == "configs/deepspeed/zero3.json"
        launcher = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}
        assert read_settings(EngineConfig(), launcher)[1] == "configs/deepspeed/zero1.json"
        given = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(mine)}
        assert read_settings(EngineConfig(), given)[0] == {"zero_optimization": {"stage": 1}}
        assert read_settings(recipe, launcher)[0] == {"zero_optimization": {"stage": 1}}
        with pytest.raises(LaunchError, match=r"zero_optimization\.stage 3 .* says 1"):
            read_settings(recipe, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"})
        with pytest.raises(LaunchError, match="zero_stage is 0"):
            read_settings(EngineConfig(), {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"})

    def test_accelerate_fields(self) -> None:
        environ = {
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
            "ACCELERATE_GRADIENT_CLIPPING": "2.0",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        }
        settings, _ = read_settings(EngineConfig(), environ)
        assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
        assert settings["gradient_clipping"] == 2.0
        assert "gradient_accumulation_steps" not in settings
        with pytest.raises(LaunchError, match=r"2\.0.*1\.5"):
            merge(settings)

    def test_bad_files(self, tmp_path) -> None:
        with pytest.raises(LaunchError, match=r"nowhere\.json.*zero1"):
            load_json(str(tmp_path / "nowhere.json"))
        broken = tmp_path / "broken.json"
        broken.write_text('{"zero_optimization": ')
        with pytest.raises(LaunchError, match=r"broken\.json is malformed"):
            load_json(str(broken))
        broken.write_text("[1]")
        with pytest.raises(LaunchError, match="list"):
            load_json(str(broken))
        broken.write_bytes(b"\xff\xfe{")
        with pytest.raises(LaunchError, match=r"broken\.json is malformed"):
            load_json(str(broken))

    def test_refused_before_deepspeed_is_imported(self, tmp_path) -> None:
        mine = tmp_path / "mine.json"
        mine.write_text(json.dumps({"train_batch_size": 5}))
        with pytest.raises(LaunchError, match=r"train_batch_size to 5 .* 4"):
            make_engine(deepspeed_config=str(mine))


class TestState:
    def test_round_trip_continues_exactly(self) -> None:
        one = make_engine()
        one.train()
        for seed in range(3):
            take_step(one, seed)
        state = one.export_state()
        assert state.step == 3
        kept = copy.deepcopy(state)
        expected = [take_step(one, seed) for seed in range(3, 6)]
        # What was exported does not change as training goes on.
        for part in ("parameters", "exp_avg", "exp_avg_sq", "buffers"):
            for name, value in getattr(kept, part).items():
                assert torch.equal(value, getattr(state, part)[name])
        two = make_engine()
        two.train()
        take_step(two, 77)
        two.import_state(state)
        assert [take_step(two, seed) for seed in range(3, 6)] == expected
        found, wanted = two.export_state(), one.export_state()
        for part in ("parameters", "exp_avg", "exp_avg_sq", "buffers"):
            for name, value in getattr(wanted, part).items():
                assert torch.equal(value, getattr(found, part)[name])
        assert found.step == wanted.step == 6

    def test_import_drops_gradients(self) -> None:
        engine = make_engine(accumulation=2)
        engine.train()
        state = engine.export_state()
        features = [torch.randn(2, 3)]
        engine.backward(engine(features, None, lambda name, count: count)["loss"])
        engine.import_state(state)
        assert all(parameter.grad is None for parameter in engine.head.parameters())

    @pytest.mark.parametrize(
        ("part", "name", "value", "words"),
        [
            ("parameters", "out.weight", None, "parameters.*out.weight is missing"),
            ("parameters", "extra", torch.zeros(1), "parameters.*extra is unexpected"),
            ("exp_avg", "out.weight", torch.zeros(2, 4), r"exp_avg.*\(2, 4\).*\(2, 3\)"),
            ("exp_avg_sq", "norm.bias", None, "exp_avg_sq.*norm.bias is missing"),
            ("buffers", "mean", torch.zeros(3), r"buffers.*\(3,\).*\(2,\)"),
        ],
    )
    def test_another_heads_state(self, part, name, value, words) -> None:
        engine = make_engine()
        state = engine.export_state()
        if value is None:
            del getattr(state, part)[name]
        else:
            getattr(state, part)[name] = value
        before = engine.export_state()
        with pytest.raises(CheckpointError, match=words):
            engine.import_state(state)
        after = engine.export_state()
        assert all(torch.equal(before.parameters[key], after.parameters[key]) for key in before.parameters)

    def test_negative_step(self) -> None:
        with pytest.raises(CheckpointError, match="-1"):
            HeadState({}, {}, {}, {}, step=-1).require_fit({}, {})

    def test_evaluation_keeps_no_graph(self) -> None:
        engine = make_engine()
        engine.train(False)
        output = engine([torch.randn(4, 3)], None, None)
        assert not output.requires_grad
        assert not engine.head.training

    def test_learning_rate_of_each_step(self) -> None:
        engine = make_engine()
        engine.train()
        before = engine.export_state()
        engine.backward(engine([torch.randn(4, 3)], None, lambda name, count: count)["loss"])
        engine.step(0.0)
        after = engine.export_state()
        assert after.step == 1
        assert all(torch.equal(before.parameters[key], after.parameters[key]) for key in before.parameters)
        assert any(moment.any() for moment in after.exp_avg.values())


@pytest.mark.gpu
@pytest.mark.parametrize("engine", [{}, {"kind": "deepspeed"}, {"deepspeed_config": "zero3"}])
def test_cuda(engine) -> None:
    """On a GPU: the same first step as on the CPU, bfloat16 by default, and a state that goes to the CPU and back."""
    from permafrost.launcher.ranks.process_group import join_process_group

    reference = make_engine()
    reference.train()
    start = reference.export_state()
    expected = [take_step(reference, seed) for seed in range(4)]
    group = join_process_group("cuda")
    optimizer = OptimizerConfig()
    found = {}
    for precision in ("float32", "auto"):
        built = build_engine(
            LinearHead(),
            optimizer=optimizer,
            engine=EngineConfig(precision=precision, **engine),
            group=group,
            global_batch=4,
        )
        built.train()
        built.import_state(start)
        losses = []
        for seed in range(4):
            features = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).cuda()]
            loss = built(features, None, lambda name, count: count)["loss"]
            built.backward(loss)
            built.step(0.01)
            losses.append(loss.item())
        state = built.export_state()
        assert state.step == 4
        assert all(value.device.type == "cpu" for value in state.exp_avg_sq.values())
        found[built.precision] = losses
    assert found["float32"] == pytest.approx(expected, rel=1e-5)
    assert found["bfloat16"] == pytest.approx(expected, rel=5e-2)
    group.close()
