"""The `permafrost` command as a user meets it: answers, exit codes, and one tiny run from training to check-data."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from permafrost.data.build import located
from permafrost.launcher import cli
from permafrost.launcher.cli import COMMANDS, main
from permafrost.launcher.recipes.find import list_recipes
from permafrost.launcher.recipes.overrides import parse_experiment

RECIPE = f"{Path(__file__).with_name('tiny_recipe.py')}:tiny"
PROGRAM = str(Path(sys.executable).with_name("permafrost"))


def run_program(*args: str, cwd: Path, program: Sequence[str] = (PROGRAM,)) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*program, *args], cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_is_quick_and_imports_nothing_heavy(here: Path) -> None:
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        shown = run_program("--help", cwd=here)
        seconds.append(time.monotonic() - start)
        assert shown.returncode == 0
    assert all(f"permafrost {command}" in shown.stdout for command in COMMANDS)
    # The best of five: other work on the machine is not the program's.
    assert min(seconds) < 0.5, seconds
    heavy = "{'torch', 'tyro', 'rich', 'numpy'} & set(sys.modules)"
    code = f"import sys; from permafrost.launcher.cli import main; main(['--help']); assert not {heavy}, {heavy}"
    assert run_program("-c", code, cwd=here, program=[sys.executable]).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_without_torch(command: str, here: Path) -> None:
    code = f"import sys; from permafrost.launcher.cli import main; c = main([{command!r}, '--help']); "
    code += "assert 'torch' not in sys.modules; sys.exit(c)"
    shown = run_program("-c", code, cwd=here, program=[sys.executable])
    assert shown.returncode == 0, shown.stderr
    assert f"permafrost {command}" in shown.stdout
    assert not shown.stderr


def test_mistakes_are_answered_in_time(here: Path) -> None:
    for args, expected in (
        (["train", "quickstrat"], "did you mean quickstart?"),
        (["train", "quickstart", "--loop.num-stps", "3"], "did you mean --loop.num-steps?"),
        (["trian", "quickstart"], "did you mean train"),
    ):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = run_program(*args, cwd=here)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Seconds of its own work: the rest of the machine's is none of its.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
        assert shown.returncode == 2
        assert shown.stderr.startswith("error: ")
        assert expected in shown.stderr
        assert "Traceback" not in shown.stderr
        assert not shown.stdout
    assert not list(here.iterdir()), "nothing is begun"


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        ([], 2, "permafrost train RECIPE"),
        (["train"], 2, "error: permafrost train needs a recipe"),
        (["train", "--loop.num-steps", "3", "quickstart"], 2, "the recipe comes first"),
        (["train", RECIPE, "--resume", "sometimes"], 2, "invalid choice: 'sometimes'"),
        (["train", RECIPE, "--device", "tpu"], 2, "'tpu' is not a device"),
        (["train", RECIPE, "--resume", "must"], 2, "error: --resume is must but runs/tiny holds no run"),
        (["train", RECIPE, "--loop.num-steps", "0"], 2, "error: loop.num_steps is 0"),
        (["train", RECIPE, "--loop.num-steps", "many"], 2, "--loop.num-steps"),
        (["train", "pretrain:nano_glyphs"], 2, "it is for `permafrost pretrain`"),
        (["pretrain", "coco:swinv2_base_fpn"], 2, "it is for `permafrost train`"),
        (["pretrain", "nano_glyphs", "--batch-sise", "3"], 2, "did you mean --batch-size"),
        (["evaluate", "no_run"], 2, "error: no_run holds no run"),
        (["evaluate"], 2, "required: RUN"),
        (["evaluate", "no_run", "--chekpoint", "latest"], 2, "did you mean --checkpoint"),
        (["predict", "no_run", "picture.jpg"], 2, "required: --output"),
        (["predict", "no_run", "picture.jpg", "--output", "out", "--score-threshold", "50"], 2, "from 0 to 1"),
        (["check-data", RECIPE, "--draw", "0"], 2, "not a number of samples"),
        (["check-data", RECIPE, "--output", "sheet.gif"], 2, "does not end in .png"),
        (["recipes", "--plian"], 2, "did you mean --plain"),
    ],
)
def test_exit_codes_of_mistakes(
    args: list[str], code: int, expected: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == code
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err
    assert not (here / "runs").exists(), "refused before a run folder is made"


def test_missing_data_says_the_layout(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "check-data"):
        assert main([command, "coco:swinv2_base_fpn", "--data.root", "nowhere"]) == 2
        captured = capsys.readouterr()
        assert "annotations/instances_train2017.json" in captured.out + captured.err
        assert "nowhere" in captured.out + captured.err


def test_a_start_that_failed_does_not_stand_in_the_way_of_the_mended_command(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", RECIPE, "--device", "cpu"]
    assert main([*command, "--backbone.weights", "no_such_file.pth"]) == 2
    assert "no_such_file.pth" in capsys.readouterr().err
    assert main([*command, "--heads.detection.metric", "bbox/APP"]) == 2
    assert "heads.detection.metric" in capsys.readouterr().err
    assert not list(Path("runs").iterdir())
    assert main(command) == 0
    assert main([*command, "--loop.num-steps", "6"]) == 2, "which is another recipe than what was trained"
    assert len(list(Path("runs/tiny/checkpoints").iterdir())) == 2


def test_help_of_a_recipe_shows_every_field(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", "--help"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "Mask R-CNN with FPN on the frozen",
        "--resume",
        "--heads.detection.optimizer.learning-rate FLOAT",
        "--data.world.num-train INT",
        "--engine.precision {auto,float32,bfloat16}",
        "--output {None}|STR",
    ):
        assert expected in text
    assert "(default: 160)" in text


def test_recipes_lists_all(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    header, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert header == ["recipe", "command", "data", "backbone", "trainable", "result", "about"]
    assert [row[0] for row in rows] == [info.name for info in list_recipes()]
    assert [row[4:6] for row in rows if row[0] == "coco:swinv2_base_fpn"] == [["20.40 M", "45.0 box AP, 41.1 mask AP"]]


def test_recipes_on_a_terminal_is_a_table(here: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert "──" in text
    assert "coco:swinv2_base_fpn" in text
    assert "\t" not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"permafrost \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_local_rank_of_the_deepspeed_launcher_is_ignored() -> None:
    for args in (["--local_rank=1", "--loop.num-steps", "3"], ["--loop.num-steps", "3", "--local_rank", "1"]):
        assert parse_experiment(RECIPE, args).loop.num_steps == 3


def test_interrupt_and_closed_pipe(here: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupt(argv: list[str]) -> int:
        raise KeyboardInterrupt

    from permafrost.launcher.commands import recipes

    monkeypatch.setattr(recipes, "run", interrupt)
    assert main(["recipes"]) == cli.INTERRUPTED == 130
    monkeypatch.undo()
    reader, writer = os.pipe()
    os.close(reader)
    for environment in ({}, {"PYTHONUNBUFFERED": "1"}):
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        ended = subprocess.run(
            [PROGRAM, "recipes"], stdout=writer, stderr=subprocess.PIPE, env={**inherited, **environment}, timeout=60
        )
        assert (ended.returncode, ended.stderr) == (0, b"")
    os.close(writer)


def test_train_evaluate_resume(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way through the command line, as the README has it; predict is in test_predict.py."""
    assert main(["train", RECIPE, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    printed = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in printed] == ["1/4", "2/4", "3/4", "4/4"]
    run = here / "runs" / "tiny"
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert "detection/bbox/AP" in logged[-1], "the evaluation stands in its step's line"
    final = json.loads((run / "final.json").read_text())["metrics"]["detection"]

    assert main(["evaluate", "runs/tiny", "--device", "cpu", "--checkpoint", "latest"]) == 0
    again = json.loads((run / "evaluation.json").read_text())["metrics"]["detection"]
    assert again == pytest.approx(final, abs=1e-6)
    assert f"{again['bbox/AP']:.3f}" in capsys.readouterr().out

    assert main(["train", RECIPE, "--device", "cpu", "--loop.seed", "9"]) == 2
    assert "loop.seed" in capsys.readouterr().err
    assert main(["train", RECIPE, "--device", "cpu", "--resume", "never"]) == 2
    assert main(["train", RECIPE, "--device", "cpu"]) == 0, "the same command again has nothing left to do"


def test_a_head_stopped_by_its_losses_exits_with_1(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = ["--heads.detection.optimizer.learning-rate", "1e30", "--heads.detection.schedule.warmup-steps", "0"]
    assert main(["train", RECIPE, "--device", "cpu", "--loop.num-steps", "12", *fields]) == 1
    err = capsys.readouterr().err
    assert "error: " in err
    assert "not finite" in err
    assert "Traceback" not in err


def test_module_entry_point_and_interrupt_of_a_real_run(here: Path) -> None:
    """`python -m permafrost.launcher.train`, as deepspeed's launcher calls it, interrupted while data workers run."""
    command = [sys.executable, "-m", "permafrost.launcher.train", "--local_rank=0", RECIPE, "--device", "cpu"]
    command += ["--loop.num-steps", "100000", "--loop.num-workers", "1", "--output", "run"]
    # A shell that started this suite in its background has told it, and what it starts, to ignore SIGINT.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=here, **pipes, start_new_session=True, preexec_fn=heed)
    try:
        for line in process.stdout:
            if line.startswith("step "):
                break
        # As a terminal's Ctrl-C does: to every process of the group.
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in err


def world(folder: Path) -> list[str]:
    """Arguments naming a recipe on a copy of the tiny world in `folder`, as a user's own COCO data."""
    there = located(parse_experiment(RECIPE, []).data)
    shutil.copytree(there.root, folder)
    recipe = folder.parent / "own.py"
    recipe.write_text(
        "import dataclasses\n"
        "from permafrost.data.detection.config import CocoDataConfig\n"
        "from permafrost.launcher.experiment import Experiment\n"
        "from permafrost.launcher.recipes.find import build_recipe\n"
        "def own() -> Experiment:\n"
        f"    tiny = build_recipe({RECIPE!r})\n"
        f"    return dataclasses.replace(tiny, name='own', data=CocoDataConfig(root={str(folder)!r}, image_size=64))\n"
    )
    return [f"{recipe}:own"]


def test_check_data_of_a_sound_world_draws_samples(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = world(here / "coco")
    before = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in (here / "coco").rglob("*.*")}
    assert main(["check-data", *args, "--draw", "6", "--output", "sheets/samples.png"]) == 0
    out = capsys.readouterr().out
    assert "12 images for training and 5 images for validation, 8 classes: circle" in out
    assert "no faults found" in out
    sheet = np.asarray(Image.open("sheets/samples.png"))
    cell = (320 + 20 + 4, 320 + 4)
    assert sheet.shape == (2 * cell[0] - 4, 4 * cell[1] - 4, 3)
    assert (sheet[cell[0] :, 2 * cell[1] :] == 255).all(), "six samples leave two cells of eight empty"
    assert (sheet[: cell[0] - 4, : cell[1] - 4] != 255).any()
    assert {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in before} == before


def test_check_data_names_what_is_wrong(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = world(here / "coco")
    train_image = sorted((here / "coco" / "train2017").iterdir())[0]
    train_image.write_bytes(train_image.read_bytes()[:300])
    assert main(["check-data", *args]) == 0, "training replaces it"
    captured = capsys.readouterr()
    assert f"warning: {train_image}" in captured.out
    assert "1 warnings: a run can start" in captured.out

    val_image = sorted((here / "coco" / "val2017").iterdir())[0]
    val_image.write_text("no image")
    assert main(["check-data", *args]) == 2, "evaluation needs every image"
    captured = capsys.readouterr()
    assert f"error: {val_image}" in captured.out
    assert "cannot start: 1 of these 2 findings" in captured.err
    assert main(["check-data", *args, "--quick"]) == 0, "which does not decode"

    (here / "coco" / "annotations" / "instances_val2017.json").write_text("{")
    assert main(["check-data", *args, "--quick"]) == 2
    assert "instances_val2017.json" in capsys.readouterr().out


def test_pretrain_debug_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = ["--num-steps", "2", "--num-train-images", "32", "--num-val-images", "20", "--batch-size", "4"]
    fields += ["--warmup-steps", "1", "--evaluate-every", "5", "--log-every", "1", "--checkpoint-every", "2"]
    command = ["pretrain", "nano_glyphs_debug", *fields, "--device", "cpu", "--output", "run"]
    assert main(command) == 0
    recorded = json.loads(Path("run/recipe.json").read_text())
    assert recorded["command"] == " ".join(["permafrost", *command])
    assert recorded["recipe"]["num_steps"] == 2
    assert list(Path("run").glob("*.safetensors"))
