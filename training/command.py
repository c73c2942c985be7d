"""Entry point of all commands of the recipe: wrong input ends a command with a one-line message."""

import sys
from collections.abc import Callable
from pathlib import Path

from cascadeexit.hub import ModelUnavailable


def run_command(main: Callable[[], None]) -> None:
    """Run a command. Wrong or missing input gives a message and exit status 1, not a traceback."""
    try:
        main()
    except (ModelUnavailable, FileNotFoundError, ValueError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).stem}: {error}") from error
