"""Where built-in worlds are kept; imports nothing, because `permafrost doctor` asks too."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$PERMAFROST_CACHE, or ~/.cache/permafrost."""
    given = os.environ.get("PERMAFROST_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "permafrost"
