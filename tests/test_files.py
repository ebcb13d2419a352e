"""Files are replaced whole, under names that are nobody else's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors.torch import save_file

from permafrost._files import new_beside, replacing
from permafrost.launcher.cli import main
from permafrost.launcher.files import write_atomically
from permafrost.model.swin.v2 import SwinV2
from permafrost.model.swin.weights import draw_weights


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with replacing(target, durable=True) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("kind", [OSError, ValueError, KeyboardInterrupt])
def test_after_an_error_all_is_as_it_was(tmp_path: Path, folder: bool, kind: type[BaseException]) -> None:
    def write() -> None:
        with replacing(tmp_path / "new", folder=folder) as partial:
            (partial / "file" if folder else partial).write_text("half")
            raise kind

    with pytest.raises(kind):
        write()
    assert not os.listdir(tmp_path)


def test_what_others_made_is_left_alone(tmp_path: Path) -> None:
    target, precious = tmp_path / "latest", tmp_path / "precious"
    precious.write_text("mine")
    for name in ("latest.partial", ".latest.partial"):
        (tmp_path / name).symlink_to(precious)
    write_atomically(target, "step\n")
    assert (target.read_text(), precious.read_text()) == ("step\n", "mine")
    assert (tmp_path / ".latest.partial").is_symlink()
    target.unlink()
    target.symlink_to(precious)
    write_atomically(target, "step\n")
    assert not target.is_symlink()
    assert precious.read_text() == "mine"


def test_permissions_are_those_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "plain_folder").mkdir()
    assert new_beside(tmp_path / "file", "partial").stat().st_mode == (tmp_path / "plain").stat().st_mode
    made = new_beside(tmp_path / "folder", "partial", folder=True)
    assert made.stat().st_mode == (tmp_path / "plain_folder").stat().st_mode


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    def write(letter: str) -> None:
        for _ in range(200):
            write_atomically(tmp_path / "file", letter * 10_000, durable=False)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "file").exists():
            assert len(set((tmp_path / "file").read_text())) == 1
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == ["file"]


def test_convert_keeps_a_folder_of_the_users(tmp_path: Path) -> None:
    """OUT.partial was deleted, with all that was in it."""
    weights = tmp_path / "weights.safetensors"
    save_file(dict(draw_weights(SwinV2("swinv2_nano", window_size=8), seed=0)), weights)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("four years")
    assert main(["convert", str(weights), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "four years"
    assert sorted(os.listdir(tmp_path)) == ["out", "out.partial", "weights.safetensors"]


def test_a_killed_writer_leaves_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    code = (
        "import os, pathlib, sys; from permafrost._files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "file"]).returncode == -9
    assert (tmp_path / "file").read_text() == "old"
