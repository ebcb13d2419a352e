"""`permafrost resize-videos` through the command line."""

from __future__ import annotations

import numpy as np

from permafrost.data.video.reader import open_video
from permafrost.data.worlds.motion_files import write_video
from permafrost.launcher.cli import main


def test_a_folder_with_a_broken_file(tmp_path, capsys) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    (source / "a").mkdir(parents=True)
    frames = np.random.default_rng(0).integers(0, 255, (6, 96, 128, 3), dtype=np.uint8)
    write_video(source / "a" / "good.mp4", frames, 10)
    (source / "bad.mp4").write_bytes((source / "a" / "good.mp4").read_bytes()[:200])
    assert main(["resize-videos", str(source), str(target), "--short-side", "66"]) == 0
    shown = capsys.readouterr().out
    assert "1 videos written, 0 were there already, 1 cannot be decoded" in shown
    assert (target / "failures.txt").read_text().startswith("bad.mp4: ")
    assert open_video(target / "a" / "good.mp4").frames([5]).shape == (1, 66, 88, 3)


def test_mistakes_exit_with_2(tmp_path, capsys) -> None:
    assert main(["resize-videos", str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert "there is no such folder of videos" in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    assert main(["resize-videos", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "there is no video" in capsys.readouterr().err
    assert main(["resize-videos", str(tmp_path), str(tmp_path / "in" / "out")]) == 2
    assert "lies inside" in capsys.readouterr().err
    assert main(["resize-videos", str(tmp_path), str(tmp_path / "out"), "--short-side", "33"]) == 2
    assert "give an even number" in capsys.readouterr().err
