"""Weights in the conventions of other code bases: the same features as that code computes, or the official file's fingerprint."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from permafrost.model import WeightsError, load_backbone
from permafrost.model.swin.v2 import SwinV2
from permafrost.model.weights.read import read_weights

WINDOWS = {"window_size": 4, "pretrained_window_size": (4, 4, 4, 2)}
IMAGE = 64
TIMM_NANO = {"img_size": IMAGE, "embed_dim": 32, "depths": (2, 2, 4, 2), "num_heads": (1, 2, 4, 8), "window_size": 4}
HF_NANO = {"image_size": IMAGE, "embed_dim": 32, "depths": [2, 2, 4, 2], "num_heads": [1, 2, 4, 8], "window_size": 4}


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (2, 3, IMAGE, IMAGE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def renamed(rename: Callable[[str], str], **extra: Tensor) -> Callable[[dict], None]:
    """Changes a state dict's names, and adds tensors to it."""

    def change(state: dict) -> None:
        for name in list(state):
            state[rename(name)] = state.pop(name)
        state.update({name.replace("__", "."): tensor for name, tensor in extra.items()})

    return change


def change_file(path: Path, change: Callable[[dict], dict]) -> Path:
    torch.save(change(torch.load(path)), path)
    return path


# --- networks of others


def timm_v2(randomise: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return randomise(timm.create_model("swinv2_tiny_window8_256", num_classes=10, **TIMM_NANO)).eval()


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped", "native"])
def test_timm_file_gives_timms_features(tmp_path, randomise, relative_error, pixels, kind: str) -> None:
    model = timm_v2(randomise)
    path = tmp_path / f"model.{kind}"
    state = model.state_dict()
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "wrapped":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, path)
    else:
        torch.save(state, path)
    with pytest.raises(WeightsError, match="does not say with which windows"):
        load_backbone("swinv2_nano", weights=path)
    backbone = load_backbone("swinv2_nano", weights=path, **WINDOWS)
    normalised = (pixels / 255.0 - backbone.mean[:, None, None]) / backbone.std[:, None, None]
    expected = model.forward_intermediates(normalised, intermediates_only=True)
    for found, other in zip(backbone(pixels), expected, strict=True):
        assert relative_error(found, other) < 1e-5
    described = backbone.describe()
    assert described["names"].startswith("timm names")
    assert described["left_out"] == ["head.bias", "head.weight", "norm.bias", "norm.weight"]


@pytest.mark.parametrize("window", [8, 4])
@pytest.mark.parametrize("kind", ["Swinv2Model", "Swinv2ForImageClassification", "Swinv2ForMaskedImageModeling"])
def test_hugging_face_folder_gives_its_features(
    tmp_path, randomise, relative_error, pixels, kind: str, window: int
) -> None:
    settings = HF_NANO | {"window_size": window, "pretrained_window_sizes": [window, window, window, 2]}
    model = randomise(getattr(transformers, kind)(transformers.Swinv2Config(**settings))).eval()
    # Small shards: the folder then has an index.
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    backbone = load_backbone("swinv2_nano", weights=tmp_path)
    assert backbone.network.pretrained_window_size == (window, window, window, 2)
    # Stage 3 has a map of 4 x 4, stage 4 of 2 x 2.
    assert backbone.describe()["trained_window_size"] == (window, min(window, 8), 4, 2)
    normalised = (pixels / 255.0 - backbone.mean[:, None, None]) / backbone.std[:, None, None]
    network = model if kind == "Swinv2Model" else model.swinv2
    network.encoder.config.output_hidden_states = True
    with torch.no_grad():
        output = network.encoder(
            *network.embeddings(normalised), output_hidden_states=True, output_hidden_states_before_downsampling=True
        )
    # The first is the embedding, before any stage.
    for found, other in zip(backbone(pixels), output.reshaped_hidden_states[1:], strict=True):
        assert relative_error(found, other) < 1e-5
    described = backbone.describe()
    assert described["names"].startswith("Hugging Face names")
    heads = {
        "Swinv2Model": [],
        "Swinv2ForImageClassification": ["head.bias", "head.weight"],
        "Swinv2ForMaskedImageModeling": ["decoder.0.bias", "decoder.0.weight", "swinv2.embeddings.mask_token"],
    }
    assert described["left_out"] == sorted([*heads[kind], "norm.bias", "norm.weight"])


def test_hugging_face_windows_must_be_stated_without_its_configuration(tmp_path, randomise) -> None:
    model = randomise(transformers.Swinv2Model(transformers.Swinv2Config(**HF_NANO)))
    model.save_pretrained(tmp_path)
    expected = load_backbone("swinv2_nano", weights=tmp_path)
    assert expected.network.pretrained_window_size == (4, 4, 4, 2)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["window_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"config\.json does not say the windows"):
        load_backbone("swinv2_nano", weights=tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match="does not say with which windows"):
        load_backbone("swinv2_nano", weights=tmp_path)
    again = load_backbone("swinv2_nano", weights=tmp_path / "model.safetensors", **WINDOWS)
    assert again.fingerprint == expected.fingerprint


def test_hugging_face_query_without_key_is_refused(tmp_path, randomise) -> None:
    state = transformers.Swinv2Model(transformers.Swinv2Config(**HF_NANO)).state_dict()
    del state["encoder.layers.0.blocks.1.attention.self.key.weight"]
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"a query without layers\.0\.blocks\.1\.attn\.key\.weight"):
        read_weights(tmp_path / "model.pth")


def official_v1(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A timm V1 state dict under the names of the original code, written out by hand."""
    official = {}
    for name, tensor in state.items():
        for stage in (1, 2, 3):
            name = name.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample#")
        official[name.replace("#", "").replace("head.fc", "head")] = tensor
    return official


@pytest.mark.parametrize("kind", ["timm", "SwinModel", "SwinForImageClassification", "SwinBackbone", "in memory"])
def test_v1_files_are_read_under_official_names(tmp_path, randomise, kind: str) -> None:
    original = randomise(
        timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **TIMM_NANO | {"img_size": 128})
    )
    expected = official_v1(original.state_dict())
    assert {"layers.0.blocks.1.attn.relative_position_bias_table", "layers.0.downsample.norm.weight"} <= set(expected)
    if kind == "timm":
        torch.save(original.state_dict(), tmp_path / "model.pth")
        path = tmp_path / "model.pth"
    else:
        model_class = getattr(transformers, "SwinModel" if kind == "in memory" else kind)
        model = randomise(model_class(transformers.SwinConfig(**HF_NANO | {"image_size": 128})))
        path = tmp_path
        if kind == "in memory":
            path = tmp_path / "model.pth"
            torch.save(model.state_dict(), path)
        else:
            model.save_pretrained(tmp_path)
    checkpoint = read_weights(path)
    found = dict(checkpoint.tensors)
    assert {name for name in found if not name.startswith(("head.", "norm."))} == {
        name for name in expected if not name.startswith(("head.", "norm."))
    }
    assert {name: tensor.shape for name, tensor in found.items() if name in expected} == {
        name: tensor.shape for name, tensor in expected.items() if name in found
    }
    assert checkpoint.windows.window_size == (4, 4, 4, 4)
    if kind == "timm":
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    else:
        name = "layers.2.blocks.3.attn"
        own = "encoder.layers.2.blocks.3.attention."
        state = {key.removeprefix("swin."): tensor for key, tensor in model.state_dict().items()}
        queries = [
            next(state[key] for key in state if key.startswith(own) and f"{part}" in key and key.endswith(".bias"))
            for part in ("q_proj", "k_proj", "v_proj")
        ]
        assert torch.equal(found[f"{name}.qkv.bias"], torch.cat(queries))
        if kind == "SwinBackbone":
            assert "hidden_states_norms.stage4.weight" in checkpoint.dropped


# --- the official convention, wrapped


def test_simmim_file_is_the_official_one(official_file) -> None:
    expected = load_backbone("swinv2_nano", weights=official_file()).fingerprint
    change = renamed(
        lambda name: f"encoder.{name}".replace("cpb_mlp", "rpe_mlp"),
        encoder__mask_token=torch.zeros(1, 1, 32),
        decoder__0__weight=torch.zeros(3072, 256, 1, 1),
        decoder__0__bias=torch.zeros(3072),
    )
    backbone = load_backbone("swinv2_nano", weights=official_file(change=change))
    assert backbone.fingerprint == expected
    assert backbone.network.pretrained_window_size == (12, 12, 12, 6)
    described = backbone.describe()
    assert "prefix 'encoder.' taken off; rpe_mlp read as cpb_mlp" in described["names"]
    assert "entry 'model' of the checkpoint" in described["names"]
    beside = ["decoder.0.bias", "decoder.0.weight", "encoder.mask_token"]
    assert described["left_out"] == sorted([*beside, "head.bias", "head.weight", "norm.bias", "norm.weight"])


def test_esvit_file_gives_the_teacher_unless_told_otherwise(official_file) -> None:
    expected = load_backbone("swinv2_nano", weights=official_file()).fingerprint

    def checkpoint(content: dict) -> dict:
        teacher = {name: tensor for name, tensor in content["model"].items() if not name.startswith("head.")}
        teacher |= {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.zeros(2, 1)}
        teacher |= {"head_dense.mlp.0.weight": torch.zeros(2, 2)}
        student = {f"module.{name}": tensor + 1 for name, tensor in copy.deepcopy(teacher).items()}
        others = {"epoch": 1, "args": argparse.Namespace(arch="swin", lr=0.1), "optimizer": {"state": {}}}
        return {"student": student, "teacher": teacher, **others}

    path = change_file(official_file(), checkpoint)
    teacher = load_backbone("swinv2_nano", weights=path)
    assert teacher.fingerprint == expected
    described = teacher.describe()
    assert "entry 'teacher' of the checkpoint; not loaded: objects of argparse.Namespace" in described["names"]
    assert {"head.mlp.0.weight", "head.last_layer.weight_g", "head_dense.mlp.0.weight"} <= set(described["left_out"])

    student = read_weights(path, weights_key="student")
    assert "prefix 'module.' taken off; entry 'student'" in student.rule
    shift = student.tensors["layers.0.blocks.0.attn.q_bias"] - teacher.network.layers[0].blocks[0].attn.q_bias
    assert torch.allclose(shift, torch.ones_like(shift))
    with pytest.raises(WeightsError, match=r"no entry 'pupil', which weights_key asks for; it holds args, epoch"):
        read_weights(path, weights_key="pupil")


def test_detection_file_is_the_official_one(official_file) -> None:
    expected = load_backbone("swinv2_nano", weights=official_file()).fingerprint
    norms = {f"backbone__norm{level}__weight": torch.ones(32 * 2**level) for level in range(4)}
    necks = {f"neck__convs__{level}__weight": torch.zeros(2) for level in range(20)}

    def wrap(state: dict) -> None:
        for name in [name for name in state if name.startswith(("head.", "norm."))]:
            del state[name]
        renamed(lambda name: f"backbone.{name}", **norms, **necks)(state)

    backbone = load_backbone("swinv2_nano", weights=official_file(change=wrap))
    assert backbone.fingerprint == expected
    assert backbone.describe()["left_out"] == ["backbone.* (4)", "neck.* (20)"]


@pytest.mark.parametrize("prefix", ["module.backbone.", "backbone.bottom_up.", "model.encoder.", "_orig_mod."])
def test_wrappers_are_taken_off(official_file, prefix: str) -> None:
    expected = load_backbone("swinv2_nano", weights=official_file()).fingerprint
    path = official_file(change=renamed(lambda name: prefix + name))
    backbone = load_backbone("swinv2_nano", weights=path)
    assert backbone.fingerprint == expected
    assert f"prefix {prefix!r} taken off" in backbone.describe()["names"]


def test_two_networks_in_a_file_are_ambiguous(official_file) -> None:
    expected = load_backbone("swinv2_nano", weights=official_file()).fingerprint

    def double(state: dict) -> None:
        for name, tensor in list(state.items()):
            del state[name]
            state[f"student.{name}"] = tensor * 2
            state[f"teacher.{name}"] = tensor

    path = official_file(change=double)
    with pytest.raises(WeightsError, match=r"the prefixes 'student\.', 'teacher\.' all fit.*with prefix='teacher\.'"):
        load_backbone("swinv2_nano", weights=path)
    assert load_backbone("swinv2_nano", weights=path, prefix="teacher.").fingerprint == expected
    both = {"patch_embed.proj.weight": torch.zeros(1), "encoder.patch_embed.proj.weight": torch.zeros(1)}
    torch.save(both, path)
    with pytest.raises(WeightsError, match=r"prefixes '', 'encoder\.' all fit"):
        read_weights(path)


def test_weights_key_needs_a_checkpoint_dictionary(tmp_path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="is no PyTorch checkpoint, so it has no entry 'teacher'"):
        read_weights(tmp_path / "model.safetensors", weights_key="teacher")
    torch.save([1], tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="it holds list"):
        read_weights(tmp_path / "model.pth", weights_key="teacher")


def test_nothing_is_left_out_in_silence(official_file) -> None:
    """Names that belong to nothing known are an error, not left out."""
    path = official_file(change=renamed(lambda name: name, adapter__weight=torch.zeros(2)))
    with pytest.raises(WeightsError, match=r"1 unexpected: adapter\.weight"):
        load_backbone("swinv2_nano", weights=path)


def test_one_tensor_under_two_names_is_refused(official_file) -> None:
    extra = {"layers__0__blocks__1__attn__rpe_mlp__0__bias": torch.zeros(512)}
    with pytest.raises(WeightsError, match=r"holds layers\.0\.blocks\.1\.attn\.cpb_mlp\.0\.bias twice"):
        read_weights(official_file(change=renamed(lambda name: name, **extra)))


def test_tensors_are_read_when_used(tmp_path, randomise) -> None:
    state = {name: value.detach().clone() for name, value in randomise(SwinV2("swinv2_nano")).state_dict().items()}
    state["layers.3.blocks.1.mlp.fc2.weight"][3, 5] = torch.nan
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = read_weights(tmp_path / "model.safetensors")
    assert checkpoint.tensors.shapes["patch_embed.proj.weight"] == (32, 3, 4, 4)
    assert torch.equal(checkpoint.tensors["patch_embed.proj.weight"], state["patch_embed.proj.weight"])
    for read in (
        lambda: checkpoint.tensors["layers.3.blocks.1.mlp.fc2.weight"],
        lambda: load_backbone("swinv2_nano", weights=tmp_path / "model.safetensors", **WINDOWS),
    ):
        with pytest.raises(WeightsError, match=r"not finite .* in layers\.3\.blocks\.1\.mlp\.fc2\.weight;"):
            read()
