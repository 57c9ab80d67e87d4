"""`python -m gradstore` is the `gradstore` command."""

from gradstore.cli import main

main()
