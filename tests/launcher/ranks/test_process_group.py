"""Ranks from launchers' variables, and devices. The collectives of a world of two are tested in tests/distributed."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from permafrost.launcher.errors import LaunchError
from permafrost.launcher.ranks import process_group as mesh
from permafrost.launcher.ranks.process_group import (
    choose_device,
    complete_single_process,
    first_slurm_host,
    join_process_group,
    read_ranks,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_no_launcher() -> None:
    assert read_ranks({}) == (0, 1, 0, "no launcher")


def test_standard_variables() -> None:
    assert read_ranks(dict(TORCHRUN))[:3] == (5, 8, 1)
    without_local_size = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert read_ranks(without_local_size)[:3] == (5, 8, 1)


def test_world_of_one_needs_no_address() -> None:
    assert read_ranks({"WORLD_SIZE": "1"})[:3] == (0, 1, 0)
    assert read_ranks({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})[:3] == (0, 1, 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"WORLD_SIZE": None}, ["RANK, LOCAL_RANK are set", "WORLD_SIZE is not"]),
        ({"RANK": None, "LOCAL_RANK": None}, ["WORLD_SIZE is set", "RANK, LOCAL_RANK are not"]),
        ({"LOCAL_RANK": ""}, ["LOCAL_RANK is not"]),
        ({"RANK": "8"}, ["RANK is 8", "WORLD_SIZE is 8", "0..7"]),
        ({"RANK": "-1"}, ["RANK is -1"]),
        ({"RANK": "two"}, ["RANK is 'two'", "integer"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE is 0"]),
        ({"LOCAL_RANK": "6"}, ["LOCAL_RANK is 6", "RANK is 5"]),
        ({"LOCAL_WORLD_SIZE": "1"}, ["LOCAL_WORLD_SIZE is 1", "LOCAL_RANK is 1"]),
        ({"LOCAL_WORLD_SIZE": "9"}, ["LOCAL_WORLD_SIZE is 9", "WORLD_SIZE is 8"]),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, ["WORLD_SIZE is 8", "MASTER_ADDR, MASTER_PORT are not set"]),
        ({"MASTER_PORT": "70000"}, ["MASTER_PORT is 70000"]),
    ],
)
def test_inconsistent_variables(changes, named) -> None:
    environ = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(LaunchError) as error:
        read_ranks(environ)
    for words in named:
        assert words in str(error.value)


def test_srun() -> None:
    environ = dict(SRUN)
    assert read_ranks(environ) == (3, 4, 1, "Slurm (srun)")
    # For the libraries that read the standard variables themselves; the same port for every process of the step.
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("3", "4", "1")
    assert environ["MASTER_ADDR"] == "gpu07"
    other = {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    read_ranks(other)
    assert environ["MASTER_PORT"] == other["MASTER_PORT"]
    assert 20000 <= int(environ["MASTER_PORT"]) < 30000
    another_step = {**SRUN, "SLURM_STEP_ID": "1"}
    read_ranks(another_step)
    assert another_step["MASTER_PORT"] != environ["MASTER_PORT"]


def test_standard_variables_win_over_slurm() -> None:
    assert read_ranks({**SRUN, **TORCHRUN})[:3] == (5, 8, 1)


def test_batch_script_is_not_srun() -> None:
    """In a batch script Slurm sets SLURM_PROCID and SLURM_NTASKS, but nobody started the other tasks."""
    environ = {"SLURM_JOB_ID": "123", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    assert read_ranks(environ)[:3] == (0, 1, 0)


def test_incomplete_slurm() -> None:
    with pytest.raises(LaunchError, match="SLURM_LOCALID"):
        read_ranks({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("localhost", "localhost"),
        ("gpu[03-05,09],login1", "gpu03"),
        ("gpu-a[12]", "gpu-a12"),
        ("node1,node2", "node1"),
        ("rack[2-3]-ib", "rack2-ib"),
    ],
)
def test_first_slurm_host(nodes, host) -> None:
    assert first_slurm_host(nodes) == host


def test_no_slurm_host() -> None:
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        first_slurm_host("[1-2]")


@pytest.fixture
def num_cuda(monkeypatch) -> Callable[[int], None]:
    """num_cuda(n): this machine shows n CUDA devices."""

    def show(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return show


def test_devices_without_cuda(num_cuda) -> None:
    num_cuda(0)
    assert choose_device("auto", local_rank=1, world_size=2) == torch.device("cpu")
    assert choose_device("cpu", local_rank=0, world_size=1) == torch.device("cpu")
    with pytest.raises(LaunchError, match="no CUDA device"):
        choose_device("cuda", local_rank=0, world_size=1)


def test_devices_with_cuda(num_cuda) -> None:
    num_cuda(2)
    assert choose_device("auto", local_rank=1, world_size=2) == torch.device("cuda", 1)
    assert choose_device("cuda", local_rank=0, world_size=2) == torch.device("cuda", 0)
    assert choose_device("cuda:1", local_rank=0, world_size=1) == torch.device("cuda", 1)
    assert choose_device("cpu", local_rank=0, world_size=1) == torch.device("cpu")
    with pytest.raises(LaunchError, match=r"LOCAL_RANK is 2.* 2 CUDA device"):
        choose_device("cuda", local_rank=2, world_size=3)
    with pytest.raises(LaunchError, match=r"'cuda:0'.*WORLD_SIZE is 2"):
        choose_device("cuda:0", local_rank=0, world_size=2)
    with pytest.raises(LaunchError, match="'cuda:2'"):
        choose_device("cuda:2", local_rank=0, world_size=1)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "", "tpu"])
def test_unknown_device(device, num_cuda) -> None:
    num_cuda(2)
    with pytest.raises(LaunchError, match="auto, cpu, cuda or cuda:N"):
        choose_device(device, local_rank=0, world_size=1)


def test_accelerate_use_cpu(monkeypatch, num_cuda) -> None:
    num_cuda(1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in (*mesh.RANK_VARIABLES, "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert join_process_group().device.type == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert join_process_group().device.type == "cpu"
    assert join_process_group("cuda").device.type == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    assert join_process_group().device.type == "cuda"


def test_single_process_world(monkeypatch) -> None:
    for name in (*mesh.RANK_VARIABLES, "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    group = join_process_group("cpu")
    assert (group.rank, group.world_size, group.local_rank, group.is_main) == (0, 1, 0, True)
    assert not torch.distributed.is_initialized()
    assert group.all_reduce_mean({"b": 2, "a": 0.5}) == {"a": 0.5, "b": 2.0}
    assert group.any_true(True)
    assert not group.any_true(False)
    assert group.gather_objects("x") == ["x"]
    assert group.broadcast_object("x") == "x"
    group.barrier()
    assert "1 process" in group.describe()
    group.close()
    group.close()


@pytest.mark.parametrize(("world_size", "tensor"), [(1, 2), (3, 2), (6, 4), (2, 4)])
def test_a_world_that_does_not_divide_into_tensor_groups(world_size, tensor) -> None:
    group = mesh.ProcessGroup(0, world_size, 0, torch.device("cpu"))
    for refuse in (group.require_mesh, group.tensor_group):
        with pytest.raises(LaunchError, match=rf"mesh\.tensor is {tensor} but there are {world_size} process"):
            refuse(tensor)
    group.require_mesh(1)
    assert group.tensor_group(1) is None


def test_complete_single_process() -> None:
    environ = {"MASTER_ADDR": "here", "RANK": ""}
    complete_single_process(environ)
    assert environ["MASTER_ADDR"] == "here"
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == ("0", "0", "1")
    assert 0 < int(environ["MASTER_PORT"]) < 65536
    assert "MASTER_PORT" not in os.environ
