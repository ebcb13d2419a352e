"""The doctor: what it says of healthy, lacking and broken surroundings."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from permafrost.launcher import doctor
from permafrost.launcher.cli import main
from permafrost.launcher.doctor import Check

HEALTHY = {
    **{module: None for _, module, _, _ in doctor.PACKAGES},
    "devices": {"cpu": "AVX2", "backends": {"gloo": "available"}, "gpus": [], "no_gpu": "a CPU build"},
}


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_it_reports_this_machine_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    code = main(["doctor"])
    assert time.monotonic() - start < 20
    text = capsys.readouterr().out
    assert code == (0 if "The quickstart can run here" in text else 1)
    assert (code == 1) == ("MISSING" in text)
    import torch

    for expected in (
        "torch ",
        "pycocotools",
        "CPU",
        "memory",
        "cache",
        "g++",
        "gloo",
        "pdsh",
        torch.__version__.split("+")[0],
    ):
        assert expected in text
    assert str(Path(os.environ["PERMAFROST_CACHE"])) in text
    packages = text.split("packages")[1].split("devices")[0]
    assert "MISSING" not in packages, "everything the quickstart needs is installed where its tests run"


def test_packages_that_lack_or_break(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {package: "99.1" for package, _, _, _ in doctor.PACKAGES}
    versions.update(torch="2.3.1+cpu", timm=None, pycocotools=None)
    monkeypatch.setattr(doctor, "version_of", versions.get)
    probed = {**HEALTHY, "torchvision": "RuntimeError: operator torchvision::nms does not exist", "decord": "killed"}
    found = by_name(doctor.check_packages(probed))
    assert found["numpy"] == Check("numpy", "ok", "99.1")
    assert found["torch"].status == "missing"
    assert "older than 2.11" in found["torch"].found
    assert found["torchvision"].status == "missing"
    assert "nms does not exist" in found["torchvision"].found
    assert "torch torchvision" in found["torchvision"].remedy
    assert found["pycocotools"].status == "missing"
    assert "pip install 'pycocotools" in found["pycocotools"].remedy
    assert found["timm"].status == "absent", "the quickstart does without"
    assert "timm/" in found["timm"].remedy
    assert found["decord"].status == "absent"


def test_a_package_that_was_not_examined_is_not_taken_for_healthy() -> None:
    assert by_name(doctor.check_packages({}))["torch"].status == "missing"


def test_modules_that_crash_hang_or_chatter_are_lines_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probe_crashes.py").write_text("import os\nos.abort()\n")
    (tmp_path / "probe_hangs.py").write_text("import time\ntime.sleep(600)\n")
    (tmp_path / "probe_raises.py").write_text("raise ImportError('lib.so: cannot open\\nmore')\n")
    (tmp_path / "probe_prints.py").write_text("import os\nprint('{\"x\": 1}')\nos.write(1, b'{\"y\": 1}\\n')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ["json", "probe_crashes", "probe_prints", "probe_hangs", "probe_raises", "math", "no_such_module"]
    start = time.monotonic()
    found = doctor.run_probe(names, timeout=3.0)
    assert time.monotonic() - start < 30
    assert set(found) == set(names)
    assert [found[name] for name in ("json", "probe_prints", "math")] == [None, None, None]
    assert found["probe_crashes"] == "the process importing it ended with code -6"
    assert found["probe_hangs"] == "importing it took more than 3 s"
    assert found["probe_raises"] == "ImportError: lib.so: cannot open"
    assert found["no_such_module"].startswith("ModuleNotFoundError")


def test_gpus() -> None:
    gpu = {"name": "H", "memory": 80e9, "capability": "9.0", "bfloat16": True, "error": None}
    broken = {**gpu, "bfloat16": False, "error": "no kernel image is available"}
    found = doctor.check_gpus({"devices": {"gpus": [gpu, broken]}})
    assert [check.status for check in found] == ["ok", "absent"]
    assert found[0].found == "H, 80 GB, compute capability 9.0, bfloat16"
    assert "no kernel image" in found[1].found
    (none,) = doctor.check_gpus(HEALTHY)
    assert none.status == "absent", "the quickstart needs no GPU"
    assert "a CPU build" in none.found


def test_little_memory_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory", lambda: (int(16e9), int(1e9)))
    found = by_name(doctor.check_processor(HEALTHY))
    assert found["memory"].status == "missing"
    assert found["memory"].found == "1.0 GB free of 16.0 GB"
    assert "AVX2" in found["CPU"].found


def test_memory_agrees_with_psutil() -> None:
    psutil = pytest.importorskip("psutil")
    total, available = doctor.memory()
    assert 0 < available <= total <= psutil.virtual_memory().total


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    fine = doctor.check_writable("cache", tmp_path / "not" / "yet" / "there", "worlds", "set X")
    assert fine.status == "ok"
    assert not (tmp_path / "not").exists(), "looking changes nothing"
    file = tmp_path / "file"
    file.write_text("")
    found = doctor.check_writable("cache", file / "below", "worlds", "set X")
    assert found.status == "missing"
    assert "set X" in found.remedy


def test_verdict_and_text() -> None:
    report = {"packages": [Check("torch", "ok", "2.15"), Check("timm", "absent", "not installed", "get it")]}
    assert doctor.can_run_quickstart(report)
    assert "The quickstart can run here" in doctor.format_report(report)
    report["room"] = [Check("cache", "missing", "full", "make room")]
    assert not doctor.can_run_quickstart(report)
    text = doctor.format_report(report)
    assert "MISSING cache  full" in text
    assert "make room" in text
    assert "cannot run here: see cache above" in text


@pytest.mark.parametrize(
    ("version", "bound", "expected"),
    [("2.15.0+cu132", "2.11", True), ("2.9.1", "2.11", False), ("2.11", "2.11.0", True), ("3", "2.11", True)]
    + [("2.12.0rc1", "2.11", True), ("0.4.13", "0.4.13", True)],
)
def test_versions_are_compared_by_number(version: str, bound: str, expected: bool) -> None:
    assert doctor.at_least(version, bound) is expected


def test_lower_bounds_come_from_the_package_itself() -> None:
    bounds = doctor.lower_bounds()
    assert bounds["torch"] == "2.11"
    assert set(bounds) <= {package for package, _, _, _ in doctor.PACKAGES} | {"ninja"}


def test_ninja_of_an_environment_that_is_not_activated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    found = by_name(doctor.check_compilers())
    assert found["g++"].status == found["ninja"].status == "absent"
    assert "pip install ninja" in found["ninja"].remedy
    program = tmp_path / "ninja"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert "activate" in by_name(doctor.check_compilers())["ninja"].remedy
    monkeypatch.setenv("PATH", str(tmp_path))
    assert by_name(doctor.check_compilers())["ninja"] == Check("ninja", "ok", str(program))
