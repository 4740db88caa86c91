"""The remote store, below the disk: see README.md."""
