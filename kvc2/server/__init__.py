"""The daemon's server: see README.md for what lies where."""

from kvc2.server.daemon import Daemon, running, serve

__all__ = ["Daemon", "running", "serve"]
