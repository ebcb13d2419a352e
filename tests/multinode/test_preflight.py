"""`permafrost launch` finds faults of nodes before anything starts: each problem names its node and a remedy."""

from __future__ import annotations

import contextlib
import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path

import pytest

COCO = "coco:swinv2_base_fpn"


def refused(outcome) -> str:
    assert outcome.code == 2, outcome.output
    assert "error: nothing was started:" in outcome.output
    return outcome.output


def test_dry_run(cluster, tmp_path) -> None:
    """Looks at everything, says what would run, and starts and writes nothing."""
    command = cluster.launch_command("--output", str(tmp_path / "run"), "--dry-run", "--export", "SECRET=xyzzy")
    outcome = cluster.run(command, timeout=60)
    assert outcome.code == 0, outcome.output
    for wanted in (
        "node01: 1 process(es)",
        "node02: 1 process(es)",
        "ranks meet at 10.0.0.11, port",
        "would run on every rank",
    ):
        assert wanted in outcome.output
    assert "SECRET" in outcome.output
    assert "xyzzy" not in outcome.output
    assert not (tmp_path / "run").exists()


def test_a_node_that_differs(cluster, root, tmp_path) -> None:
    """Source, versions, data, weights, recipe, folder and processes of node02, all in one answer."""
    data, weights = tmp_path / "data", tmp_path / "weights"
    for name in ("annotations", "train2017", "val2017"):
        (data / name).mkdir(parents=True)
    for name in ("instances_train2017.json", "instances_val2017.json"):
        (data / "annotations" / name).write_text("{}")
    weights.mkdir()
    (weights / "base.pth").write_bytes(b"not read here")
    folder = tmp_path / "folder"
    folder.mkdir()
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from permafrost.configs.coco import swinv2_base_fpn\n")
    other_recipe, other_source, other_timm = (
        tmp_path / name for name in ("other_recipe", "other_source", "other_timm")
    )
    other_recipe.write_text("# edited\n" + recipe.read_text())
    source = root / "launcher" / "errors.py"
    other_source.write_text(source.read_text() + "# edited\n")
    timm = Path(str(importlib.metadata.distribution("timm").locate_file(""))) / (
        f"timm-{importlib.metadata.version('timm')}.dist-info/METADATA"
    )
    other_timm.write_text(
        timm.read_text().replace(f"\nVersion: {importlib.metadata.version('timm')}", "\nVersion: 0.0.1")
    )
    command = cluster.launch_command(
        *("--dry-run", "--output", str(tmp_path / "run"), "--data.root", str(data)),
        *("--backbone.weights", str(weights / "base.pth"), "--loop.global-batch", "130"),
        hosts=("node01 slots=1", "node02 slots=64"),
        recipe=f"{recipe}:swinv2_base_fpn",
    )
    with contextlib.ExitStack() as mounts:
        for other, path in ((other_recipe, recipe), (other_source, source), (other_timm, timm)):
            mounts.enter_context(cluster.mounted("node02", "--bind", str(other), str(path)))
        for path in (data, weights, folder):
            mounts.enter_context(cluster.mounted("node02", "-t", "tmpfs", "none", str(path)))
        hidden = folder / "inside"
        hidden.mkdir()
        text = refused(cluster.run(command, cwd=hidden, timeout=60))
    for wanted in (
        "node02: timm is 0.0.1 there and",
        "install the same versions on every node",
        "node02: permafrost's source differs",
        "bring every node to the same checkout",
        f"node02: {recipe} differs from the one here",
        "node02: slots=64 in the hostfile, but it has",
        "or fewer",
        f"node02: the folder {hidden}, from which this was called, is not there",
        f"node02: {data}/annotations/instances_val2017.json is not there or cannot be read: copy it, or mount",
        f"node02: {data}/train2017 is not there",
        f"node02: {weights}/base.pth is not there",
    ):
        assert wanted in text
    assert "node01:" not in text


@pytest.mark.parametrize(
    ("options", "reason"), [("size=1m", "GiB free on its disk, less than"), ("ro", "cannot be written")]
)
def test_no_room_for_the_run_folder(cluster, tmp_path, options, reason) -> None:
    output = tmp_path / "run"
    output.mkdir()
    with cluster.mounted("node01", "-t", "tmpfs", "-o", options, "none", str(output)):
        text = refused(cluster.run(cluster.launch_command("--output", str(output), "--dry-run"), timeout=60))
    assert f"node01: the run folder {output}" in text
    assert reason in text
    assert "give another --output" in text
    assert "node02: the run folder" not in text


def test_occupied_port(cluster, tmp_path) -> None:
    code = "import socket, time; s = socket.socket(); s.bind(('', 29555)); s.listen(); print('listens', flush=True); time.sleep(99)"
    listener = subprocess.Popen(
        ["ip", "netns", "exec", cluster.namespace("node01"), sys.executable, "-c", code], stdout=subprocess.PIPE
    )
    try:
        assert listener.stdout.readline().strip() == b"listens"
        command = cluster.launch_command("--output", str(tmp_path / "run"), "--dry-run", "--master-port", "29555")
        text = refused(cluster.run(command, timeout=60))
    finally:
        listener.kill()
        listener.communicate()
    assert "node01: port 29555: Address already in use: give another --master-port" in text


def test_unreachable_node(cluster, tmp_path) -> None:
    command = cluster.launch_command(
        "--output",
        str(tmp_path / "run"),
        "--dry-run",
        hosts=("node01 slots=1", "node03 slots=1", "node02 slots=1"),
    )
    begun = time.monotonic()
    text = refused(cluster.run([*command, "--loop.global-batch", "3"], timeout=60))
    assert "node03: not reached: ssh: connect to host 10.0.0.77 port 22:" in text
    assert "`ssh node03 true` must work without a question" in text
    assert time.monotonic() - begun < 45


def test_nodes_that_do_not_reach_each_other(cluster, tmp_path) -> None:
    """ssh from the launcher's machine works to both, but node02 has no way to rank 0."""
    route = ["ip", "-n", cluster.namespace("node02"), "route"]
    subprocess.run([*route, "add", "prohibit", "10.0.0.11/32"], check=True)
    try:
        text = refused(cluster.run(cluster.launch_command("--output", str(tmp_path / "run"), "--dry-run"), timeout=60))
    finally:
        subprocess.run([*route, "delete", "prohibit", "10.0.0.11/32"], check=True)
    assert "node02: port " in text
    assert "of 10.0.0.11 (node01) is not reached" in text
    assert "choose another network with --interface" in text


def test_interface(cluster, tmp_path) -> None:
    command = cluster.launch_command("--output", str(tmp_path / "run"), "--dry-run", "--interface", "ib0")
    text = refused(cluster.run(command, timeout=60))
    for node in ("node01", "node02"):
        assert f"{node}: --interface ib0 is not up there with an IPv4 address: these are: eth0 (10.0.0." in text


@pytest.mark.parametrize(
    ("variables", "name"),
    [({"PYTHONPATH": "/tmp/$(touch canary)"}, "PYTHONPATH"), ({"LD_LIBRARY_PATH": "/a b"}, "LD_LIBRARY_PATH")],
)
def test_variables_that_a_shell_would_change(cluster, tmp_path, variables, name) -> None:
    """A variable is refused that DeepSpeed would hand to the nodes' shells half-quoted."""
    command = cluster.launch_command("--output", str(tmp_path / "run"))
    outcome = cluster.run(command, timeout=60, cwd=tmp_path, **variables)
    assert outcome.code == 2
    assert f"error: {name} holds" in outcome.output
    assert not list(tmp_path.rglob("canary"))
