"""Entry point of the training commands. Wrong input ends a command with a short message."""

import sys
from collections.abc import Callable
from pathlib import Path

from cascadeexit.hub import ModelUnavailable


def run_command(main: Callable[[], None]) -> None:
    """Run the `main` function of a command.

    If `main` raises ModelUnavailable, FileNotFoundError or ValueError, the program prints the message without a
    traceback, and ends with exit status 1.
    """
    try:
        main()
    except (ModelUnavailable, FileNotFoundError, ValueError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).stem}: {error}") from error
