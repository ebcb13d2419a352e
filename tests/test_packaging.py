"""The package as pip builds it, installed where nothing of the checkout can help it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

FOLDERS = ("configs", "data", "heads", "launcher", "model")

IMPORT_EVERYTHING = """
import importlib, importlib.util, pathlib, pkgutil, sys, warnings
warnings.simplefilter("ignore")
prefix = pathlib.Path(sys.argv[1]).resolve()
import permafrost
names = ["permafrost", *(m.name for m in pkgutil.walk_packages(permafrost.__path__, "permafrost."))]
for name in names:
    module = importlib.import_module(name)
    path = pathlib.Path(module.__file__).resolve()
    assert prefix in path.parents, f"{name} came from {path}"
print("\\n".join(sorted(names)))
for folder in sys.argv[2:]:
    assert importlib.util.find_spec(folder) is None, f"a top-level {folder!r} became importable"
for folder in ("tests", "benchmarks"):  # a dependency may bring its own
    spec = importlib.util.find_spec(folder)
    found = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
    assert not [path for path in found if str(prefix) in path], f"our {folder!r} became importable"
"""


def modules_of(source: Path) -> list[str]:
    """Every module the tree holds, by installed name."""
    names = []
    for folder in (*FOLDERS, "permafrost"):
        for file in (source / folder).rglob("*.py"):
            parts = file.relative_to(source).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            names.append(".".join(parts if folder == "permafrost" else ("permafrost", *parts)))
    return sorted(names)


@pytest.fixture(scope="module")
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building leaves files beside them."""
    copy = tmp_path_factory.mktemp("source") / "permafrost"
    ignore = shutil.ignore_patterns("__pycache__", ".*", "runs", "build", "*.egg-info")
    shutil.copytree(root, copy, ignore=ignore)
    return copy


@pytest.fixture
def clean_prefix(tmp_path: Path) -> Path:
    """An environment with our dependencies (by a .pth file, which does not run theirs) but without permafrost."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    site = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def test_wheel_installs_every_module_and_nothing_else(source: Path, clean_prefix: Path, tmp_path: Path) -> None:
    pip = (clean_prefix / "bin" / "python", "-m", "pip")
    run(*pip, "wheel", source, "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels", cwd=tmp_path)
    (wheel,) = (tmp_path / "wheels").glob("permafrost-*.whl")
    run(*pip, "install", "--no-deps", "--ignore-installed", wheel, cwd=tmp_path)
    shutil.rmtree(source / "build", ignore_errors=True)

    python = clean_prefix / "bin" / "python"
    imported = run(python, "-c", IMPORT_EVERYTHING, clean_prefix, *FOLDERS, cwd=tmp_path).split()
    assert imported == modules_of(source)
    assert (clean_prefix / "bin" / "permafrost").exists()

    site = next(clean_prefix.glob("lib/python*/site-packages"))
    shipped = {
        path.name
        for path in (site / "permafrost").rglob("*")
        if path.suffix in {".safetensors", ".json", ".yaml", ".example", ".cu", ".h"}
    }
    data = {"swinv2_nano_glyphs.safetensors", "zero2.json", "single_node.yaml", "hostfile.example"}
    assert data | {"window_attention.cu", "warp.h", "geometry.h"} <= shipped
    assert (site / "permafrost" / "py.typed").exists()

    # `python -c` has the current folder in front: in a checkout its permafrost/ is found before the installed package.
    found = run(python, "-c", "import permafrost.model as m; print(m.__file__)", cwd=source)
    assert Path(found.strip()).resolve() == (source / "model" / "__init__.py").resolve()
    assert run(python, "-m", "permafrost", "--version", cwd=source) == run(
        python, "-m", "permafrost", "--version", cwd=tmp_path
    )


def test_editable_install_imports_where_wheel_is_present(source: Path, clean_prefix: Path, tmp_path: Path) -> None:
    """Without a build-system table, pip with `wheel` at hand takes a path on which the namespace is not importable."""
    python = clean_prefix / "bin" / "python"
    run(python, "-c", "import wheel", cwd=tmp_path)
    run(
        python,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--ignore-installed",
        "-e",
        source,
        cwd=tmp_path,
    )
    out = run(
        python,
        "-c",
        "import importlib.util as u, permafrost.model, permafrost.data; print(permafrost.model.__file__);"
        f"assert not [f for f in {FOLDERS + ('tests',)} if u.find_spec(f)]",
        cwd=tmp_path,
    )
    assert Path(out.strip()).resolve() == (source / "model" / "__init__.py").resolve()
