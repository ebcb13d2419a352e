"""The launchers that people have, on a machine without a GPU: two gloo ranks each, and the same two steps."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def launch(clean_environment, run_command, free_port, tmp_path_factory) -> Callable[..., dict[str, Any]]:
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
def alone(launch) -> dict[str, Any]:
    """The steps of a single process without a launcher."""
    return launch([sys.executable])


def assert_two_ranks(found: dict, alone: dict) -> None:
    assert [int(rank["RANK"]) for rank in found["ranks"]] == [0, 1]
    assert {rank["WORLD_SIZE"] for rank in found["ranks"]} == {"2"}
    assert "gloo" in found["world"]
    for step, wanted in zip(found["steps"], alone["steps"]):
        assert step == pytest.approx(wanted, rel=1e-5)


def test_no_launcher(alone) -> None:
    assert alone["ranks"] == [{"RANK": None, "WORLD_SIZE": None, "LOCAL_RANK": None}]
    assert alone["kind"] == "accelerate"
    assert "single process" in alone["engine"]


def test_no_launcher_deepspeed(launch, alone) -> None:
    """A world of one for DeepSpeed, which else looks for MPI."""
    found = launch([sys.executable], {"kind": "deepspeed"})
    assert found["kind"] == "deepspeed"
    assert "ZeRO 2 over 1 process(es)" in found["engine"]
    for step, wanted in zip(found["steps"], alone["steps"]):
        assert step == pytest.approx(wanted, rel=1e-5)


def test_deepspeed(launch, alone) -> None:
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "{port}"]
    found = launch(command, {"deepspeed_config": "zero3"})
    assert found["kind"] == "deepspeed"
    assert "ZeRO 3 over 2 process(es)" in found["engine"]
    assert_two_ranks(found, alone)


def test_accelerate(launch, alone, root) -> None:
    command = [str(BIN / "accelerate"), "launch", "--config_file", str(root / "configs/accelerate/single_node.yaml")]
    found = launch([*command, "--main_process_port", "{port}"])
    assert found["kind"] == "accelerate"
    assert "DDP over 2 processes" in found["engine"]
    assert_two_ranks(found, alone)


def run_accelerate_config(config: Path, answers: dict[str, str], environ: dict[str, str]) -> None:
    """`accelerate config` on a terminal of its own, as a person answers it: of `answers` the one whose key is in the question, which
    is the number or the text of a choice; to everything else Enter, for what is proposed."""
    leader, follower = pty.openpty()
    command = [str(BIN / "accelerate"), "config", "--config_file", str(config)]
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environ) as child:
        os.close(follower)
        shown, everything, limit = "", "", time.monotonic() + 240
        left = dict(answers)
        try:
            while True:
                if select.select([leader], [], [], 0.5)[0]:
                    try:
                        data = os.read(leader, 65536).decode(errors="replace")
                    except OSError:
                        break  # the end of a pseudo-terminal
                    shown, everything = shown + data, everything + data
                    continue
                assert time.monotonic() < limit, everything
                text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", shown).rstrip()
                question, menu, choices = text.partition("selecting with enter")
                if not menu and not text.endswith((":", "?")):
                    continue  # it has something to do before it asks
                key = next((key for key in left if key in question), None)
                reply = left.pop(key) if key else ""
                if menu and reply:
                    lines = [line.strip(" \u2794") for line in choices.strip().splitlines()]
                    reply = str(lines.index(reply))
                shown = ""
                os.write(leader, f"{reply}\r".encode())
        finally:
            os.close(leader)
            if time.monotonic() >= limit:
                child.kill()
    assert child.returncode == 0, everything
    assert not left, f"never asked: {left}\n{everything}"


CONFIGURED = {
    "multi-GPU": ({"Which type of machine": "multi-GPU", "How many GPU(s)": "2"}, "DDP over 2 processes"),
    "DeepSpeed": (
        {
            "Which type of machine": "multi-GPU",
            "use DeepSpeed?": "yes",
            "optimization stage": "1",
            "How many GPU(s)": "2",
        },
        "ZeRO 1 over 2 process(es)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGURED)
def test_accelerate_config(launch, alone, clean_environment, tmp_path, kind) -> None:
    """A file that `accelerate config` wrote; distributed_type: DEEPSPEED selects DeepSpeed, and the stage that was chosen."""
    answers, engine = CONFIGURED[kind]
    config = tmp_path / "config.yaml"
    run_accelerate_config(config, answers, clean_environment())
    command = [str(BIN / "accelerate"), "launch", "--config_file", str(config), "--main_process_port", "{port}"]
    found = launch(command)
    assert engine in found["engine"]
    assert ("distributed_type is DEEPSPEED" in found["reason"]) == (kind == "DeepSpeed")
    assert_two_ranks(found, alone)


def test_torchrun(launch, alone) -> None:
    found = launch([str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", "{port}"])
    assert "DDP over 2 processes" in found["engine"]
    assert_two_ranks(found, alone)


@pytest.mark.slow
def test_torchrun_single_process(launch, alone) -> None:
    """torchrun sets the variables of a world of one too: no DDP for it."""
    found = launch([str(BIN / "torchrun"), "--nproc_per_node", "1", "--master_port", "{port}"])
    assert "single process" in found["engine"]
    assert found["steps"] == alone["steps"]


def test_srun(run_command, clean_environment, free_port, tmp_path, alone) -> None:
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


def test_hang_is_ended(run_command, clean_environment) -> None:
    """A process that waits for ever is ended soon after another one failed, and at the limit when none did."""
    sleeper = [sys.executable, "-c", "import time; print('waits', flush=True); time.sleep(600)"]
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    environ = clean_environment()
    outcomes = run_command([sleeper, failing], [environ, environ], timeout=60)
    assert [code for code, _ in outcomes] == [-9, 3]
    assert outcomes[0][1].strip() == "waits"
    ((code, _),) = run_command([sleeper], [environ], timeout=1)
    assert code == -9
