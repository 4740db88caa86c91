"""`python -m kvc2` is `kvc2`."""

from kvc2.cli import main

main()
