"""Folders: tells where the project's files are, and where to keep files that stay after the process has ended."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: $CASCADEEXIT_CACHE if it is set, else `cascadeexit` in the user's cache folder."""
    if folder := os.environ.get("CASCADEEXIT_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascadeexit"


def project_folder() -> Path:
    """Return the folder that holds `app.py`, `assets` and `training`.

    In an installed package, it is the folder `project` inside the package, where the wheel has copies of them.
    Otherwise it is the checkout.
    """
    package = Path(__file__).parent
    installed = package / "project"
    return installed if installed.is_dir() else package.parent


def assets_folder() -> Path:
    """Return the folder of the shipped exits, prompts, measured results and the files of the page."""
    return project_folder() / "assets"
