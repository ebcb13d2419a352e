"""A run records and shows this, on a terminal, without one, with a full disk, and on ranks that must be silent."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from permafrost.launcher.run.folder import RunFolder
from permafrost.launcher.run.meters import _covered
from permafrost.launcher.run.monitor import Eta, EventFile, JsonLines, Monitor, format_duration

FULL_DISK = Path("/dev/full")
needs_full_disk = pytest.mark.skipif(not FULL_DISK.exists(), reason="the system has no /dev/full")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def lines(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def tensorboard(run: RunFolder) -> EventAccumulator:
    return EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0, "images": 0}).Reload()


def monitor(run: RunFolder, **fields: object) -> Monitor:
    return Monitor(run, **{"num_steps": 10, "is_main": True, **fields})


def test_scalars_are_one_flushed_line_a_step_and_tensorboard(run: RunFolder) -> None:
    opened = monitor(run)
    opened.scalars(1, {"detection/loss": 2.5, "rate": 1e-4})
    assert lines(run) == [{"step": 1, "detection/loss": 2.5, "rate": 1e-4}], "on disk before the monitor is closed"
    opened.scalars(2, {"detection/loss": math.nan})
    opened.scalars(2, {"bbox/AP": 0.25, "time": math.inf})
    opened.scalars(3, {"detection/loss": 2.0})
    assert lines(run) == [
        {"step": 1, "detection/loss": 2.5, "rate": 1e-4},
        {"step": 2, "detection/loss": None, "bbox/AP": 0.25, "time": None},
        {"step": 3, "detection/loss": 2.0},
    ]
    events = tensorboard(run).Scalars("detection/loss")
    opened.close()
    assert [event.step for event in events] == [1, 2, 3]
    assert events[0].value == 2.5
    assert math.isnan(events[1].value)


def test_merged_line_may_become_shorter(run: RunFolder) -> None:
    with monitor(run) as opened:
        opened.scalars(1, {"value": 0.123456789})
        opened.scalars(1, {"value": 1.0})
        assert lines(run) == [{"step": 1, "value": 1.0}]
        opened.scalars(2, {"value": 3.0})
    assert lines(run) == [{"step": 1, "value": 1.0}, {"step": 2, "value": 3.0}]


def test_pictures_and_texts_reach_tensorboard(run: RunFolder) -> None:
    from PIL import Image

    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    with monitor(run) as opened:
        opened.image(7, "detection/pictures", picture)
        opened.text("recipe", "**quickstart**")
    found = tensorboard(run)
    (image,) = found.Images("detection/pictures")
    assert image.step == 7
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), picture)
    (text,) = found.Tensors("recipe/text_summary")
    assert text.tensor_proto.string_val == [b"**quickstart**"]


def test_a_resumed_run_drops_what_comes_again(run: RunFolder) -> None:
    with monitor(run) as first:
        for step in range(1, 6):
            first.scalars(step, {"loss": step})
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    with monitor(run, start_step=3) as second:
        second.scalars(3, {"bbox/AP": 0.5})
        second.scalars(4, {"loss": 40})
    assert lines(run) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 3.0, "bbox/AP": 0.5},
        {"step": 4, "loss": 40.0},
    ]
    assert [(event.step, event.value) for event in tensorboard(run).Scalars("loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]


def test_other_ranks_write_and_print_nothing(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with monitor(run, is_main=False) as opened:
        opened.scalars(1, {"loss": 1})
        opened.image(1, "picture", np.zeros((2, 2, 3), np.uint8))
        opened.text("text", "text")
        opened.progress(1, {"loss": 1})
        opened.say("said")
        opened.warn("warned")
    assert list(run.path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_plain_progress(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with monitor(run, num_steps=7, log_every=3) as opened:
        for step in range(1, 8):
            opened.progress(step, {"loss": 1 / step, "norm": 12345.678}, note="9 images/s")
        opened.say("done [not markup]")
        opened.warn("a warning")
    out, err = capsys.readouterr()
    printed = out.splitlines()
    assert [line.split()[1] for line in printed[:-1]] == ["1/7", "3/7", "6/7", "7/7"]
    assert printed[0] == "step 1/7  loss 1  norm 1.235e+04  9 images/s"
    assert printed[1].endswith("s left")
    assert printed[-1] == "done [not markup]"
    assert err == "warning: a warning\n"


LIVE = """
import sys
from pathlib import Path
from permafrost.launcher.run.monitor import Monitor
from permafrost.launcher.run.folder import RunFolder

with Monitor(RunFolder(sys.argv[1]), num_steps=3, is_main=True) as monitor:
    monitor.progress(1, {"loss": 0.5, **{f"a rather long name {i}": i for i in range(20)}})
    monitor.say("said [red]in between[/red]")
    monitor.warn("careful")
    print("printed by a library")
    monitor.progress(2, {"loss": 0.25})
    monitor.progress(3, {"loss": 0.125})
print("afterwards")
"""


def test_live_line_on_a_terminal(run: RunFolder) -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "70", "LINES": "30"}
    code = [sys.executable, "-c", LIVE, str(run.path)]
    child = subprocess.Popen(code, stdout=follower, stderr=follower, stdin=follower, env=environment)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:
        pass  # the end of a pseudo-terminal
    finally:
        os.close(leader)
    assert child.wait(timeout=60) == 0, shown
    text = shown.decode()
    assert "step 1/3" in text
    assert "step 3/3" in text
    assert "loss 0.125" in text
    assert "\x1b[2K" in text, "the line is drawn over, not appended"
    assert text.count("said [red]in between[/red]") == 1
    assert "warning: careful" in text
    assert "printed by a library" in text
    assert text.rstrip().endswith("afterwards")
    assert "…" in text, "what does not fit is cut, so that the line stays one line"


@needs_full_disk
def test_full_disk_is_one_warning_and_training_goes_on(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.metrics.symlink_to(FULL_DISK)
    monkeypatch.setattr(EventFile, "new_path", staticmethod(lambda folder: FULL_DISK))
    with monitor(run) as opened:
        for step in range(1, 5):
            opened.scalars(step, {"loss": 1.0})
            opened.image(step, "picture", np.zeros((2, 2, 3), np.uint8))
        run.metrics.unlink()
        opened.scalars(5, {"loss": 5.0})
        opened.scalars(6, {"loss": 6.0})
    err = capsys.readouterr().err
    assert err.count("warning:") == 2
    assert err.count("TensorBoard could not be written (No space left on device)") == 1
    assert err.count("metrics.jsonl could not be written (No space left on device)") == 1
    assert lines(run) == [{"step": 5, "loss": 5.0}, {"step": 6, "loss": 6.0}], "written again once there is room"


def test_disk_that_fills_up_later(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that may not grow beyond a size breaks off in the middle of a record, as on a disk that becomes full."""
    code = (
        "import resource, sys; from permafrost.launcher.run.monitor import Monitor; "
        "from permafrost.launcher.run.folder import RunFolder; "
        "m = Monitor(RunFolder(sys.argv[1]), num_steps=100, is_main=True); m.scalars(1, {'loss': 1.0}); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
        "[m.scalars(step, {f'value{i}': step for i in range(5)}) for step in range(2, 101)]; m.close()"
    )
    ended = subprocess.run([sys.executable, "-c", code, run.path], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("warning:") == 2
    assert "Traceback" not in ended.stderr
    whole = run.metrics.read_text().rpartition("\n")[0]
    steps = [json.loads(line)["step"] for line in whole.splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 5
    assert len(tensorboard(run).Scalars("value0")) > 3, "what was written before is readable"


def test_unwritable_tensorboard_folder_is_a_warning(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run.tensorboard.write_text("a file where the folder should be")
    with monitor(run) as opened:
        opened.scalars(1, {"loss": 1.0})
        opened.scalars(2, {"loss": 1.0})
    assert capsys.readouterr().err.count("TensorBoard could not be written") == 1
    assert len(lines(run)) == 2


def test_json_lines_survive_a_broken_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.record(1, {"a": 1})
    with (tmp_path / "metrics.jsonl").open("a") as other:
        other.write('{"step": 2, "half')
    file.record(2, {"b": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 1}\n{"step": 2, "b": 2}\n'


def test_time_in_collectives_is_counted_once() -> None:
    assert _covered([]) == 0
    assert _covered([(30, 50), (0, 10), (5, 20), (6, 8), (40, 60)]) == 50e-9


def test_eta_follows_the_median_step() -> None:
    eta = Eta(num_steps=100)
    assert eta.update(10, now=0.0) is None
    assert eta.update(11, now=2.0) == pytest.approx(2.0 * 89)
    assert eta.update(12, now=4.0) == pytest.approx(2.0 * 88)
    assert eta.update(13, now=604.0) == pytest.approx(2.0 * 87), "ten minutes of evaluation are not ten minutes a step"
    assert eta.update(13, now=605.0) == pytest.approx(2.0 * 87)
    assert eta.update(100, now=700.0) == 0.0
    sparse = Eta(num_steps=100)
    sparse.update(10, now=0.0)
    assert sparse.update(20, now=5.0) == pytest.approx(40.0)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.2, "0 s"), (42, "42 s"), (99.4, "99 s"), (100, "2 min"), (3000, "50 min"), (3 * 3600 + 300, "3 h 05 min")]
    + [(47 * 3600, "47 h 00 min"), (50 * 3600, "2 d 2 h"), (5999, "1 h 40 min")],
)
def test_durations_in_words(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected
