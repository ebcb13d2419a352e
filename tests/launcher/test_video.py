"""Video action recognition through the command line: a small run with everything that follows it, and the paper's recipes."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import permafrost
from permafrost.data import DataError
from permafrost.data.video.inputs import draw_panel
from permafrost.data.worlds.motion import CLASSES
from permafrost.heads.video.config import GlobalVideoConfig, LinearVideoConfig, TemporalVideoConfig
from permafrost.launcher.cli import main
from permafrost.launcher.recipes.find import RecipeInfo, build_recipe, list_recipes

sys.path.insert(0, str(Path(__file__).parent.parent / "data" / "video"))
import video_files

WORLD = ["--data.world.num-train", "10", "--data.world.num-val", "10", "--data.world.num-frames", "12"]
LOOP = ["--loop.num-workers", "0", "--loop.global-batch", "2", "--loop.log-every", "1", "--loop.evaluation-batch", "5"]
RECIPES = {info.name: info for info in list_recipes() if info.name.startswith(("paper_kinetics:", "kinetics:"))}
PUBLISHED = {
    # Top-1, frozen and fine-tuned, as printed in the paper; the head.
    "table1_sup_1k": ("60.4", "77.0", LinearVideoConfig),
    "table1_esvit_1k": ("62.0", "76.5", LinearVideoConfig),
    "table1_simmim_1k": ("14.2", "75.9", LinearVideoConfig),
    "table1_icar_laion": ("65.1", "79.5", LinearVideoConfig),
    "table1_icar_laion_22k": ("69.4", "80.2", LinearVideoConfig),
    "table4_linear": ("70.3", "79.7", LinearVideoConfig),
    "table4_temporal": ("74.7", "79.5", TemporalVideoConfig),
    "table4_global": ("77.5", "79.8", GlobalVideoConfig),
    "table5_tiny_1k": ("70.6", "75.7", GlobalVideoConfig),
    "table5_base_1k": ("73.3", "77.9", GlobalVideoConfig),
    "table5_base_22k": ("77.7", "79.8", GlobalVideoConfig),
    "table5_large_22k": ("78.7", "79.8", GlobalVideoConfig),
    "table5_giant": ("81.7", None, GlobalVideoConfig),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickstart of two steps on ten videos, two views of each validation video, with a picture for TensorBoard."""
    folder = tmp_path_factory.mktemp("video")
    fields = [*WORLD, *LOOP, "--data.root", str(folder / "world"), "--data.clip.test-clips", "2"]
    fields += ["--loop.num-steps", "2", "--loop.checkpoint-every", "2", "--loop.image-every", "2"]
    assert main(["train", "quickstart_video", *fields, "--output", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def kinetics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 classes in the official CSV's layout, with two videos of each split; a third is a dead link."""
    root = tmp_path_factory.mktemp("kinetics")
    plain = video_files.write_numbered(root / "plain.mp4", 30)
    for split in ("train", "val"):
        (root / split).mkdir()
        rows = ["label,youtube_id,time_start,time_end,split"]
        for number in range(400 if split == "train" else 3):
            rows.append(f"class {number:03d},id{number:04d},0,10,{split}")
        for number in range(2):
            shutil.copy(plain, root / split / f"id{number:04d}_000000_000010.mp4")
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return root


def test_a_run_learns_scores_and_draws(run) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["video/loss"] for line in lines if "video/loss" in line]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    final = json.loads((run / "final.json").read_text())
    assert final["best"]["video"]["metric"] == "video/top1"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert "video/predicted_and_true" in events.Tags()["images"]


def test_evaluate_says_what_it_is_over_and_draws_the_confusion_matrix(run, capsys) -> None:
    assert main(["evaluate", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "10 videos (20 clips) for validation" in shown
    assert "top1 of each class" in shown
    metrics = json.loads((run / "evaluation.json").read_text())["metrics"]["video"]
    assert (metrics["video/num_videos"], metrics["video/num_clips"]) == (10, 20)
    listed = json.loads((run / "results_video.json").read_text())
    assert all(entry["num_views"] == 2 and len(entry["top"]) == 5 for entry in listed)
    right = [entry["top"][0]["label"] == entry["label"] for entry in listed]
    assert metrics["video/top1"] == pytest.approx(np.mean(right))
    assert metrics["video/top5"] >= metrics["video/top1"]
    by_class = [metrics[f"video/top1-{name}"] for name in CLASSES]
    assert metrics["video/mean_class"] == pytest.approx(np.mean(by_class))
    with Image.open(run / "results_video_confusion.png") as picture:
        assert min(picture.size) >= 500


def test_missing_and_broken_videos_are_counted_beside_the_accuracy(run, tmp_path, capsys) -> None:
    root = shutil.copytree(run.parent / "world", tmp_path / "world")
    # A user's own list with a dead link and a damaged file.
    lines = (root / "val.txt").read_text().splitlines()
    (root / "val" / lines[0].split()[0]).unlink()
    (root / "val" / lines[1].split()[0]).write_bytes(b"no video")
    assert main(["check-data", "quickstart_video", *own_files(root), "--quick"]) == 0
    assert "missing videos" in capsys.readouterr().out
    output = tmp_path / "own"
    assert (
        main(["train", "quickstart_video", *own_files(root), *LOOP, "--loop.num-steps", "1", "--output", str(output)])
        == 0
    )
    capsys.readouterr()
    assert main(["evaluate", str(output), "--checkpoint", "latest"]) == 0
    metrics = json.loads((output / "evaluation.json").read_text())["metrics"]["video"]
    assert {name: metrics[f"video/num_{name}"] for name in ("videos", "clips", "unreadable", "missing")} == {
        "videos": 8, "clips": 8, "unreadable": 1, "missing": 1,
    }  # fmt: skip
    broken = str(output.parent / "world" / "val" / lines[1].split()[0])
    listed = json.loads((output / "unreadable.json").read_text())
    assert list(listed) == [broken]
    assert "cannot be opened" in listed[broken]
    assert (
        f"1 file(s) cannot be read and are left out (all of them: {output / 'unreadable.json'})"
        in capsys.readouterr().out
    )
    # In training: all but one are damaged, and the run goes on with that one.
    for name in (line.split()[0] for line in (root / "train.txt").read_text().splitlines()[1:]):
        (root / "train" / name).write_bytes(b"no video")
    again = tmp_path / "damaged"
    command = ["train", "quickstart_video", *own_files(root), *LOOP, "--loop.num-steps", "2", "--output", str(again)]
    assert main(command) == 0
    last = json.loads((again / "metrics.jsonl").read_text().splitlines()[-1])
    replaced = json.loads((again / "replaced_images.json").read_text())
    assert len(replaced) == last["data/replaced_images"] >= 1
    assert all("cannot be opened" in reason for reason in replaced.values())
    # Repaired: nothing of the old list stays.
    shutil.copy(run.parent / "world" / "val" / lines[1].split()[0], broken)
    assert main(["evaluate", str(output), "--checkpoint", "latest"]) == 0
    assert not (output / "unreadable.json").exists()


def test_predict_writes_the_video_with_its_classes_and_a_json(run, tmp_path, capsys) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 50, 70, 3), dtype=np.uint8)
    video_files.write_with(tmp_path / "long.mp4", frames)
    video_files.write_with(tmp_path / "turned.mp4", frames[:3], rotation=90)
    video_files.write_audio(tmp_path / "sound.mp4")
    Image.fromarray(frames[0]).save(tmp_path / "picture.png")
    (tmp_path / "picture.png").rename(tmp_path / "picture.mp4")
    output = tmp_path / "out"
    assert main(["predict", str(run), str(tmp_path), "--output", str(output)]) == 1
    shown = capsys.readouterr().err
    assert "2 of 4 inputs could not be read" in shown
    assert "it holds no video stream, only audio" in shown
    assert "it is a PNG picture, not a video" in shown
    listed = json.loads((output / "predictions.json").read_text())
    assert [Path(entry["file_name"]).stem for entry in listed] == ["long", "turned"]
    for entry, count, (height, width) in zip(listed, (9, 3), ((50, 70), (70, 50))):
        assert entry["num_views"] == 2
        scores = [found["score"] for found in entry["top"]]
        assert len(scores) == 5
        assert scores == sorted(scores, reverse=True)
        assert {found["class"] for found in entry["top"]} <= set(CLASSES)
        assert 0 < sum(scores) <= 1 + 1e-5
        with av.open(str(output / f"{Path(entry['file_name']).stem}.mp4")) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        factor = -(-320 // width)
        panel = draw_panel(
            [(CLASSES.index(found["class"]), found["score"]) for found in entry["top"]], CLASSES, factor * width
        )
        assert len(pictures) == count
        assert pictures[0].shape == (factor * height + panel.shape[0], factor * width, 3)
        # The classes beneath the picture are there, and elsewhere is none.
        error = np.abs(pictures[0][factor * height :].astype(int) - panel)
        assert error.mean() < 12
        assert (panel > 200).any()


def test_a_loaded_run_takes_videos_by_path_and_as_frames(run, tmp_path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 50, 70, 3), dtype=np.uint8)
    path = tmp_path / "v.mp4"
    video_files.write_with(path, frames)
    trained = permafrost.load_run(run, device="cpu")
    decoded = trained.reader.decoder.read(path, kind="frames", indices=list(range(9)))[0]
    found = trained.predict(path)
    assert len(found.names) == 5
    for other in trained.predict([decoded, torch.from_numpy(decoded.copy()).permute(0, 3, 1, 2)], batch_size=3):
        assert other.names == found.names
        assert [score for _, score in other.top] == pytest.approx([score for _, score in found.top], abs=1e-5)
    maps = trained.features(path)
    clip = trained.experiment.data.clip
    assert [one.shape[:2] for one in maps] == [(2, clip.num_frames)] * len(trained.backbone.spec.channels)
    for wrong, message in (
        (decoded[0], r"\(50, 70, 3\).*\(T, H, W, 3\)"),
        (decoded.astype(float), "float64.*uint8"),
        (1, "int"),
    ):
        with pytest.raises(DataError, match=f"the image: it .*{message}|the image: its .*{message}"):
            trained.predict(wrong)


def test_predict_keeps_what_scores_from_the_threshold_up(run, tmp_path, capsys) -> None:
    video = video_files.write_numbered(tmp_path / "v.mp4", 12)
    command = ["predict", str(run), str(video), "--output", str(tmp_path / "out"), "--score-threshold", "0.99"]
    assert main(command) == 0
    assert json.loads((tmp_path / "out/predictions.json").read_text())[0]["top"] == []
    assert ": nothing -> " in capsys.readouterr().out
    assert main(["predict", str(run), str(tmp_path / "none.mp4"), "--output", str(tmp_path / "out")]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err


def own_files(root: Path) -> list[str]:
    """Flags that read a folder of the world's files, which may be damaged, as it is."""
    return [*WORLD, "--data.root", str(root), "--data.missing-share", "0.2", "--data.corrupt-share", "0.2"]


def test_check_data_names_missing_broken_and_short_videos(kinetics, tmp_path, capsys) -> None:
    root = shutil.copytree(kinetics, tmp_path / "kinetics")
    sheet = tmp_path / "sheet.png"
    command = ["check-data", "kinetics:swinv2_base_linear", *reduced(root, loop=False)]
    assert main([*command, "--draw", "2", "--output", str(sheet)]) == 0
    shown = capsys.readouterr().out
    assert "missing videos" in shown
    assert "videos shorter than the sampling window" in shown
    assert "2 videos for training and 2 videos (24 clips) for validation, 400 classes" in shown
    with Image.open(sheet) as picture:
        assert picture.width > 100
    for file in (root / "val").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert main(command) == 2
    assert "2 of 2 videos cannot be decoded" in capsys.readouterr().out
    (root / "val.csv").write_text("label,youtube_id,time_start,time_end,split\n")
    assert main(command) == 2
    assert "it lists no video" in capsys.readouterr().out


def reduced(root: Path, *, loop: bool = True) -> list[str]:
    """Flags that make a recipe small: the nano backbone, few small frames, one step; its head's kind and blocks stay."""
    fields = {"backbone.name": "swinv2_nano", "backbone.weights": "random", "backbone.window-size": "None"}
    fields |= {"data.root": root, "data.layout": "csv", "data.train-list": "train.csv", "data.val-list": "val.csv"}
    fields |= {"data.missing-share": 1.0, "data.clip.crop-size": 64, "data.clip.test-short-side": 64}
    fields |= {"engine.kind": "accelerate", "engine.zero-stage": "None", "engine.accumulation": 1}
    if loop:
        fields |= {"data.clip.num-frames": 4, "data.clip.test-clips": 1, "data.clip.test-crops": 2}
        values = {"num-steps": 1, "global-batch": 2, "num-workers": 0, "log-every": 1, "image-every": 0}
        fields |= {f"loop.{name}": value for name, value in values.items()}
    return [part for name, value in fields.items() for part in (f"--{name}", str(value))]


def test_every_row_is_there_with_the_published_numbers() -> None:
    expected = {
        f"kinetics:swinv2_base_{name}": f"{PUBLISHED[f'table4_{name}'][0]} top-1"
        for name in ("linear", "temporal", "global")
    }
    for name, (frozen, full, _) in PUBLISHED.items():
        expected[f"paper_kinetics:{name}"] = f"{frozen} top-1"
        if full is not None:
            expected[f"paper_kinetics:{name}_full"] = f"{full} top-1"
    assert {name: info.metric for name, info in RECIPES.items()} == expected
    for name, info in RECIPES.items():
        experiment, text = build_recipe(info.function), inspect.getdoc(info.function)
        assert (experiment.data.clip.test_clips, experiment.data.clip.test_crops) == (4, 3), name
        assert experiment.loop.num_steps * experiment.loop.global_batch == pytest.approx(30 * 240_000, rel=0.01), name
        assert f"permafrost.launcher.train {name} " in text or f"permafrost train {name} " in text, name
        if not name.startswith("paper"):
            continue
        own = name.partition(":")[2]
        assert experiment.backbone.frozen != own.endswith("_full"), name
        assert experiment.backbone.frozen or experiment.backbone.learning_rate_factor == 0.1, name
        model = experiment.heads["video"].model
        assert type(model) is PUBLISHED[own.removesuffix("_full")][2], name
        assert getattr(model, "num_blocks", 4) == 4, name
        assert "Weights: " in text, name
        assert experiment.backbone.weights.endswith(".pth"), name


def one_step(info: RecipeInfo, root: Path, output: Path, *flags: str) -> None:
    assert main(["train", info.name, "--output", str(output), *reduced(root), *flags]) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["video/loss"] for line in lines if "video/loss" in line]
    assert len(losses) == 1
    assert np.isfinite(losses).all()
    assert main(["evaluate", str(output), "--checkpoint", "latest"]) == 0
    metrics = json.loads((output / "evaluation.json").read_text())["metrics"]["video"]
    assert (metrics["video/num_videos"], metrics["video/num_clips"], metrics["video/num_missing"]) == (2, 4, 1)


@pytest.mark.parametrize(
    ("name", "flags"), [("table4_temporal", ("--backbone.patch-frames", "2")), ("table4_global_full", ())]
)
def test_one_step_and_one_evaluation_through_the_command_line(name, flags, kinetics, tmp_path) -> None:
    one_step(RECIPES[f"paper_kinetics:{name}"], kinetics, tmp_path / "run", *flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_a_step_and_is_evaluated(name, kinetics, tmp_path) -> None:
    one_step(RECIPES[name], kinetics, tmp_path / "run")
