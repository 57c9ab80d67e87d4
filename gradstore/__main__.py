"""Entry point: `python -m gradstore` runs the `gradstore` command."""

from gradstore.cli import main

main()
