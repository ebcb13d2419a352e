"""backbone.attention: every way to attend gives the network's maps, and what is chosen is said."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from permafrost.launcher.cli import main
from permafrost.model import BackboneConfig, BackboneError, load_backbone
from permafrost.model.errors import KernelError
from permafrost.model.kernels import selection
from permafrost.model.kernels.verified import VERIFIED, Verified

RECIPE = f"{Path(__file__).parents[1] / 'launcher' / 'tiny_recipe.py'}:tiny"
# Shifted and padded in the first stages, a window of the map's shorter side in the last.
MAPS = {
    "padded": ("swinv2_nano", 8, (2, 75, 106)),
    "whole windows": ("swinv2_nano", 4, (1, 64, 64)),
    "a window per stage": ("swinv2_nano", (7, 5, 4, 2), (1, 90, 63)),
    "smaller than a window": ("swinv2_nano", 12, (1, 33, 47)),
    "V1, padded": ("swin_tiny", 7, (1, 45, 66)),
    "V1, a window per stage": ("swin_tiny", (6, 7, 4, 3), (1, 44, 57)),
}


def images(batch: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("name", "window", "size"), MAPS.values(), ids=MAPS)
def test_the_reference_gives_the_same_maps(name, window, size, relative_error) -> None:
    own = {"weights": "random", "window_size": window, "dtype": torch.float64}
    found = load_backbone(name, attention="reference", **own)(images(*size))
    expected = load_backbone(name, attention="sdpa", **own)(images(*size))
    assert max(relative_error(*pair) for pair in zip(found, expected, strict=True)) < 1e-12
    assert all(one.stride() == other.stride() for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("version", [1, 2])
def test_triton_gives_the_same_maps(interpreter, version: int) -> None:
    """Shifted, padded, and in V1 with padded tokens that have keys of their own."""
    outcome = interpreter("network", version=version)
    assert max(outcome["errors"]) < 1e-5
    assert outcome["attention"].startswith("triton (as asked for)")
    assert outcome["residual_norm"] == (None if version == 1 else "triton (as asked for)")


def test_auto_is_sdpa_to_the_bit_on_a_cpu(relative_error) -> None:
    assert not any(row.architecture == 0 for row in VERIFIED)
    own = {"weights": "random", "window_size": 6}
    auto, asked = load_backbone("swinv2_nano", **own), load_backbone("swinv2_nano", attention="sdpa", **own)
    for one, other in zip(auto(images(1, 70, 101)), asked(images(1, 70, 101)), strict=True):
        assert torch.equal(one, other)
    assert auto.describe()["attention"].startswith("sdpa (kernels are for GPUs, the network is on cpu)")
    assert asked.describe()["attention"].startswith("sdpa (as asked for)")


@pytest.mark.parametrize("kernel", ["triton", "cuda"])
def test_a_kernel_that_cannot_run_here_is_an_error(kernel: str) -> None:
    told = rf"backbone\.attention is '{kernel}', which does not run here: it runs on a GPU.* 'sdpa' or 'auto'"
    with pytest.raises(KernelError, match=told):
        load_backbone("swinv2_nano", weights="random", attention=kernel)


def test_the_command_exits_with_2(tmp_path: Path, capsys) -> None:
    arguments = ["train", RECIPE, "--output", str(tmp_path / "run"), "--backbone.attention"]
    assert main([*arguments, "cuda"]) == 2
    assert "backbone.attention is 'cuda', which does not run here" in capsys.readouterr().err


def test_the_run_says_what_attends(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    fields = ["--loop.num-steps", "1", "--loop.checkpoint-every", "1"]
    assert main(["train", RECIPE, "--output", str(run), "--backbone.attention", "reference", *fields]) == 0
    assert "attention: reference (as asked for); position bias" in capsys.readouterr().out
    (start,) = [json.loads(line) for line in (run / "provenance.jsonl").read_text().splitlines()]
    assert start["backbone"]["attention"].startswith("reference (as asked for)")


def test_values_that_mean_nothing_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"backbone\.attention is 'flash': give one of auto, triton"):
        BackboneConfig("swinv2_nano", "random", attention="flash")
    with pytest.raises(BackboneError, match=r"backbone\.attention is 'sdpa', but timm/resnet18 is built as timm"):
        BackboneConfig("timm/resnet18", "random", attention="sdpa")


@pytest.mark.parametrize(("name", "window"), [("swinv2_nano", 5), ("swin_tiny", 3)])
def test_a_network_that_learns_takes_what_has_gradients(name: str, window: int, relative_error) -> None:
    own = {"weights": "random", "window_size": window}
    plain = load_backbone(name, frozen=False, attention="triton", **own)
    assert plain.describe()["attention"] == (
        "sdpa (a gradient is wanted, which the triton kernel asked for does not have)"
    )
    reference = load_backbone(name, frozen=False, attention="reference", **own)
    assert reference.describe()["attention"] == "reference (as asked for)"
    batch = images(1, 43, 61)
    gradients = []
    for one in (plain, reference):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sum(map_.square().mean() for map_ in one.eval()(batch)).backward()
        gradients.append({key: parameter.grad for key, parameter in one.named_parameters()})
    for key, found in gradients[1].items():
        assert relative_error(found, gradients[0][key]) < 1e-3, key
    assert load_backbone(name, frozen=False, **own).describe()["attention"].startswith("sdpa (a gradient is wanted")


class TestAutoOnAGpu:
    """The rule itself, on a machine without one."""

    @pytest.fixture(autouse=True)
    def card(self, monkeypatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)

    @staticmethod
    def choose(asked="auto", dtype=torch.bfloat16, learns=False, fails=()):
        tried = []

        def attempt(kernel: str) -> None:
            tried.append(kernel)
            if kernel in fails:
                raise ImportError(f"no {kernel} here")

        choice = selection.choose_kernel(
            asked,
            field="backbone.attention",
            op="window_attention",
            plain="sdpa",
            dtype=dtype,
            device=torch.device("cuda", 0),
            learns=learns,
            attempt=attempt,
        )
        return choice, tried

    def test_without_a_row_it_is_sdpa_and_says_so(self, monkeypatch) -> None:
        monkeypatch.setattr(selection, "VERIFIED", ())
        choice, tried = self.choose()
        assert str(choice) == (
            "sdpa (no kernel has been verified on sm_90 in bfloat16; backbone.attention asks for one)"
        )
        assert not tried

    def test_only_rows_of_this_op_architecture_and_dtype_count(self, monkeypatch) -> None:
        rest = ("a card", "2026-11-26", "2.15")
        rows = [
            Verified("residual_norm", "triton", 90, "bfloat16", *rest),
            Verified("window_attention", "triton", 80, "bfloat16", *rest),
            Verified("window_attention", "triton", 90, "float16", *rest),
        ]
        monkeypatch.setattr(selection, "VERIFIED", tuple(rows))
        assert self.choose()[0].kernel == "sdpa"
        right = [Verified("window_attention", kernel, 90, "bfloat16", *rest) for kernel in ("cuda", "triton")]
        monkeypatch.setattr(selection, "VERIFIED", (*rows, *right))
        choice, tried = self.choose()
        assert str(choice) == "cuda (verified on sm_90 in bfloat16, a card, 2026-11-26)"
        assert tried == ["cuda"]
        assert self.choose(fails=("cuda",))[0].kernel == "triton"
        # Nothing is hidden where none runs.
        choice, _ = self.choose(fails=("cuda", "triton"))
        assert choice.kernel == "sdpa"
        assert "ImportError: no cuda here" in choice.reason
        assert "ImportError: no triton here" in choice.reason
        assert self.choose(learns=True)[0].kernel == "sdpa"

    def test_an_explicit_choice_that_fails_is_an_error(self) -> None:
        assert self.choose("cuda")[0] == selection.Choice("cuda", "as asked for")
        with pytest.raises(KernelError, match=r"backbone\.attention is 'triton'.*ImportError: no triton here"):
            self.choose("triton", fails=("triton",))
