"""The user interfaces: the command line, and a web page."""

from cbam.app.cli import main

__all__ = ["main"]
