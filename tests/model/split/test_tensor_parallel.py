"""Each member of a tensor group holds its share, and some networks can be split: without processes or memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from permafrost.model import BackboneError, SwinV2, load_backbone
from permafrost.model.spec import SWINV2_SIZES, SwinV2Size
from permafrost.model.split.degree import check_tensor_degree, possible_degrees
from permafrost.model.split.fairscale_groups import TensorGroup, join_tensor_group
from permafrost.model.split.tensor_parallel import SplitSwinV2, is_split, shard

# The layers of stages 3 and 4 of which members hold parts; their other parameters are on every member.
SPLIT_LAYERS = (
    "attn.qkv.weight",
    "attn.q_bias",
    "attn.v_bias",
    "attn.logit_scale",
    "attn.cpb_mlp.2.weight",
    "attn.proj.weight",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
)


def group_of(rank: int, degree: int) -> TensorGroup:
    """Enough of a group for what needs no other process."""
    return TensorGroup(None, None, rank, degree)


def meta_network(name: str) -> SwinV2:
    with torch.device("meta"):
        return SwinV2(name)


def formula(network: SwinV2) -> tuple[int, int]:
    """(parameters that are split, parameters that are on every member), from the widths alone."""
    size = network.size
    split = 0
    for stage in (2, 3):
        channels, heads = size.channels[stage], size.num_heads[stage]
        attention = 3 * channels**2 + 2 * channels + heads + 512 * heads + channels**2
        mlp = 4 * channels**2 + 4 * channels + 4 * channels**2
        split += size.depths[stage] * (attention + mlp)
    split += 4 * size.channels[2] * size.channels[3]
    return split, sum(parameter.numel() for parameter in network.parameters()) - split


@pytest.mark.parametrize("name", SWINV2_SIZES)
def test_every_member_holds_its_share_and_what_all_hold(name: str) -> None:
    whole = meta_network(name)
    split, replicated = formula(whole)
    num_whole = split + replicated
    named = [key for key in dict(whole.named_parameters()) if is_split(key)]
    blocks = [f"layers.{stage}.blocks.{block}" for stage in (2, 3) for block in range(whole.size.depths[stage])]
    expected = [f"{block}.{layer}" for block in blocks for layer in SPLIT_LAYERS]
    assert sorted(named) == sorted([*expected, "layers.2.downsample.reduction.weight"])
    for degree in possible_degrees(whole.size)[1:4]:
        for rank in (0, degree - 1):
            member = SplitSwinV2(meta_network(name), group_of(rank, degree))
            resident = sum(parameter.numel() for parameter in member.parameters())
            assert resident * degree == split + replicated * degree
            assert member.describe()["resident_parameters"] == resident
            assert member.num_whole_parameters == num_whole
            assert member.describe()["tensor_degree"] == degree
            assert member.spec == whole.spec


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_the_giant_takes_a_degree_th_of_its_memory_and_a_tenth(degree: int) -> None:
    member = SplitSwinV2(meta_network("swinv2_giant"), group_of(0, degree))
    resident = sum(parameter.numel() for parameter in member.parameters())
    assert member.num_whole_parameters > 2.9e9
    assert resident < 1.1 * member.num_whole_parameters / degree


@pytest.mark.parametrize("degree", [2, 4])
def test_members_parts_are_disjoint_and_make_up_the_whole(degree: int) -> None:
    for name, parameter in meta_network("swinv2_nano").named_parameters():
        # Every number occurs once.
        whole = torch.arange(parameter.numel()).view(parameter.shape)
        parts = [shard(name, whole, rank, degree) for rank in range(degree)]
        if not is_split(name):
            assert all(part is whole for part in parts)
            continue
        assert {part.numel() for part in parts} == {whole.numel() // degree}
        assert torch.equal(torch.cat([part.reshape(-1) for part in parts]).sort().values, whole.reshape(-1))


def test_a_members_rows_are_those_of_its_heads() -> None:
    size = SWINV2_SIZES["swinv2_nano"]
    channels, heads = size.channels[3], size.num_heads[3]
    dim = channels // heads
    rows = torch.arange(3 * channels)[:, None].expand(-1, channels)
    part = shard("layers.3.blocks.1.attn.qkv.weight", rows, 1, 4)[:, 0]
    expected = [which * channels + head * dim + i for which in range(3) for head in (2, 3) for i in range(dim)]
    assert part.tolist() == expected
    columns = torch.arange(channels).expand(channels, -1)
    assert shard("layers.3.blocks.1.attn.proj.weight", columns, 1, 4)[0].tolist() == expected[: 2 * dim]
    # Stages 1 and 2 have the same layers, and are not split.
    assert shard("layers.1.blocks.1.attn.proj.weight", columns, 1, 4) is columns


def test_degrees_are_those_that_divide_the_heads_of_both_stages() -> None:
    assert possible_degrees(SWINV2_SIZES["swinv2_nano"]) == [1, 2, 4]
    assert possible_degrees(SWINV2_SIZES["swinv2_tiny"]) == [1, 2, 3, 4, 6, 12]
    assert possible_degrees(SWINV2_SIZES["swinv2_giant"]) == [1, 2, 4, 8, 16, 32, 64]
    assert possible_degrees(SwinV2Size(24, (1, 1, 1, 1), (1, 3, 6, 4))) == [1, 2]


@pytest.mark.parametrize(
    ("name", "degree", "message"),
    [
        ("swinv2_nano", 3, r"swinv2_nano has 4 and 8 heads in stages 3 and 4, .* 3 .*; possible degrees are 1, 2, 4\."),
        ("swinv2_huge", 8, r"swinv2_huge has 44 and 88 heads .*; possible degrees are 1, 2, 4, 11, 22, 44\."),
        ("timm/resnet50", 2, r"timm/resnet50 cannot be split over a tensor group of 2: only SwinV2 can"),
        ("swin_tiny", 4, r"only SwinV2 can \(swinv2_nano"),
        ("swinv2_nano", 0, "at least 1 process, found 0"),
        ("swinv2_nano", True, "at least 1 process, found True"),
    ],
)
def test_degrees_that_do_not_fit(name: str, degree: int, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        check_tensor_degree(name, degree)
    check_tensor_degree(name, 1)


def test_loading_refuses_before_it_reads() -> None:
    with pytest.raises(BackboneError, match="swinv2_nano has 4 and 8 heads"):
        load_backbone("swinv2_nano", weights="no_such_file", tensor_group=group_of(0, 8))
    with pytest.raises(BackboneError, match="is a object; expected the TensorGroup that join_tensor_group"):
        load_backbone("swinv2_nano", weights="random", tensor_group=object())
    with pytest.raises(BackboneError, match=r"backbone\.compile is True: .* not compiled.*mesh\.tensor to 1"):
        load_backbone("swinv2_nano", weights="no_such_file", compile=True, tensor_group=group_of(0, 2))
    with pytest.raises(BackboneError, match="trained is not split over a tensor group"):
        load_backbone("swinv2_nano", weights="no_such_file", frozen=False, tensor_group=group_of(0, 2))
    with pytest.raises(BackboneError, match=r"needs torch\.distributed to be initialised"):
        join_tensor_group(2)


def test_fairscale_is_imported_in_one_file_and_only_when_it_is_needed(root: Path) -> None:
    folders = ("configs", "data", "heads", "launcher", "model")
    files = [file for folder in folders for file in (root / folder).rglob("*.py")]
    importing = [file.name for file in files if re.search(r"^\s*(from|import) fairscale\b", file.read_text(), re.M)]
    assert importing == ["fairscale_groups.py"]
    code = (
        "import sys, permafrost.launcher.run.parts; from permafrost.model import load_backbone;"
        "load_backbone('swinv2_nano', weights='random'); assert 'fairscale' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
