"""A study, and what others could see of its processes while it ran: where they listened, what their lines said."""

from __future__ import annotations

import os
import subprocess
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from raytune_autotuner.report.results import ResultsFolder
from tests.studies import command, only_run

_VARIABLE = "WATCHED"
_EVERY_S = 0.3


@dataclass
class Seen:
    """What all processes of a study together have shown."""

    listening: set[tuple[str, str]] = field(default_factory=set)
    """(process, address)"""
    lines: set[str] = field(default_factory=set)
    """Command lines, as everyone on the machine can read them."""


def run_watched(
    study: Path, environment: Mapping[str, str], timeout_s: float = 300
) -> tuple[subprocess.CompletedProcess[str], ResultsFolder, Seen]:
    """Run `study` to its end, with `environment` over ours."""
    mark, seen, over = uuid.uuid4().hex, Seen(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(mark, seen, over))
    watcher.start()
    try:
        env = {**os.environ, **environment, _VARIABLE: mark}
        done = subprocess.run(command(study), env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    finally:
        over.set()
        watcher.join()
    return done, only_run(study), seen


def _watch(mark: str, seen: Seen, over: threading.Event) -> None:
    known: dict[int, bool] = {}
    while not over.wait(_EVERY_S):
        for pid in psutil.pids():
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if known.get(pid) is None:
                    known[pid] = process.environ().get(_VARIABLE) == mark
                if known[pid]:
                    _note(process, seen)


def _note(process: psutil.Process, seen: Seen) -> None:
    seen.lines.add(" ".join(process.cmdline()))
    for connection in process.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN:
            seen.listening.add((process.name(), connection.laddr.ip))
