"""The front door: arguments in, exit code out."""

from raytune_autotuner.cli.program import main

__all__ = ["main"]
