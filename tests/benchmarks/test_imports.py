"""Benchmarks are run seldom: what they import from the package must be there all the same."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_a_benchmark_imports_is_there(script: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("permafrost"):
            names = [alias.name for alias in node.names]
            module = importlib.import_module(node.module)
            missing += [
                f"{node.module}.{name}"
                for name in names
                if not hasattr(module, name) and importlib.util.find_spec(f"{node.module}.{name}") is None
            ]
    assert not missing
