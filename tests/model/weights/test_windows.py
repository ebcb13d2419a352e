"""The windows of weights: read from a file, stated by a recipe, and what happens where the two differ."""

from __future__ import annotations

import pytest
import torch

from permafrost.model import WeightsError, load_backbone


@pytest.mark.parametrize(
    ("windows", "pretrained", "used", "coordinates"),
    [
        # A model of 192 pixels: stage 4 had a map of 6, the configured window is 12.
        ((12, 12, 12, 6), (0, 0, 0, 0), (12,) * 4, (12, 12, 12, 6)),
        # Fine-tuned from 192 to 256 and to 384 pixels.
        ((16, 16, 16, 8), (12, 12, 12, 6), (16,) * 4, (12, 12, 12, 6)),
        ((24, 24, 24, 12), (12, 12, 12, 6), (24,) * 4, (12, 12, 12, 6)),
        ((8, 8, 8, 8), (0, 0, 0, 0), (8,) * 4, (8,) * 4),
        ((7, 7, 7, 1), (0, 0, 0, 1), (7,) * 4, (7, 7, 7, 1)),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_windows_are_read_from_official_buffers(official_file, windows, pretrained, used, coordinates) -> None:
    path = official_file(windows, pretrained)
    network = load_backbone("swinv2_nano", weights=path).network
    assert network.window_size == used
    assert network.pretrained_window_size == coordinates
    assert load_backbone("swinv2_nano", weights=path).describe()["trained_window_size"] == windows


def test_recipe_may_repeat_the_files_windows(official_file) -> None:
    path = official_file()
    for window_size in (12, (12, 12, 12, 12), (12, 12, 12, 6)):
        for pretrained in (None, (12, 12, 12, 6)):
            said = load_backbone(
                "swinv2_nano", weights=path, window_size=window_size, pretrained_window_size=pretrained
            )
            assert said.describe()["pretrained_window_size"] == (12, 12, 12, 6)


def test_recipe_must_not_contradict_the_files_windows(official_file) -> None:
    path = official_file()
    with pytest.raises(WeightsError, match=r"window_size=\(12, 12, 12, 6\), but the recipe asks for \(8, 8, 8, 8\)"):
        load_backbone("swinv2_nano", weights=path, window_size=8)
    for stated in (12, 8, (12, 12, 12, 12)):
        with pytest.raises(WeightsError, match=r"pretrained_window_size=\(12, 12, 12, 6\), but the recipe says"):
            load_backbone("swinv2_nano", weights=path, window_size=12, pretrained_window_size=stated)


def test_another_window_on_purpose_names_the_pretrained_one(official_file) -> None:
    backbone = load_backbone(
        "swinv2_nano", weights=official_file(), window_size=24, pretrained_window_size=(12, 12, 12, 6)
    )
    assert backbone.network.window_size == (24,) * 4
    assert backbone.network.pretrained_window_size == (12, 12, 12, 6)


def test_windows_must_be_stated_where_the_file_is_silent(official_file) -> None:
    def strip(state: dict) -> None:
        for name in [name for name in state if "relative_" in name or "attn_mask" in name]:
            del state[name]

    path = official_file(change=strip)
    for arguments in ({}, {"window_size": 12}, {"pretrained_window_size": 12}):
        with pytest.raises(WeightsError, match="does not say with which windows"):
            load_backbone("swinv2_nano", weights=path, **arguments)
    backbone = load_backbone("swinv2_nano", weights=path, window_size=12, pretrained_window_size=(12, 12, 12, 6))
    assert backbone.network.pretrained_window_size == (12, 12, 12, 6)


def test_windows_from_the_index_or_the_mask_alone(official_file) -> None:
    def strip(state: dict) -> None:
        for name in [name for name in state if "relative_coords" in name or "blocks.0.attn.relative" in name]:
            del state[name]

    path = official_file(change=strip)
    with pytest.raises(WeightsError, match="Give pretrained_window_size"):
        load_backbone("swinv2_nano", weights=path)
    with pytest.raises(WeightsError, match="Give pretrained_window_size"):
        load_backbone("swinv2_nano", weights=path, window_size=8)
    backbone = load_backbone("swinv2_nano", weights=path, pretrained_window_size=(12, 12, 12, 6))
    assert backbone.network.window_size == (12,) * 4


def test_buffers_that_disagree_are_refused(official_file) -> None:
    def swap(state: dict) -> None:
        state["layers.1.blocks.1.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)

    with pytest.raises(WeightsError, match=r"stage 2 disagree about the window: \[7, 12\]"):
        load_backbone("swinv2_nano", weights=official_file(change=swap))
