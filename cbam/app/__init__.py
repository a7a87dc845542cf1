"""What people run: the command line."""

from cbam.app.cli import main

__all__ = ["main"]
