"""Rules about the tree itself: direction of imports, short files, torch-free configurations, a README with the commands that are tested."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from smoke import SMOKE

FOLDERS = ("configs", "data", "heads", "launcher", "model")


def sources(root: Path) -> list[Path]:
    return sorted(file for folder in FOLDERS for file in (root / folder).rglob("*.py"))


def test_imports_go_one_way_without_circles_and_configurations_need_no_torch(root: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, root / "dev" / "package_tree.py", tmp_path / "tree"], check=True)
    lint = Path(sys.executable).with_name("lint-imports")
    command = [lint, "--no-cache", root / "pyproject.toml"]
    result = subprocess.run(command, cwd=tmp_path / "tree", capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    analysed = re.search(r"Analyzed (\d+) files", result.stdout)
    assert analysed, result.stdout
    assert int(analysed[1]) >= len(sources(root))


def test_heads_know_features_targets_names_of_classes_and_kernels_alone(root: Path) -> None:
    allowed = re.compile(
        r"permafrost\.(heads\b|data\.(types|\w+\.(types|classes))\b|model\.(spec|errors|kernels)\b|_(lazy|checks|configuration|modules)\b)"
    )
    imported = {
        (str(file.relative_to(root)), node.module)
        for file in sorted((root / "heads").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("permafrost")
    }
    assert len(imported) > 50
    assert not [entry for entry in imported if not allowed.match(entry[1])]


def test_files_are_short_enough_to_read_in_one_sitting(root: Path) -> None:
    budget = {"launcher/train.py": 400}
    budget |= {str(file.relative_to(root)): 700 for file in (root / "model" / "kernels").rglob("*.py")}
    lengths = {str(file.relative_to(root)): len(file.read_text().splitlines()) for file in sources(root)}
    too_long = {name: length for name, length in lengths.items() if length > budget.get(name, 500)}
    assert not too_long


WITHOUT_TORCH = """
import importlib, pkgutil, sys

HEAVY = {"torch", "torchvision", "timm", "deepspeed", "accelerate", "fairscale", "numpy", "scipy", "PIL", "pycocotools"}

class Refused(BaseException):  # which nobody catches
    pass

class Finder:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise Refused(f"{name} is imported")

sys.meta_path.insert(0, Finder)
fronts = [importlib.import_module(f"permafrost.{name}") for name in ("data", "heads", "launcher", "model")]
for front in fronts:
    for name in front.__all__:
        if name.endswith(("Config", "Experiment", "World")):
            getattr(front, name)
import permafrost.configs, permafrost.launcher.cli, permafrost.launcher.experiment
modules = [module.name for module in pkgutil.iter_modules(permafrost.configs.__path__, "permafrost.configs.")]
for module in modules:
    importlib.import_module(module)
from permafrost.launcher.recipes.find import list_recipes
print(len(modules), len(list_recipes()))  # which are built
assert not HEAVY & set(sys.modules), HEAVY & set(sys.modules)
"""
"""A program that describes every run there is. The traceback shows who imports what is refused, be it within a function or a
lazy front, which no linter sees."""


def test_configurations_import_without_torch(root: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    modules, recipes = map(int, result.stdout.split())
    assert modules == len(list((root / "configs").glob("[!_]*.py")))
    assert recipes > 100


def test_folders_are_small_enough_to_find_a_file_in(root: Path) -> None:
    counts = Counter(str(file.parent.relative_to(root)) for file in sources(root))
    assert not {folder: count for folder, count in counts.items() if count > 20}


def test_every_folder_of_code_is_a_package(root: Path) -> None:
    folders = {file.parent for file in sources(root)}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_readme_commands_are_what_ci_runs(root: Path) -> None:
    readme, ci = (root / "README.md").read_text(), (root / ".ci" / "run").read_text()
    assert "pip install -e . && permafrost train quickstart" in readme
    assert "pip install -e '.[test]' && pytest" in readme
    for piece in ("pip install -q -e .\n", "-e '.[test]'", "\ntests --durations=15", "permafrost train quickstart"):
        assert piece in ci, piece


def test_the_smoke_tier_has_a_path_through_every_room(root: Path) -> None:
    rooms = {
        str(folder.relative_to(root))
        for top in FOLDERS
        for folder in [root / top, *(root / top).iterdir()]
        if (folder / "__init__.py").exists()
    }
    assert rooms | {"permafrost"} == set(SMOKE)
    for entry in (entry for entries in SMOKE.values() for entry in entries):
        file, _, test = entry.partition("::")
        name = re.split(r"[\[:]", test)[-1] if "::" in test else test.partition("[")[0]
        assert not test or f"def {name}" in (root / file).read_text(), entry
