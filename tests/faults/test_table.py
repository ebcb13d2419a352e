"""README.md of this folder: every row has tests, and these exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROWS = (*range(1, 20), *range(26, 29))
TABLE = re.findall(
    r"^\| (\d+) \|[^|]*\|([^|]*)\|", Path(__file__).with_name("README.md").read_text(), flags=re.MULTILINE
)


def test_every_row_is_there() -> None:
    assert [int(number) for number, _ in TABLE] == list(ROWS)


@pytest.mark.parametrize(("number", "tests"), TABLE)
def test_its_tests_exist(root: Path, number: str, tests: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
    assert named
    assert len(named) == tests.count("`") // 2
    for file, name in named:
        tree = ast.parse((root / file).read_text())
        assert name in [entry.name for entry in tree.body if isinstance(entry, ast.FunctionDef)], f"{file}::{name}"
