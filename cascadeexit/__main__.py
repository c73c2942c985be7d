"""Entry point of `python -m cascadeexit`, which is the command `cascadeexit`."""

from cascadeexit.console import main

main()
