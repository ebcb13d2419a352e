"""Lay the checkout out as the package that pip installs: a folder of links, on which tools that read files run.

    python dev/package_tree.py build/tree && cd build/tree && lint-imports ../../pyproject.toml

import-linter, type checkers and documentation builders look for `permafrost/data` where the checkout has `data`.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "data", "heads", "launcher", "model")


def make_tree(target: Path) -> Path:
    """Make TARGET/permafrost of links into this checkout, anew; return TARGET.

    Raises:
        OSError: something else than links of an earlier call lies there.
    """
    package = target / "permafrost"
    package.mkdir(parents=True, exist_ok=True)
    for entry in package.iterdir():
        entry.unlink()
    own = [file for file in (ROOT / "permafrost").iterdir() if file.is_file()]
    for source in (*own, *(ROOT / folder for folder in FOLDERS)):
        (package / source.name).symlink_to(source)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make_tree(Path(sys.argv[1]))
