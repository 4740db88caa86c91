"""`python -m kvc2` is `kvc2`."""

from kvc2.commands.cli import main

main()
