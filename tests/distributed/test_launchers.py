"""The launchers that people have, on a machine without a GPU: two gloo ranks each, and the same two steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def launch(clean_environment, run_command, free_port, tmp_path_factory):
    """launch(what comes before the script, engine fields, variables): what rank 0 saved; {port} is filled in."""

    def start(command: list[str], engine: dict | None = None, variables: dict[str, str] | None = None) -> dict:
        result = tmp_path_factory.mktemp("launch") / "result.pt"
        command = [word.format(port=free_port()) for word in command]
        command += [str(HERE / "launcher_worker.py"), json.dumps({"result": str(result), "engine": engine or {}})]
        ((code, output),) = run_command([command], [{**clean_environment(), **(variables or {})}], timeout=300)
        assert code == 0, output[-6000:]
        return torch.load(result, weights_only=False)

    return start


@pytest.fixture(scope="module")
def alone(launch):
    """The steps of a single process without a launcher."""
    return launch([sys.executable])


def assert_two_ranks(found: dict, alone: dict) -> None:
    assert [int(rank["RANK"]) for rank in found["ranks"]] == [0, 1]
    assert {rank["WORLD_SIZE"] for rank in found["ranks"]} == {"2"}
    assert "gloo" in found["world"]
    for step, wanted in zip(found["steps"], alone["steps"]):
        assert step == pytest.approx(wanted, rel=1e-5)


def test_no_launcher(alone):
    assert alone["ranks"] == [{"RANK": None, "WORLD_SIZE": None, "LOCAL_RANK": None}]
    assert alone["kind"] == "accelerate"
    assert "single process" in alone["engine"]


def test_no_launcher_deepspeed(launch, alone):
    """A world of one for DeepSpeed, which else looks for MPI."""
    found = launch([sys.executable], {"kind": "deepspeed"})
    assert found["kind"] == "deepspeed"
    assert "ZeRO 2 over 1 process(es)" in found["engine"]
    for step, wanted in zip(found["steps"], alone["steps"]):
        assert step == pytest.approx(wanted, rel=1e-5)


def test_deepspeed(launch, alone):
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "{port}"]
    found = launch(command, {"deepspeed_config": "zero3"})
    assert found["kind"] == "deepspeed"
    assert "ZeRO 3 over 2 process(es)" in found["engine"]
    assert_two_ranks(found, alone)


def test_accelerate(launch, alone, root):
    command = [str(BIN / "accelerate"), "launch", "--config_file", str(root / "configs/accelerate/single_node.yaml")]
    found = launch([*command, "--main_process_port", "{port}"])
    assert found["kind"] == "accelerate"
    assert "DDP over 2 processes" in found["engine"]
    assert_two_ranks(found, alone)


@pytest.mark.slow
def test_accelerate_deepspeed(launch, alone, tmp_path):
    """distributed_type: DEEPSPEED selects DeepSpeed, with the stage that Accelerate's configuration says."""
    config = tmp_path / "deepspeed.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nmixed_precision: 'no'\nnum_machines: 1\n"
        "num_processes: 2\nmachine_rank: 0\ndeepspeed_config:\n  zero_stage: 1\n  zero3_init_flag: false\n"
    )
    command = [str(BIN / "accelerate"), "launch", "--config_file", str(config), "--main_process_port", "{port}"]
    found = launch(command)
    assert found["kind"] == "deepspeed"
    assert "distributed_type is DEEPSPEED" in found["reason"]
    assert "ZeRO 1 over 2 process(es)" in found["engine"]
    assert_two_ranks(found, alone)


def test_torchrun(launch, alone):
    found = launch([str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", "{port}"])
    assert "DDP over 2 processes" in found["engine"]
    assert_two_ranks(found, alone)


@pytest.mark.slow
def test_torchrun_single_process(launch, alone):
    """torchrun sets the variables of a world of one too: no DDP for it."""
    found = launch([str(BIN / "torchrun"), "--nproc_per_node", "1", "--master_port", "{port}"])
    assert "single process" in found["engine"]
    assert found["steps"] == alone["steps"]


def test_srun(run_command, clean_environment, free_port, tmp_path, alone):
    """Slurm's variables alone, as `srun --ntasks 2` sets them."""
    result = tmp_path / "result.pt"
    command = [sys.executable, str(HERE / "launcher_worker.py"), json.dumps({"result": str(result)})]
    port = str(free_port())
    environs = [
        {
            **clean_environment(),
            "SLURM_JOB_ID": "17",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "MASTER_PORT": port,
        }
        for rank in range(2)
    ]
    outcomes = run_command([command] * 2, environs, timeout=300)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    found = torch.load(result, weights_only=False)
    assert "Slurm" in found["world"]
    assert_two_ranks(found, alone)


def test_hang_is_ended(run_command, clean_environment):
    """A process that waits for ever is ended soon after another one failed, and at the limit when none did."""
    sleeper = [sys.executable, "-c", "import time; print('waits', flush=True); time.sleep(600)"]
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    environ = clean_environment()
    outcomes = run_command([sleeper, failing], [environ, environ], timeout=60)
    assert [code for code, _ in outcomes] == [-9, 3]
    assert outcomes[0][1].strip() == "waits"
    ((code, _),) = run_command([sleeper], [environ], timeout=1)
    assert code == -9
