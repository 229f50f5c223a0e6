"""The command line: `tok2img COMMAND`."""

from .app import app, main

__all__ = ["app", "main"]
