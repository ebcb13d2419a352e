"""The quickstart's recipe, reduced, on two nodes: `permafrost launch`, plain `deepspeed --hostfile`, and one node."""

from __future__ import annotations

from collections.abc import Callable

import pytest

QUICKSTART = (
    *("--loop.num-steps", "4", "--loop.global-batch", "4", "--loop.log-every", "1", "--loop.num-workers", "0"),
    *(
        "--loop.image-every",
        "0",
        "--data.max-val-images",
        "4",
        "--data.world.num-train",
        "24",
        "--data.world.num-val",
        "8",
    ),
    *("--device", "cpu"),
)


@pytest.fixture(scope="module")
def single(cluster, read_losses, tmp_path_factory) -> Callable[..., list[float]]:
    """single(*options): losses of two ranks on one machine."""

    def train(*options: str) -> list[float]:
        output = tmp_path_factory.mktemp("single") / "run"
        command = [
            "permafrost",
            "launch",
            "quickstart",
            *QUICKSTART,
            *options,
            "--num-procs",
            "2",
            "--output",
            str(output),
        ]
        outcome = cluster.run(command, timeout=400)
        assert outcome.code == 0, outcome.output[-6000:]
        return read_losses(output)

    return train


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart(cluster, read_losses, single, tmp_path) -> None:
    wanted = single()
    assert len(wanted) == 4

    launched = tmp_path / "launched"
    command = cluster.launch_command(*QUICKSTART, "--output", str(launched), recipe="quickstart")
    outcome = cluster.run(command, timeout=400)
    assert outcome.code == 0, outcome.output[-6000:]
    assert read_losses(launched) == wanted

    folder = tmp_path / "plain"
    folder.mkdir()
    names = ("PERMAFROST_CACHE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    environment = cluster.environment()
    lines = [f"{name}={environment[name]}\n" for name in names]
    (folder / ".deepspeed_env").write_text("".join([*lines, "GLOO_SOCKET_IFNAME=eth0\n"]))
    plain = folder / "run"
    outcome = cluster.run(
        [
            *("deepspeed", "--hostfile", str(cluster.hostfile()), "--no_ssh_check", "--master_addr", "10.0.0.11"),
            *("--module", "permafrost.launcher.train", "quickstart", *QUICKSTART, "--output", str(plain)),
        ],
        cwd=folder,
        timeout=400,
        PDSH_SSH_ARGS_APPEND=f"-F {cluster.ssh_config}",
    )
    assert outcome.code == 0, outcome.output[-6000:]
    assert read_losses(plain) == wanted


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_under_zero(cluster, read_losses, single, tmp_path) -> None:
    """The multi-node engine: ZeRO 2 over the network."""
    engine = ("--engine.kind", "deepspeed", "--engine.zero-stage", "2")
    output = tmp_path / "launched"
    command = cluster.launch_command(*QUICKSTART, *engine, "--output", str(output), recipe="quickstart")
    outcome = cluster.run(command, timeout=400)
    assert outcome.code == 0, outcome.output[-6000:]
    assert read_losses(output) == pytest.approx(single(*engine), rel=1e-6)
