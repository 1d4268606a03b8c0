"""How far a study run is: `status.json`, which its driver keeps fresh, and the time that is left.

Works from the files alone, for a study that runs, has ended or was killed.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from raytune_autotuner.report.results import ResultsFolder, write_json
from raytune_autotuner.study.failure import Stage
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow

Phase = Literal["running", "finished", "interrupted"]
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
    def begin(cls, concurrency: int) -> StudyStatus:
        """The status of a study that this process starts to drive now."""
        now, pid = time.time(), os.getpid()
        return cls("running", now, now, pid, _started(pid) or 0, socket.gethostname(), concurrency)

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
    """What `write_status` wrote last; None where the study never began."""
    try:
        values: dict[str, Any] = json.loads(folder.status_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    live = tuple(LiveTrial(**{**trial, "stage": Stage(trial["stage"])}) for trial in values.pop("live"))
    return StudyStatus(**values, live=live)


def time_left_s(
    study: Study, rows: Sequence[TrialRow], live: Mapping[int, LiveTrial], concurrency: int, elapsed_s: float
) -> float | None:
    """Seconds until the last trial's end, from the median trial so far; None before the first has ended."""
    ended = [row for row in rows if row.state.teaches]
    durations = [row.result.seconds["total"] for row in ended if "total" in row.result.seconds]
    if not durations:
        return None
    median = statistics.median(durations)
    running = [max(median - trial.elapsed_s, 0.0) for trial in live.values()]
    again = {row.number for row in rows if row.verifies is not None}
    searched = sum(row.counts for row in ended) + len(live.keys() - again)
    waiting = (0 if again else max(study.search.trials - searched, 0)) + verifications_left(study, rows)
    left = (sum(running) + waiting * median) / max(min(concurrency, waiting + len(running)), 1)
    left = max(left, *running, 0.0) if running else left
    budget = study.search.time_budget
    return left if budget is None else min(left, max(budget - elapsed_s, 0.0) + median)


def verifications_left(study: Study, rows: Sequence[TrialRow]) -> int:
    """How many engine starts of the finalists and the baseline are still to begin, at most."""
    again = [row for row in rows if row.verifies is not None]
    # Once a second round has begun, all settings have had their first start.
    known = any((row.restart or 0) > 0 for row in again)
    settings = {row.verifies for row in again} if known else range(study.verify.top + 1 if study.verify.top else 0)
    out = {row.verifies for row in again if row.state is State.FAILED}
    begun = sum(row.state.teaches or not row.state.finished for row in again if row.verifies not in out)
    return max((len(settings) - len(out)) * study.verify.restarts - begun, 0)


def progress(study: Study, rows: Sequence[TrialRow], detail: str = "") -> str:
    """`5 of 20 trials`, then `6 of 15 restarts to verify`; `detail` stands behind the trials.

    A run that verifies an earlier one has no trials of a search.
    """
    verification = verification_progress(study, rows)
    if any(row.state is State.EARLIER for row in rows):
        return verification or f"0 of {study.verify.starts} restarts to verify"
    done = sum(row.counts for row in rows)
    return ", ".join(filter(None, (f"{done} of {study.search.trials} trials{detail}", verification)))


def verification_progress(study: Study, rows: Sequence[TrialRow]) -> str:
    """`6 of 15 restarts to verify`; empty before the first one."""
    if all(row.verifies is None for row in rows):
        return ""
    done = sum(row.state.teaches for row in rows if row.verifies is not None)
    running = sum(not row.state.finished for row in rows if row.verifies is not None)
    return f"{done} of {done + running + verifications_left(study, rows)} restarts to verify"


def format_duration(seconds: float) -> str:
    """Short text for people.

    >>> format_duration(7.4), format_duration(125), format_duration(7300)
    ('7 s', '2:05', '2:01:40')
    """
    whole = int(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{whole} s"


def _started(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
