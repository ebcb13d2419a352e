"""The cache folder in which built-in worlds are kept. Imports nothing, because `permafrost doctor` asks for it too."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $PERMAFROST_CACHE, or ~/.cache/permafrost where it is not set."""
    given = os.environ.get("PERMAFROST_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "permafrost"
