"""The pages for people: what they name is there, and the architecture page has a line for every file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from permafrost.launcher.cli import COMMANDS
from permafrost.launcher.recipes.find import find_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
]
PRODUCT = ("permafrost", "launcher", "heads", "data", "model", "configs")
WITH_RECIPE = ("train", "launch", "plan", "check-data", "pretrain")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_of(text: str) -> list[str]:
    """Return a page's code: spans between backticks, and the lines of its blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose)]
    return [*spans, *re.findall(r"^    (\S.*)$", prose, flags=re.MULTILINE), *"\n".join(fenced).splitlines()]


def paths_of(text: str) -> list[str]:
    """Return what a page's spans of code name by a path in the repository: of a top-level folder or a file with an ending."""
    folders = [entry.name for entry in ROOT.iterdir() if entry.is_dir() and entry.name not in ("build", "runs", ".git")]
    inside = re.compile(rf"({'|'.join(map(re.escape, folders))})/[\w./*-]*")
    endings = re.compile(r"[\w.*-]+(/[\w.*-]+)+\.(py|md|toml|cu|csv)")
    return [span for span in code_of(text) if inside.fullmatch(span) or endings.fullmatch(span)]


@pages
def test_paths_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert links or page.name == "SECURITY.md"
    assert not [link for link in links if not (page.parent / link).exists()]
    assert not [path for path in paths_of(text) if not any(ROOT.glob(path.rstrip("/")))]


@pages
def test_commands_that_a_page_names_exist(page: Path) -> None:
    code = code_of(page.read_text())
    called = [
        match
        for line in code
        for match in re.findall(r"(?:^|&& )permafrost ([a-z][\w-]*)(?: ([a-z][\w:]*)(?= |$))?", line)
    ]
    assert not [command for command, _ in called if command not in COMMANDS]
    for recipe in {recipe for command, recipe in called if command in WITH_RECIPE and recipe}:
        find_recipe(recipe)
    scripts = [match for line in code for match in re.findall(r"python ([\w/.-]+\.py)([^&]*)", line)]
    assert not [script for script, _ in scripts if not (ROOT / script).is_file()]
    shared = "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
    for script, arguments in scripts:
        text = shared if script.startswith("benchmarks/") else (ROOT / script).read_text()
        assert not [option for option in re.findall(r"--[a-z][a-z-]*", arguments) if f'"{option}"' not in text], script


@pages
def test_functions_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`\s\(`([\w/]+\.py)`\)", page.read_text())
    assert named or page.name != "architecture.md"
    for name, file in named:
        tree = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            found = [
                node
                for node in ast.iter_child_nodes(tree)
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part
            ]
            assert found, f"{page.name}: {file} has no {name}"
            tree = found[0]


def test_the_architecture_page_has_one_line_for_every_file() -> None:
    listed = re.findall(r"^- `([^`]+)`:", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    sources = [file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py")]
    files = {str(file.relative_to(ROOT)) for file in sources if file.name != "__init__.py"}
    # A folder's line stands for its __init__.py.
    files |= {f"{file.parent.relative_to(ROOT)}/" for file in sources if file.name == "__init__.py"}
    assert files - set(listed) == set()
    assert not [path for path in listed if not (ROOT / path).exists()]
