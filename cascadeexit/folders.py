"""Folders that outlive a process."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $CASCADEEXIT_CACHE, else cascadeexit in the user's cache folder."""
    if folder := os.environ.get("CASCADEEXIT_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascadeexit"
