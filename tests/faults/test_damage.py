"""Rows 5 to 9: damaged checkpoints, folders that say nonsense, full disks."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from permafrost import _files
from permafrost.launcher.cli import main

RECIPE = f"{Path(__file__).with_name('recipe.py')}:tiny"
REQUIRE_VARIABLE = "PERMAFROST_REQUIRE_MULTINODE"
FILES = ("state.json", "detection/head.safetensors", "detection/optimizer.safetensors")
COMMAND = ("train", RECIPE, "--device", "cpu", "--loop.num-steps", "6", "--output")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with the checkpoints of 2, 4 and 6."""
    run = tmp_path_factory.mktemp("ended") / "run"
    assert main([*COMMAND, str(run)]) == 0
    return run


@pytest.fixture
def unfinished(ended: Path, tmp_path: Path) -> Path:
    """A copy of it that a kill has left before the last line was written, with the newest checkpoint in place."""
    run = tmp_path / "run"
    shutil.copytree(ended, run)
    (run / "final.json").unlink()
    return run


def contents(run: Path, step: int = 6) -> dict[str, bytes]:
    """Every tensor of a checkpoint."""
    files = (run / f"checkpoints/step_{step:08d}/detection").iterdir()
    return {f"{path.stem}.{name}": tensor.tobytes() for path in files for name, tensor in load_file(path).items()}


def start_steps(run: Path) -> list[int]:
    return [json.loads(line)["start_step"] for line in (run / "provenance.jsonl").read_text().splitlines()]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "a bit flipped", "deleted"])
@pytest.mark.parametrize("file", FILES)
def test_the_one_before_is_used(
    unfinished: Path, ended: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Callable[[Path], object]
) -> None:
    """Rows 5, 6, 7. One warning that names the file, code 0, and in the end the same bits."""
    path = unfinished / "checkpoints/step_00000006" / file
    damage(path)
    assert main([*COMMAND, str(unfinished)]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert str(path) in warning
    assert "step_00000004 is used instead" in warning
    assert start_steps(unfinished) == [0, 4]
    assert contents(unfinished) == contents(ended)


@pytest.mark.parametrize("content", ["", "step_00000002", "../../../../elsewhere", "\0garbage"])
def test_latest_is_not_trusted(unfinished: Path, tmp_path: Path, ended: Path, content: str) -> None:
    """Row 7. An empty `latest`, an old one, one that leads out of the folder: the newest complete one is used."""
    (unfinished / "latest").write_text(content)
    before = sorted(tmp_path.iterdir())
    assert main([*COMMAND, str(unfinished)]) == 0
    assert start_steps(unfinished) == [0, 6]
    assert sorted(tmp_path.iterdir()) == before
    assert contents(unfinished) == contents(ended)


def test_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 8. `--resume must` refuses; the default starts anew."""
    assert main([*COMMAND, str(tmp_path / "run"), "--resume", "must"]) == 2
    assert "--resume is must but" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """small_disk(options): a tmpfs of its own, mounted anew with other options when called again."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        again = ["-o", f"remount,{options}"] if os.path.ismount(place) else ["-t", "tmpfs", "-o", options, "none"]
        result = subprocess.run(["mount", *again, str(place)], capture_output=True, text=True)
        if result.returncode:
            if os.environ.get(REQUIRE_VARIABLE):
                pytest.fail(f"{REQUIRE_VARIABLE} is set, and nothing can be mounted: {result.stderr}", pytrace=False)
            pytest.skip(
                f"a disk that is full or read-only is a tmpfs here, which takes root to mount: {result.stderr.strip()}"
            )
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_full_disk(small_disk: Callable[[str], Path], ended: Path, start: Callable) -> None:
    """Row 9. Two checkpoints fit, the third does not: a warning, a count, code 2 at the end; with room it goes on."""
    size = sum(path.stat().st_size for path in (ended / "checkpoints/step_00000006").rglob("*"))
    disk = small_disk(f"size={int(2.6 * size)}")
    run = disk / "run"
    arguments = ("--loop.num-steps", "6", "--output", str(run))
    job = start("tiny", *arguments)
    assert job.codes() == [2], job.all_output()
    output = job.output()
    assert re.search(r"warning: the checkpoint of step 6 could not be written: .*No space left", output), output
    assert re.search(r"error: the checkpoint of step 6 .* Make room and run the same command again", output), output
    assert "Traceback" not in output
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == ["step_00000002", "step_00000004"], "the last good one is there, what was begun is not"
    assert not (run / "final.json").exists()
    small_disk(f"size={8 * size}")
    job = start("tiny", *arguments)
    assert job.codes() == [0], job.all_output()
    assert start_steps(run) == [0, 4]
    assert contents(run) == contents(ended)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while(small_disk: Callable[[str], Path], ended: Path, start: Callable) -> None:
    """Row 9. The middle checkpoint finds no room, the next one does: the run ends well and has counted."""
    size = sum(path.stat().st_size for path in (ended / "checkpoints/step_00000006").rglob("*"))
    disk = small_disk(f"size={int(2.6 * size)}")
    ballast, run = disk / "ballast", disk / "run"
    ballast.write_bytes(bytes(int(1.1 * size)))
    fault = {"do": "remove", "path": str(ballast), "at": "step", "number": 6}
    job = start("tiny", "--loop.num-steps", "6", "--output", str(run), fault=fault)
    assert job.codes() == [0], job.all_output()
    assert job.output().count("warning: the checkpoint of step 4 could not be written") == 1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000002", "step_00000006"]
    assert (run / "latest").read_text() == "step_00000006\n"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counts = [line["checkpoints/failed"] for line in lines if "checkpoints/failed" in line]
    assert counts == [0, 0, 0, 0, 1, 1]
    assert contents(run) == contents(ended)


def test_a_disk_that_is_full_at_the_start(
    small_disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 9. What a start writes besides checkpoints has to fit, too; nothing is built before that is known."""
    run = small_disk("size=48k") / "run"
    assert main([*COMMAND, str(run)]) == 2
    assert f"cannot write to the run folder {run}: No space left on device; give another" in capsys.readouterr().err
    assert not (run / "recipe.json").exists()


def test_a_disk_that_is_full_at_the_end(
    unfinished: Path, ended: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 9. The last checkpoint is there and the marker of a run that has ended is not: the same command makes up for it."""
    make = _files.new_beside

    def full(path: Path, *arguments: object, **fields: object) -> Path:
        if path.name == "final.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return make(path, *arguments, **fields)

    monkeypatch.setattr(_files, "new_beside", full)
    assert main([*COMMAND, str(unfinished)]) == 2
    error = capsys.readouterr().err
    assert f"{unfinished / 'final.json'} could not be written: [Errno 28] No space left on device" in error
    assert "Make room and run the same command again" in error
    assert not (unfinished / "final.json").exists()
    monkeypatch.undo()
    assert main([*COMMAND, str(unfinished)]) == 0
    assert (unfinished / "final.json").read_text() == (ended / "final.json").read_text()


@pytest.mark.parametrize("place", ["read-only", "under a file"])
def test_unwritable_output(small_disk: Callable[[str], Path], tmp_path: Path, place: str) -> None:
    """Row 11. Refused before torch is imported, and nothing is made."""
    if place == "read-only":
        run = small_disk("ro,size=1m") / "run"
    else:
        (tmp_path / "file").write_text("mine")
        run = tmp_path / "file" / "run"
    code = (
        "import sys\nfrom permafrost.launcher.cli import main\ncode = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    command = [sys.executable, "-c", code, "train", "quickstart", "--output", str(run)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of its own work: the rest of the machine's is none of its.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: cannot write to the run folder {run}: ")
    assert "give another --output" in result.stderr
    assert not os.path.lexists(run)
