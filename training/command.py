"""What every command of the recipe does about wrong input: say in a line what is wrong, and end."""

import sys
from collections.abc import Callable
from pathlib import Path

from cascadeexit.hub import ModelUnavailable


def run_command(main: Callable[[], None]) -> None:
    """Run a command. What its input lacks becomes a message and exit status 1, not a traceback."""
    try:
        main()
    except (ModelUnavailable, FileNotFoundError, ValueError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).stem}: {error}") from error
