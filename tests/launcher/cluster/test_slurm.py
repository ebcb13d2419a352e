"""The batch script of `permafrost launch --slurm`: bash runs it, with a program in the place of srun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from permafrost.launcher.cli import main

TINY = f"{Path(__file__).parents[1] / 'tiny_recipe.py'}:tiny"
ODD = "a b'c\"d $HOME `id` ;&|<>* é %h\\ \n-x"
# Writes down what it was given, and ends with the next code; a third line is a run that ends.
SRUN = f"""#!{sys.executable}
import json, os, pathlib, sys
here = pathlib.Path(os.environ["HERE"])
with (here / "calls").open("a") as file:
    file.write(json.dumps({{"argv": sys.argv[1:], "odd": os.environ.get("ODD"), "cwd": os.getcwd()}}) + "\\n")
code, _, final = os.environ["OUTCOMES"].split()[len((here / "calls").read_text().splitlines()) - 1].partition(":")
if final:
    pathlib.Path(os.environ["FINAL"]).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(os.environ["FINAL"]).write_text("{{}}")
sys.exit(int(code))
"""


@pytest.fixture
def submit(tmp_path, monkeypatch) -> Callable[..., tuple[int, list[dict]]]:
    """submit(outcomes, *options): (exit code of the script, the calls of srun)."""
    folder = tmp_path / ODD
    folder.mkdir()
    monkeypatch.chdir(folder)
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)

    def run(outcomes: str, *options: str) -> tuple[int, list[dict]]:
        script, output = tmp_path / "job.sbatch", tmp_path / ODD / "run"
        command = [
            "launch",
            TINY,
            "--output",
            str(output),
            "--name",
            ODD,
            "--slurm",
            str(script),
            "--export",
            f"ODD={ODD}",
        ]
        assert main([*command, *options]) == 0
        path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
        environ = {
            **os.environ,
            "PATH": path,
            "HERE": str(tmp_path),
            "OUTCOMES": outcomes,
            "FINAL": str(output / "final.json"),
        }
        environ.pop("ODD", None)
        code = subprocess.run(["bash", str(script)], env=environ, cwd="/", timeout=60).returncode
        return code, [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return run


def test_arguments(submit, tmp_path) -> None:
    code, calls = submit("0:final", "--num-procs", "2", "--device", "cpu")
    assert code == 0
    (call,) = calls
    wanted = [TINY, "--output", str(tmp_path / ODD / "run"), "--name", ODD, "--resume", "auto", "--device", "cpu"]
    assert call["argv"][-len(wanted) :] == wanted
    assert call["argv"][: -len(wanted)] == [
        "--kill-on-bad-exit=1",
        sys.executable,
        "-u",
        "-m",
        "permafrost.launcher.train",
    ]
    assert call["odd"] == ODD
    assert call["cwd"] == str(tmp_path / ODD)
    script = (tmp_path / "job.sbatch").read_text()
    assert "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=2\n" in script
    assert "gpus-per-node" not in script


@pytest.mark.parametrize(
    ("outcomes", "code", "num_calls"),
    [
        ("1 0:final", 0, 2),  # a fault, then the rest of the run
        ("1 1 1", 1, 3),  # as often as allowed
        ("2 0:final", 2, 1),  # a mistake is not tried again
        ("75 0:final", 75, 1),  # saved on a signal: who sent it wants the machines
        ("1:final 0", 1, 1),  # a head that was stopped: the run has ended
        ("0 0 0", 3, 3),  # all is well, they say, without the marker
    ],
)
def test_restarts(submit, outcomes, code, num_calls) -> None:
    found, calls = submit(outcomes, "--num-procs", "2", "--max-restarts", "2")
    assert (found, len(calls)) == (code, num_calls)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--slurm", "-", "--num-procs", "3"), "loop.global_batch 2 does not divide over 3 process"),
        (("--slurm", "-", "--num-procs", "1", "--hostfile", "hosts"), "--slurm and --hostfile exclude each other"),
        (("--num-nodes", "2"), "--num-nodes is for --slurm"),
        (("--slurm", "/nowhere/x", "--num-procs", "1"), "--slurm /nowhere/x cannot be written: No such file"),
    ],
)
def test_refused(options, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("node01 slots=1\n")
    assert main(["launch", TINY, *options]) == 2
    assert message in capsys.readouterr().err
