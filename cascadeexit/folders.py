"""Folders: tells where to keep files that stay after the process has ended."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: $CASCADEEXIT_CACHE if it is set, else `cascadeexit` in the user's cache folder."""
    if folder := os.environ.get("CASCADEEXIT_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascadeexit"
