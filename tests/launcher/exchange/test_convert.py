"""`permafrost convert`: what it says, and that its result is the same network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from permafrost.launcher.cli import main
from permafrost.model import load_backbone
from permafrost.model.swin.v2 import SwinV2Classifier
from permafrost.model.swin.weights import draw_weights, save_weights
from permafrost.model.weights.architecture import infer_architecture
from permafrost.model.weights.read import read_weights
from permafrost.model.weights.shards import MANIFEST_NAME


def drawn(**settings) -> tuple[SwinV2Classifier, dict[str, Tensor]]:
    """A nano classifier and its state dict, with values of its own in every parameter."""
    model = SwinV2Classifier("swinv2_nano", num_classes=7, **settings)
    state = dict(draw_weights(model, seed=3))
    model.load_state_dict(state)
    return model, state


@pytest.fixture
def simmim(tmp_path: Path) -> Path:
    """A SimMIM pretraining checkpoint of 192 pixels and window 12, as its code writes it."""
    _, state = drawn()
    content = {f"encoder.{name}".replace("cpb_mlp", "rpe_mlp"): tensor for name, tensor in state.items()}
    for stage, (depth, window) in enumerate(zip((2, 2, 4, 2), (12, 12, 12, 6), strict=True)):
        offset = torch.arange(1 - window, window) * (8.0 / (window - 1))
        axis = torch.sign(offset) * torch.log2(offset.abs() + 1) / 3.0
        table = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)[None]
        for block in range(depth):
            content[f"encoder.layers.{stage}.blocks.{block}.attn.relative_coords_table"] = table
    content |= {"encoder.mask_token": torch.zeros(1, 1, 32), "decoder.0.weight": torch.zeros(3072, 256, 1, 1)}
    torch.save({"model": content, "epoch": 1}, tmp_path / "simmim.pth")
    return tmp_path / "simmim.pth"


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (1, 3, 96, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_result_is_the_same_network(simmim, tmp_path, pixels, capsys) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(simmim), str(out), "--max-shard-size", "3MB"]) == 0
    text = capsys.readouterr().out
    assert "names         official names; prefix 'encoder.' taken off; rpe_mlp read as cpb_mlp; entry 'model'" in text
    assert "Swin V2, swinv2_nano: width 32, depths (2, 2, 4, 2), heads (1, 2, 4, 8)" in text
    assert "extra norms   none" in text
    assert "windows       (12, 12, 12, 6)" in text
    assert "pretrained    (12, 12, 12, 6)" in text
    assert "dropped       decoder.0.weight, encoder.mask_token" in text
    assert f"--backbone.name swinv2_nano --backbone.weights {out}" in text

    before, after = (load_backbone("swinv2_nano", weights=path) for path in (simmim, out))
    assert after.fingerprint == before.fingerprint
    for field in ("window_size", "pretrained_window_size", "trained_window_size", "extra_norm_interval"):
        assert after.describe()[field] == before.describe()[field]
    assert all(torch.equal(*pair) for pair in zip(after(pixels), before(pixels), strict=True))
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    assert manifest["architecture"]["depths"] == [2, 2, 4, 2]
    assert manifest["architecture"]["num_classes"] == 7
    assert len(manifest["shards"]) >= 3
    assert str(tmp_path) not in "".join(file.read_text(errors="ignore") for file in out.iterdir())


def test_bfloat16_result_gives_the_features_of_loading_in_bfloat16(simmim, tmp_path, pixels) -> None:
    assert main(["convert", str(simmim), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    before, after = (
        load_backbone("swinv2_nano", weights=path, dtype=torch.bfloat16) for path in (simmim, tmp_path / "out")
    )
    assert before.checksum() == after.checksum()
    assert all(torch.equal(*pair) for pair in zip(after(pixels), before(pixels), strict=True))
    dtypes = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        dtypes |= {name: tensor.dtype for name, tensor in load_file(file).items()}
    assert dtypes["layers.0.blocks.0.attn.cpb_mlp.0.weight"] == torch.float32
    assert dtypes["layers.0.blocks.0.attn.qkv.weight"] == torch.bfloat16


def test_what_our_own_file_says_is_kept(tmp_path, pixels, capsys) -> None:
    model, _ = drawn(window_size=6, pretrained_window_size=(6, 6, 6, 3), extra_norm_interval=2)
    extra = {"image_size": 96, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "provenance": "a test"}
    save_weights(model, tmp_path / "own.safetensors", extra, torch.float32)
    assert main(["convert", str(tmp_path / "own.safetensors"), str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "extra norms   every 2 blocks" in text
    assert "classifier    7 classes" in text
    before, after = (read_weights(tmp_path / name) for name in ("own.safetensors", "out"))
    metadata = dict(after.metadata)
    assert metadata.pop("converted_from") == "own.safetensors"
    assert metadata.pop("format") == "pt"
    assert metadata == before.metadata
    assert after.windows == before.windows
    one, two = (load_backbone("swinv2_nano", weights=tmp_path / name) for name in ("own.safetensors", "out"))
    assert one.describe()["mean"] == two.describe()["mean"] == (0.5, 0.4, 0.3)
    assert all(torch.equal(*pair) for pair in zip(one(pixels), two(pixels), strict=True))
    # The result is a valid input.
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    assert load_backbone("swinv2_nano", weights=tmp_path / "again").fingerprint == one.fingerprint


def timm_file(tmp_path: Path, name: str) -> Path:
    nano = {"img_size": 128, "embed_dim": 32, "depths": (2, 2, 4, 2), "num_heads": (1, 2, 4, 8), "window_size": 4}
    torch.save(timm.create_model(name, num_classes=0, **nano).state_dict(), tmp_path / "timm.pth")
    return tmp_path / "timm.pth"


def test_windows_that_a_file_does_not_state(tmp_path, capsys) -> None:
    path = str(timm_file(tmp_path, "swinv2_tiny_window8_256"))
    assert main(["convert", path, str(tmp_path / "silent")]) == 0
    assert "windows       not stated; whoever loads the result has to say it" in capsys.readouterr().out
    assert read_weights(tmp_path / "silent").windows.window_size is None
    given = ["--window-size", "4", "--pretrained-window-size", "4", "4", "4", "4"]
    assert main(["convert", path, str(tmp_path / "said"), *given]) == 0
    load_backbone("swinv2_nano", weights=tmp_path / "said")
    assert main(["convert", str(tmp_path / "said"), str(tmp_path / "other"), "--window-size", "8"]) == 2
    assert "says window_size=(4, 4, 4, 4), not (8, 8, 8, 8)" in capsys.readouterr().err


def test_swin_v1(tmp_path, capsys) -> None:
    path = str(timm_file(tmp_path, "swin_tiny_patch4_window7_224"))
    assert main(["convert", path, str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "names         timm names" in text
    assert "Swin V1, of no known size: width 32" in text
    assert "windows       (4, 4, 4, 4)" in text
    assert "pretrained" not in text
    before, after = read_weights(path), read_weights(tmp_path / "out")
    assert after.windows == before.windows
    assert set(after.tensors) == set(before.tensors)
    assert "layers.0.downsample.reduction.weight" in after.tensors


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("swin_tiny_patch4_window7_224", {}, (1, 96, (2, 2, 6, 2), (3, 6, 12, 24), 1000, "swin_tiny")),
        ("swin_large_patch4_window7_224", {}, (1, 192, (2, 2, 18, 2), (6, 12, 24, 48), 1000, "swin_large")),
        ("swinv2_base_window8_256", {"num_classes": 0}, (2, 128, (2, 2, 18, 2), (4, 8, 16, 32), None, "swinv2_base")),
        ("swinv2_tiny_window8_256", {"depths": (2, 2, 2, 2)}, (2, 96, (2, 2, 2, 2), (3, 6, 12, 24), 1000, None)),
    ],
)
def test_architecture_is_told_from_shapes(name: str, settings: dict, expected: tuple) -> None:
    with torch.device("meta"):
        state = timm.create_model(name, **settings).state_dict()
    shapes = {key.replace("head.fc", "head"): tuple(tensor.shape) for key, tensor in state.items()}
    found = infer_architecture(shapes, source="here")
    assert found.extra_norm_interval == 0
    kept = (found.version, found.embed_dim, found.depths, found.num_heads, found.num_classes, found.name)
    assert kept == expected


def spoil(path: Path, change: Callable[[dict], None]) -> None:
    content = torch.load(path)
    change(content["model"])
    torch.save(content, path)


def test_nothing_is_left_of_a_failed_conversion(simmim, tmp_path, capsys) -> None:
    spoil(simmim, lambda state: state["encoder.layers.3.blocks.1.norm2.bias"].fill_(torch.nan))
    assert main(["convert", str(simmim), str(tmp_path / "out"), "--max-shard-size", "1MB"]) == 2
    assert "not finite (NaN or infinite) in layers.3.blocks.1.norm2.bias" in capsys.readouterr().err
    spoil(simmim, lambda state: state["encoder.layers.3.blocks.1.norm2.bias"].fill_(1e6))
    assert main(["convert", str(simmim), str(tmp_path / "out"), "--dtype", "float16"]) == 2
    assert "overflows in float16" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["simmim.pth"]


def test_a_damaged_shard_is_not_passed_on(simmim, tmp_path, capsys) -> None:
    assert main(["convert", str(simmim), str(tmp_path / "out"), "--max-shard-size", "3MB"]) == 0
    # The first shard holds the classifier, which a backbone is loaded without.
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert f"Damaged: {shard.name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pth", "out"], "There are no weights 'nowhere.pth'"),
        (["{file}", "{folder}"], "exists and is not an empty folder"),
        (["{file}", "out", "--prefix", "teacher."], "no tensor's name starts with 'teacher.'"),
        (["{file}", "out", "--weights-key", "ema"], "no entry 'ema'"),
        (["{file}", "out", "--max-shard-size", "some"], "'some' is not a size"),
        (["{file}", "out", "--max-shard-size", "0.1"], "'0.1' is not a size"),
        (["{file}", "out", "--window-size", "8", "8"], "window_size must be one integer"),
        (["{file}", "out", "--dytpe", "float32"], "did you mean --dtype"),
        (["{file}"], "required: OUT"),
    ],
)
def test_mistakes(simmim, tmp_path, monkeypatch, capsys, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    given = [text.format(file=simmim, folder=tmp_path) for text in arguments]
    assert main(["convert", *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_swin_is_refused(tmp_path, capsys) -> None:
    torch.save({"conv1.weight": torch.zeros(2, 3, 7, 7)}, tmp_path / "resnet.pth")
    assert main(["convert", str(tmp_path / "resnet.pth"), str(tmp_path / "out")]) == 2
    assert "holds no complete Swin: expected patch_embed.proj.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
