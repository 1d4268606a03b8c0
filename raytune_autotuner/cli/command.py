"""What a command of the command line is, and what several of them take.

What a command needs is imported when it runs, so that `--help` and Tab wait for nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raytune_autotuner.report.store import Store

PROGRAM = "python -m raytune_autotuner"
SCRIPT = "raytune-autotuner"
"""The same program under the name that an installation gives it."""
DEFAULT_RESULTS = "results"


@dataclass(frozen=True)
class Command:
    """A word of the command line; what it is for at length stands in `manual.py`."""

    name: str
    help: str
    """Its line in the list of commands."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Does what is asked for and returns the exit code."""


def place(text: str) -> Path | Store:
    """A folder or an object store, as an argument's type."""
    from raytune_autotuner.report.store import place

    return place(text)
