"""A backbone split over gloo ranks is the whole one: maps, weights, fingerprint, training; and faults reach every rank."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from permafrost.model import SwinV2Classifier, load_backbone, save_weights
from permafrost.model.swin.weights import draw_weights

pytestmark = pytest.mark.slow  # groups of processes, started for minutes in all


def random_classifier(name: str, seed: int) -> SwinV2Classifier:
    with torch.device("meta"):
        model = SwinV2Classifier(name, num_classes=3, window_size=8)
    model.load_state_dict(dict(draw_weights(model, seed=seed)), assign=True)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights files by what is the matter with them."""
    folder = tmp_path_factory.mktemp("weights")
    tiny = random_classifier("swinv2_tiny", 5)
    save_weights(tiny, folder / "tiny.safetensors", {}, dtype=torch.float32)
    torch.save({"model": tiny.state_dict()}, folder / "tiny.pth")
    for name, seed in (("good", 1), ("other", 2)):
        save_weights(random_classifier("swinv2_nano", seed), folder / f"{name}.safetensors", {}, dtype=torch.float32)
    good = (folder / "good.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(good[: len(good) * 2 // 3])
    tensors = safetensors.torch.load(good)
    broken = {key: value.clone() for key, value in tensors.items()}
    # The last column of the last block: no member's but the last one's.
    broken["layers.3.blocks.1.mlp.fc2.weight"][0, -1] = torch.nan
    large = {key: value.clone() for key, value in tensors.items()}
    large["layers.3.blocks.1.mlp.fc2.weight"][0, -1] = 1e6
    with safetensors.safe_open(folder / "good.safetensors", "pt") as file:
        header = file.metadata()
    safetensors.torch.save_file(broken, folder / "not_finite.safetensors", header)
    safetensors.torch.save_file(large, folder / "large.safetensors", header)
    return {path.stem if path.suffix != ".pth" else "pth": str(path) for path in folder.iterdir()} | {
        "missing": str(folder / "missing.safetensors")
    }


@pytest.fixture(scope="module")
def found(run_ranks: Callable, files: dict[str, str]) -> dict[str, Any]:
    """Return what four ranks found, in groups of two and of four."""
    given = {"files": [files["tiny"], files["pth"]], "faults": files}
    return run_ranks("tensor_worker.py", 4, given, timeout=240)


@pytest.mark.parametrize("degree", [2, 4])
def test_maps_are_those_of_the_whole_network(found: dict[str, Any], degree: int) -> None:
    for rank, errors in enumerate(found["errors"][degree]):
        assert len(errors) == 20
        for (network, dtype, batches), error in errors.items():
            limit = 1e-5 if dtype == "torch.float32" else 1e-13
            assert error < limit, (rank, network, batches)


def test_maps_in_several_passes_and_of_clips_are_those_of_the_whole_network(found: dict[str, Any]) -> None:
    for rank, errors in enumerate(found["passes"]):
        assert set(errors) == {"uneven", "counts", "none", *(["clips"] if rank % 2 else [])}
        assert max(errors.values()) < 1e-13, (rank, errors)


def test_maps_of_a_network_of_ones_own_size(found: dict[str, Any]) -> None:
    assert max(found["custom"]) < 1e-13


def test_the_ops_serve_the_heads_of_a_member(found: dict[str, Any]) -> None:
    assert max(found["attending"]) < 1e-13


def test_bfloat16_is_as_near_as_that_of_the_whole_network(found: dict[str, Any]) -> None:
    for errors in found["half"]:
        assert 1e-4 < errors["split"] < 1.3 * errors["whole"]


def test_detection_trains_the_same_in_float64(found: dict[str, Any]) -> None:
    split, whole = found["steps"]["split"], found["steps"]["whole"]
    assert len(whole) == 20
    for own, expected in zip(split, whole):
        assert own == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("degree", [2, 4])
def test_each_rank_holds_its_part_of_the_file_and_no_more(
    found: dict[str, Any], files: dict[str, str], degree: int
) -> None:
    whole = load_backbone("swinv2_tiny", weights=files["tiny"])
    whole_bytes = sum(parameter.numel() * parameter.element_size() for parameter in whole.parameters())
    largest = max(parameter.numel() * parameter.element_size() for parameter in whole.parameters())
    for rank in range(4):
        for suffix in (".safetensors", ".pth"):
            own = found["loading"][degree][rank][suffix]
            assert own["resident"] < whole_bytes * (1 / degree + 0.1)
            # What the process really grew by; pages of the mapped file are not counted.
            assert 0.9 * own["resident"] < own["grown"] < own["resident"] + 4 * 2**20
            # On the way there no rank, not the one that reads everything either, holds more than a tensor besides.
            assert own["peak"] < own["resident"] + 2 * largest
            assert own["fingerprint"] == whole.fingerprint
            assert own["described"]["num_parameters"] == whole.num_parameters
            assert own["described"]["tensor_degree"] == degree
            assert own["described"]["resident_parameters"] * 4 == own["resident"]
            assert own["described"]["weights"] == files["tiny" if suffix == ".safetensors" else "pth"]


def test_faults_of_one_rank_are_told_to_its_group(found: dict[str, Any]) -> None:
    # Ranks 0 and 1 are one group, 2 and 3 the other, where all is well unless all have the same file.
    first, odd, *others = found["faults"]
    assert "damaged safetensors file" in odd["truncated"]
    assert first["truncated"].startswith("WeightsError: Rank 1 of this tensor group could not load the backbone: ")
    assert "damaged safetensors file" in first["truncated"]
    assert "There are no weights" in odd["missing"]
    assert "There are no weights" in first["missing"]
    for own in (first, odd):
        assert "rank 1 of this tensor group reads other weights than the first one" in own["other"]
    assert odd["images"].startswith(
        "BackboneError: A backbone takes images of shape (B, 3, H, W) or clips of shape (B, T, 3, H, W), found (1, 4, 64, 64)"
    )
    assert first["images"].startswith("BackboneError: The backbone refuses the images of rank 1 of this tensor group")
    for own in others:
        assert {own[kind] for kind in ("truncated", "missing", "other", "images")} == {"nothing"}
    # Only the first of each group reads every value; only the last holds the one that overflows.
    for own in found["faults"]:
        assert "not finite (NaN or infinite) in layers.3.blocks.1.mlp.fc2.weight" in own["not_finite"]
        assert "layers.3.blocks.1.mlp.fc2.weight overflows in float16" in own["half"]


def test_a_damaged_file_on_one_rank_ends_every_process(
    run_command: Callable, clean_environment: Callable, free_port: Callable, files: dict[str, str]
) -> None:
    script = str(Path(__file__).with_name("tensor_worker.py"))
    arguments = json.dumps({"load": [files["good"], files["truncated"]]})
    environs = [clean_environment() for _ in range(2)]
    for rank, environ in enumerate(environs):
        environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=environs[0].setdefault("MASTER_PORT", str(free_port())))
    started = time.monotonic()
    outcomes = run_command([[sys.executable, script, arguments]] * 2, environs, timeout=120)
    # Far below the 60 s after which a collective without its partner is given up.
    assert time.monotonic() - started < 50
    assert [code for code, _ in outcomes] == [1, 1]
    assert "Rank 1 of this tensor group could not load the backbone" in outcomes[0][1]
    assert "damaged safetensors file" in outcomes[1][1]


def test_groups_that_cannot_be(found: dict[str, Any]) -> None:
    assert found["left"].startswith("BackboneError: This backbone's tensor group has been left")
    for own in found["heads"]:
        assert own == (
            "BackboneError: this SwinV2 has 6 and 6 heads in stages 3 and 4, which a tensor degree of 4 does not "
            "divide; possible degrees are 1, 2, 3, 6."
        )
    assert set(found["world"]) == {"BackboneError: 4 processes do not divide into tensor groups of 3."}
