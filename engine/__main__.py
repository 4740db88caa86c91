"""`python -m engine` is `kvc2-engine`."""

from engine.cli import main

main()
