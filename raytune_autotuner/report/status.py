"""Where a study run is: `status.json`, which its driver keeps fresh.

Works from the file alone, for a study that runs, has ended or was killed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from raytune_autotuner.report.results import NO_ROW, ResultsFolder
from raytune_autotuner.report.writing import read_json, write_json
from raytune_autotuner.study.failure import Stage

Phase = Literal["running", "finished", "interrupted", "at fault"]
"""`at fault`: ended by a failure that no setting can mend. As an interrupted one it can be resumed."""
Standing = Literal["not started", "running", "killed", "finished", "interrupted", "at fault"]
STALE_S = 60.0
"""A driver on another machine that was silent for so long is taken for dead."""


@dataclass(frozen=True, slots=True)
class LiveTrial:
    """Where a running trial is."""

    number: int
    stage: Stage
    share: float = 0.0
    """How much of `stage` is done, in [0, 1]."""
    elapsed_s: float = 0.0
    timeout_s: float = 0.0
    metrics_now: Mapping[str, float] = field(default_factory=dict)
    """What its rounds so far measured."""


@dataclass(frozen=True, slots=True)
class StudyStatus:
    """What a study's driver said last about itself. `begin` makes the first one."""

    phase: Phase
    started_at: float
    """Epoch seconds."""
    updated_at: float
    pid: int
    pid_started: int
    """The driver's start in clock ticks since boot: tells it from a later process of the same id."""
    host: str
    concurrency: int = 1
    live: tuple[LiveTrial, ...] = ()

    @classmethod
    def begin(cls, concurrency: int, elapsed_s: float = 0.0) -> StudyStatus:
        """The status of a study that this process starts to drive now; it has run for `elapsed_s` before."""
        now, pid = time.time(), os.getpid()
        return cls("running", now - elapsed_s, now, pid, _started(pid) or 0, socket.gethostname(), concurrency)

    @property
    def elapsed_s(self) -> float:
        """Seconds from the study's start until it was last heard of."""
        return self.updated_at - self.started_at

    @property
    def driver_alive(self) -> bool:
        """Whether the study still runs; False also for a driver that was killed."""
        if self.phase != "running":
            return False
        if self.host != socket.gethostname():
            return time.time() - self.updated_at < STALE_S
        return _started(self.pid) == self.pid_started


def write_status(folder: ResultsFolder, status: StudyStatus) -> None:
    """Replace `status.json`; call it about once a second while a study runs, and at its end."""
    write_json(folder.status_file, asdict(status))


def read_status(folder: ResultsFolder) -> StudyStatus | None:
    """What `write_status` wrote last; None where the study never began, or where that is broken.

    Keys that are not known, as those of a later version, are passed over.
    """
    values = read_json(folder.status_file)
    if values is None:
        return None
    try:
        trials = (_known(LiveTrial, trial) for trial in values["live"])
        live = tuple(LiveTrial(**{**trial, "stage": Stage(trial["stage"])}) for trial in trials)
        return StudyStatus(**{**_known(StudyStatus, values), "live": live})
    except NO_ROW:
        return None


def _known(kind: type[LiveTrial | StudyStatus], values: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def standing_of(status: StudyStatus | None) -> Standing:
    """Where a study run is, from what its driver said last."""
    if status is None:
        return "not started"
    return "killed" if status.phase == "running" and not status.driver_alive else status.phase


def _started(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
